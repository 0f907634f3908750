"""Which guesses pay, from what was measured of them. Pure.

Guesses pay where they leave every greedy answer as it is and are surely faster over all inputs: Student's test on the
logarithms of paired times, one-sided at 2.5%. Several ways are tried, of several tiers, and each is a chance to err, so
Holm's method corrects for all that were tried: the chance that any is said to pay which gains nothing is at most 2.5%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bitladder.plan.judge import SAME_SPEED
from bitladder.records.decision import Decision, Pairing, TierGuesses
from bitladder.records.plan import Plan
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


DecideWith = Callable[[Mapping[str, TierGuesses]], Decision]
"""Gives the decision with the guesses that levels would make, by level."""


def gains_of(reports: Sequence[SpeculationReport], plan: Plan) -> dict[str, TierGuesses]:
    """By level, the guesses that surely pay and fit into memory beside the level alone."""
    total = {level.level: level.total_bytes for level in plan.levels}
    rooms = [TierRoom(report.level, total[report.level]) for report in reports if report.level in total]
    return {one.level: one for one in guesses_of_tiers(rooms, reports, plan.budget_bytes, together=False)}


def decided_with_guesses(
    first: Decision, reports: Sequence[SpeculationReport], plan: Plan, decide_with: DecideWith
) -> Decision:
    """The decision with what was tried of guesses: tiers chosen by speeds with those that surely pay, and what each
    tier guesses with. Where those do not fit into memory beside the tiers so chosen, the choice is the first one.

    Args:
        first: without any guesses.
        reports: what was tried, by level.
        plan: the levels, and the memory for them.
        decide_with: the decision with guesses.
    """
    total = {level.level: level.total_bytes for level in plan.levels}

    def granted(decision: Decision) -> tuple[TierGuesses, ...]:
        rooms = [TierRoom(level, total[level]) for level in tiers_of(decision) if level in total]
        together = decision.pair is not Pairing.SWAP
        return guesses_of_tiers(rooms, reports, plan.budget_bytes, together=together)

    gains = gains_of(reports, plan)
    decision = decide_with(gains) if gains else first
    guesses = granted(decision)
    if any(gains.get(level) not in (None, *guesses) for level in tiers_of(decision)):
        decision, guesses = first, granted(first)
    summary = " ".join(part for part in (decision.summary, in_words(guesses)) if part)
    return replace(decision, speculate=guesses, summary=summary)


def tiers_of(decision: Decision) -> list[str]:
    """Its levels, each once."""
    return list(dict.fromkeys(level for level in (decision.quality, decision.speed) if level))


def next_to_try(
    speeds: Mapping[str, float], reports: Sequence[SpeculationReport], gains: Mapping[str, TierGuesses], speed: str
) -> str | None:
    """The level that guesses are to be tried on next, since with them it may be faster than the speed tier is with its
    own: the fastest of those that would be if they gained as much as any way may gain that was tried so far.

    Args:
        speeds: decoded tokens per second of levels that meet the bar, without guesses; NaN where not measured.
        reports: what was tried so far.
        gains: what surely pays of it, by level.
        speed: the speed tier.
    """
    tried = {report.level for report in reports}
    ends = [result.gains[0].high for report in reports for result in report.results if result.gains]
    most = max((end for end in ends if not math.isnan(end)), default=1.0)
    own = speeds.get(speed, math.nan) * (gains[speed].ratio if speed in gains else 1.0)
    open_ones = [
        level for level, plain in speeds.items() if level not in tried and plain * most > (1 + SAME_SPEED) * own
    ]
    return max(open_ones, key=lambda level: speeds[level], default=None)


def in_words(guesses: Sequence[TierGuesses]) -> str:
    """A sentence for each tier that guesses; empty without any."""
    return " ".join(
        f"{one.level} guesses tokens ahead ({one.guesses}): {one.ratio:.3g} times as fast ({one.low:.3g} to "
        f"{one.high:.3g}) on these inputs, with the same answers."
        for one in guesses
    )
