"""How a level behaves, whatever the criteria say: loops, thoughts without an end, tool calls made in a wrong way.

Each is counted over the answers in which it could show itself and compared with the reference's answers to the same
inputs. Inputs are what is independent, not answers: of several answers to one input a fault that more of the level's
have than of the reference's counts once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bitladder.describe.repetition import loop_start, repeated_shares
from bitladder.describe.tool_calls import CALL_FAULTS, judged_calls
from bitladder.describe.workload import Input, Workload
from bitladder.records.evaluation import Answer, FaultCount, Reply, Thinking
from bitladder.stages.chats import unfinished_thought
from bitladder.stats.intervals import weighted_wilson
from bitladder.stats.paired import more_often

LOOP, THOUGHT_LOOP, UNFINISHED = "loop", "looping thought", "unfinished thought"
FAULTS = (*CALL_FAULTS, UNFINISHED, THOUGHT_LOOP, LOOP)
"""Every fault that is counted."""
_LONG_ANSWER_WINDOWS = 3
"""Stretches from which repetition along an answer is worth telling."""

Shown = dict[str, dict[str, list[bool]]]
"""Fault to input to whether each answer has it, for the answers in which it could show itself."""


def faults_of(reference: Sequence[Answer], level: Sequence[Answer], workload: Workload) -> tuple[FaultCount, ...]:
    """Every fault that one of the two has, on the inputs that both answered."""
    inputs = {one.id: one for one in workload.inputs}
    theirs, ours = _shown(reference, inputs), _shown(level, inputs)
    starts = [start for answer in level for reply in answer.replies if (start := loop_start(reply.text)) is not None]
    found = []
    for fault in FAULTS:
        count = _counted(fault, theirs.get(fault, {}), ours.get(fault, {}), workload)
        if count.level or count.reference:
            begins = int(statistics.median(starts)) if fault == LOOP and starts else None
            found.append(count if begins is None else _beginning(count, begins))
    return tuple(found)


def _beginning(count: FaultCount, begins: int) -> FaultCount:
    from dataclasses import replace

    return replace(count, begins=begins)


def _shown(answers: Sequence[Answer], inputs: Mapping[str, Input]) -> Shown:
    shown: Shown = {}
    for answer in answers:
        one = inputs.get(answer.input_id)
        if one is None:
            continue
        for fault, has in _of_answer(one, answer).items():
            shown.setdefault(fault, {}).setdefault(answer.input_id, []).append(has)
    return shown


def _of_answer(one: Input, answer: Answer) -> dict[str, bool]:
    """Which faults could show themselves, and which do."""
    replies = answer.replies
    found = {LOOP: any(loop_start(reply.text) is not None for reply in replies)}
    if any(reply.thought for reply in replies):
        found[THOUGHT_LOOP] = any(loop_start(reply.thought) is not None for reply in replies)
        found[UNFINISHED] = any(unfinished_thought(reply) for reply in replies)
    return found | _call_faults(one, replies)


def _call_faults(one: Input, replies: Sequence[Reply]) -> dict[str, bool]:
    """By the first answer whose calls are not the wanted ones; empty where no criterion is about calls."""
    wanted = [
        [criterion.value for criterion in criteria if criterion.kind == "tool_call"]
        for criteria in (*(turn.criteria for turn in one.turns), one.criteria)
    ]
    if not any(wanted):
        return {}
    pairs = [(value, reply) for values, reply in zip(wanted, replies, strict=False) for value in values]
    faults = (judged_calls(value, reply.calls, one.tools).fault for value, reply in pairs)
    first = next((fault for fault in faults if fault), "")
    return {fault: fault == first for fault in CALL_FAULTS}


def _counted(
    fault: str, theirs: Mapping[str, list[bool]], ours: Mapping[str, list[bool]], workload: Workload
) -> FaultCount:
    """An input that only one side could show the fault on (it alone thought) counts as free of it on the other."""
    weights = {one.id: one.weight for one in workload.inputs}

    def share(side: Mapping[str, list[bool]], name: str) -> float:
        return statistics.fmean(side[name]) if side.get(name) else 0.0

    names = list(dict.fromkeys((*ours, *theirs)))
    appeared = tuple(name for name in names if share(ours, name) > share(theirs, name))
    vanished = tuple(name for name in names if share(ours, name) < share(theirs, name))
    rate = weighted_wilson([share(ours, name) for name in ours], [weights[name] for name in ours])
    return FaultCount(
        fault=fault,
        answers=sum(map(len, ours.values())),
        level=sum(map(sum, ours.values())),
        reference=sum(map(sum, theirs.values())),
        appeared=appeared,
        vanished=vanished,
        p_value=more_often(len(appeared), len(vanished)),
        low=rate.low,
        high=rate.high,
    )


def thinking_of(reference: Sequence[Answer], level: Sequence[Answer]) -> Thinking | None:
    """What both thought; None where neither did."""
    theirs, ours = (
        [reply for answer in side for reply in answer.replies if reply.thought] for side in (reference, level)
    )
    if not theirs and not ours:
        return None

    def mean(replies: Sequence[Reply]) -> float:
        return statistics.fmean(reply.thought_tokens for reply in replies) if replies else float("nan")

    def count(of: Callable[[Reply], bool]) -> int:
        return sum(map(of, ours))

    looping = count(lambda reply: loop_start(reply.thought) is not None)
    return Thinking(len(ours), mean(ours), mean(theirs), count(unfinished_thought), looping)


def repetition_of(answers: Sequence[Answer], others: Sequence[Answer]) -> tuple[float, ...]:
    """Mean share of repeated 4-grams, stretch by stretch; empty unless an answer of either side is long."""
    own = [repeated_shares(reply.text) for answer in answers for reply in answer.replies]
    longest = max(map(len, own), default=0)
    if longest < _LONG_ANSWER_WINDOWS:
        theirs = (len(repeated_shares(reply.text)) for answer in others for reply in answer.replies)
        if not any(windows >= _LONG_ANSWER_WINDOWS for windows in theirs):
            return ()
    return tuple(
        float(np.mean([shares[place] for shares in own if len(shares) > place])) for place in range(min(longest, 100))
    )
