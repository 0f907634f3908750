"""Which guesses pay, from what was measured of them. Pure.

Guesses pay where they leave every greedy answer as it is and are surely faster over all inputs: Student's test on the
logarithms of paired times, one-sided at 2.5%. Several ways are tried, of several tiers, and each is a chance to err, so
Holm's method corrects for all that were tried: the chance that any is said to pay which gains nothing is at most 2.5%.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.records.decision import TierGuesses
from bitladder.records.speculation import SpeculationReport, SpeculationResult
from bitladder.stats.multiplicity import holm

FALSE_PAYS = 0.025
"""Chance that any way is said to pay which gains nothing."""


def paying(results: Sequence[SpeculationResult]) -> list[SpeculationResult]:
    """Those that surely pay among all that were tried, what surely gains most first."""
    p_values = [one.gains[0].p_value if one.gains else float("nan") for one in results]
    adjusted = holm(p_values)
    found = [one for one, p in zip(results, adjusted, strict=True) if p <= FALSE_PAYS and one.lossless]
    return sorted(found, key=lambda one: -one.gains[0].low)


@dataclass(frozen=True)
class TierRoom:
    """A tier of the decision, and the memory it takes at the context."""

    level: str
    total_bytes: int


def guesses_of_tiers(
    tiers: Sequence[TierRoom], reports: Sequence[SpeculationReport], budget_bytes: int, *, together: bool
) -> tuple[TierGuesses, ...]:
    """What each tier guesses with: what surely gains most of what pays and fits in memory beside the tiers.

    Args:
        tiers: the levels chosen, each once.
        reports: what was tried on each, by level.
        budget_bytes: for all of them.
        together: whether the tiers stay in memory together; else each has the memory to itself in its turn.
    """
    results = {report.level: report.results for report in reports}
    surely = paying([result for own in results.values() for result in own])
    left = budget_bytes - sum(tier.total_bytes for tier in tiers)
    found = []
    for tier in tiers:
        room = left if together else budget_bytes - tier.total_bytes
        own = results.get(tier.level, ())
        best = next((one for one in surely if any(one is its for its in own) and one.extra_bytes <= room), None)
        if best is not None:
            left -= best.extra_bytes
            gain = best.gains[0]
            found.append(TierGuesses(tier.level, best.mode, gain.ratio, gain.low, gain.high, best.draft_sha256))
    return tuple(found)


def in_words(guesses: Sequence[TierGuesses]) -> str:
    """A sentence for each tier that guesses; empty without any."""
    return " ".join(
        f"{one.level} guesses tokens ahead ({one.guesses}): {one.ratio:.3g} times as fast ({one.low:.3g} to "
        f"{one.high:.3g}) on these inputs, with the same answers."
        for one in guesses
    )
