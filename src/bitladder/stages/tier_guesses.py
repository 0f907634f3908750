"""Guesses ahead in a run: tried on the tiers chosen, and on levels that might be the fast one with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bitladder.plan.speculation import TierRoom, guesses_of_tiers, in_words, next_to_try
from bitladder.records.decision import Decision, Pairing, Status, TierGuesses
from bitladder.records.run import RunRecord
from bitladder.records.speculation import SpeculationReport

MOST_OTHERS = 3
"""Levels beside the tiers that guesses are tried on: each takes as long as answering the workload several times."""

TryOn = Callable[[str], SpeculationReport]
DecideWith = Callable[[Mapping[str, TierGuesses]], Decision]


def with_guesses(record: RunRecord, levels: Sequence[str], try_on: TryOn, decide_with: DecideWith) -> RunRecord:
    """The record with what guessing ahead gains, and the decision that tiers do so where it pays.

    The tiers are tried first, then levels that meet the bar and might be faster than the speed tier with what guesses
    gain, `MOST_OTHERS` at most. The tiers are then chosen anew by speeds with the guesses that surely pay. Where those
    do not fit into memory beside the tiers so chosen, the choice stays what it was without any.

    Args:
        record: of the run, decided without guesses.
        levels: that guesses can be tried on here.
        try_on: measures one of them.
        decide_with: the decision with the guesses that levels would make.
    """
    plan, first = record.plan, record.decision
    total = {level.level: level.total_bytes for level in plan.levels}

    def granted(decision: Decision, reports: Sequence[SpeculationReport]) -> tuple[TierGuesses, ...]:
        rooms = [TierRoom(level, total[level]) for level in _tiers(decision, levels)]
        together = decision.pair is not Pairing.SWAP
        return guesses_of_tiers(rooms, reports, plan.budget_bytes, together=together)

    reports = [try_on(level) for level in _tiers(first, levels)]
    decision, gains = first, _gains(reports, total, plan.budget_bytes)
    if gains:
        decision = decide_with(gains)
    speeds = {result.level: result.decode_tokens_per_s for result in record.results if result.level in levels}
    speeds = {level: speed for level, speed in speeds.items() if level in _meeting(first)}
    for _ in range(MOST_OTHERS):
        level = next_to_try(speeds, reports, gains, decision.speed or "")
        if level is None:
            break
        reports.append(try_on(level))
        gains = _gains(reports, total, plan.budget_bytes)
        decision = decide_with(gains) if gains else first
    guesses = granted(decision, reports)
    if any(gains.get(level) not in (None, *guesses) for level in _tiers(decision, levels)):
        decision, guesses = first, granted(first, reports)
    summary = " ".join(part for part in (decision.summary, in_words(guesses)) if part)
    return replace(record, speculation=tuple(reports), decision=replace(decision, speculate=guesses, summary=summary))


def _tiers(decision: Decision, levels: Sequence[str]) -> list[str]:
    chosen = dict.fromkeys(level for level in (decision.quality, decision.speed) if level)
    return [level for level in chosen if level in levels]


def _meeting(decision: Decision) -> set[str]:
    """Levels that the tiers were chosen of."""
    held = (Status.QUALITY, Status.SPEED, Status.BOTH, Status.MEETS)
    return {one.level for one in decision.verdicts if one.status in held}


def _gains(reports: Sequence[SpeculationReport], total: Mapping[str, int], budget_bytes: int) -> dict[str, TierGuesses]:
    """By level, the guesses that surely pay and fit into memory beside the level alone."""
    rooms = [TierRoom(report.level, total[report.level]) for report in reports]
    return {one.level: one for one in guesses_of_tiers(rooms, reports, budget_bytes, together=False)}
