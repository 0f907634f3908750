"""Measure a ladder only as far as its decision needs.

Inputs are asked in a random order that the seed fixes, a batch at a time, of the levels whose place is still
open. A level closes when it is known to meet the bar or to fail it; once a level meets it, larger ones close
too, since the smallest that meets the bar is wanted. Evidence is anytime-valid (``stats.sequential``) and the
error rate is shared among the levels, so the chance that *any* level is called wrongly stays under ``alpha``
although we look after every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitladder.describe.workload import Input
from bitladder.stats.sequential import Standing, standing, still_open


@dataclass(frozen=True)
class LadderOutcome:
    """What is known when the measuring stopped, levels from the largest to the smallest."""

    levels: tuple[str, ...]
    standings: tuple[Standing, ...]
    inputs_used: tuple[int, ...]
    """Inputs asked of each level."""
    chosen: str | None
    """The smallest level known to meet the bar."""
    decided: bool
    """False when the inputs ran out before the choice was sure; ``chosen`` is then the best known so far."""


Ask = Callable[[str, Sequence[Input]], Sequence[float]]
"""``ask(level, inputs)``: for each input the level's pass share minus the reference's, -1 to 1."""


def measure_ladder(
    levels: Sequence[str],
    inputs: Sequence[Input],
    ask: Ask,
    *,
    margin: float,
    alpha: float = 0.05,
    batch: int = 8,
    seed: int = 0,
) -> LadderOutcome:
    """Find the smallest level whose pass rate is at most ``margin`` under the reference's.

    Args:
        levels: from the largest to the smallest.
        inputs: all there are; a part of them may do.
        ask: measures one level on some inputs.
        margin: loss that the bar allows, as a share; above 0, since no number of inputs can prove a loss of
            nothing.
        alpha: chance that any level is called wrongly.
        batch: inputs between two looks.
        seed: of the order of the inputs.

    Raises:
        ValueError: the margin is not between 0 and 1.
    """
    if not 0 < margin < 1:
        raise ValueError(f"the margin must lie between 0 and 1, got {margin}")
    order = np.random.default_rng(seed).permutation(len(inputs))
    seen: dict[str, list[float]] = {level: [] for level in levels}
    standings = [Standing.OPEN] * len(levels)
    for start in range(0, len(inputs), batch):
        wanted = [inputs[place] for place in order[start : start + batch]]
        places = still_open(standings)
        if not places:
            break
        for place in places:
            seen[levels[place]] += ask(levels[place], wanted)
            standings[place] = standing(seen[levels[place]], margin, alpha / len(levels))
    meets = [level for level, known in zip(levels, standings, strict=True) if known is Standing.MEETS]
    return LadderOutcome(
        levels=tuple(levels),
        standings=tuple(standings),
        inputs_used=tuple(len(seen[level]) for level in levels),
        chosen=meets[-1] if meets else None,
        decided=not still_open(standings),
    )
