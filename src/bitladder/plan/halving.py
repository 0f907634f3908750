"""Measure a ladder only as far as its decision needs.

The smallest level that meets the bar is wanted. Levels are tried by halving: the one in the middle of those
whose place is open is asked inputs, in a random order that the seed fixes, until it is known to meet the bar
or unlikely to; then the search goes on among the smaller or the larger ones. So most levels are never
measured, and each engine is started once.

Two error rates are stated. ``alpha``: the chosen level does not meet the bar. ``beta``: a level that meets it
is set aside. Evidence is anytime-valid (``stats.sequential``), so looking after every batch costs nothing.
``alpha`` is shared among the levels on the way: the first wrong call of a search can only happen on the way
that right calls would have taken, which the truth fixes in advance and which has at most ``ceil(log2(levels +
1))`` levels; so that many shares suffice, whatever the dependence between levels that answer the same inputs.
``beta`` holds for each level.

What it gives up: a small level that happens to be better than a larger one that was set aside is not found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from bitladder.describe.workload import Input
from bitladder.records.search import LadderOutcome
from bitladder.stats.sequential import Standing, standing

Ask = Callable[[str, Sequence[Input]], Sequence[float]]
"""``ask(level, inputs)``: for each input the level's pass share minus the reference's, -1 to 1."""


def measure_ladder(
    levels: Sequence[str],
    inputs: Sequence[Input],
    ask: Ask,
    *,
    margin: float,
    alpha: float = 0.05,
    beta: float = 0.1,
    batch: int = 8,
    seed: int = 0,
) -> LadderOutcome:
    """Find the smallest level whose pass rate is at most ``margin`` under the reference's.

    Args:
        levels: from the largest to the smallest.
        inputs: all there are; a part of them may do.
        ask: measures one level on some inputs; calls for one level follow each other.
        margin: loss that the bar allows, as a share; above 0, since no number of inputs can prove a loss of
            nothing.
        alpha: chance that the chosen level does not meet the bar.
        beta: chance that a level which meets it is set aside.
        batch: inputs between two looks.
        seed: of the order of the inputs.

    Raises:
        ValueError: the margin is not between 0 and 1.
    """
    if not 0 < margin < 1:
        raise ValueError(f"the margin must lie between 0 and 1, got {margin}")
    order = np.random.default_rng(seed).permutation(len(inputs))
    shuffled = [inputs[place] for place in order]
    share = alpha / max(1, math.ceil(math.log2(len(levels) + 1)))
    standings, used = [Standing.OPEN] * len(levels), [0] * len(levels)
    meets, fails = -1, len(levels)
    while fails - meets > 1:
        place = (meets + fails) // 2
        standings[place], used[place] = _measure(levels[place], shuffled, ask, margin, (share, beta), batch)
        if standings[place] is Standing.MEETS:
            meets = place
        else:
            fails = place
    ran_out = [place for place in range(meets + 1, len(levels)) if used[place] and standings[place] is Standing.OPEN]
    return LadderOutcome(
        levels=tuple(levels),
        standings=tuple(standings),
        inputs_used=tuple(used),
        chosen=levels[meets] if meets >= 0 else None,
        decided=not ran_out,
    )


def _measure(
    level: str, inputs: Sequence[Input], ask: Ask, margin: float, rates: tuple[float, float], batch: int
) -> tuple[Standing, int]:
    """Ask one level until its standing is known; with the inputs it took."""
    seen: list[float] = []
    for start in range(0, len(inputs), batch):
        seen += ask(level, inputs[start : start + batch])
        known = standing(seen, margin, rates[0], beta=rates[1])
        if known is not Standing.OPEN:
            return known, len(seen)
    return Standing.OPEN, len(seen)
