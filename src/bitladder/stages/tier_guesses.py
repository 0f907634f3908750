"""Guesses ahead in a run: tried on the tiers chosen, and on levels that might be the fast one with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from bitladder.plan.schedule import holding
from bitladder.plan.speculation import DecideWith, decided_with_guesses, gains_of, next_to_try, tiers_of
from bitladder.records.run import RunRecord
from bitladder.records.speculation import SpeculationReport

MOST_OTHERS = 3
"""Levels beside the tiers that guesses are tried on: each takes as long as answering the workload several times."""

TryOn = Callable[[str], SpeculationReport]


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
    reports = [try_on(level) for level in tiers_of(first) if level in levels]
    decision = decided_with_guesses(first, reports, plan, decide_with)
    speeds = {result.level: result.decode_tokens_per_s for result in record.results if result.level in levels}
    speeds = {level: speed for level, speed in speeds.items() if level in holding(first)}
    for _ in range(MOST_OTHERS):
        level = next_to_try(speeds, reports, gains_of(reports, plan), decision.speed or "")
        if level is None:
            break
        reports.append(try_on(level))
        decision = decided_with_guesses(first, reports, plan, decide_with)
    return replace(record, speculation=tuple(reports), decision=decision)
