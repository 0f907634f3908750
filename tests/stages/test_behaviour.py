"""Levels with a known fault are found, named, and lose the tier; chance alone seldom does it. Engine-free."""

import dataclasses
import json

import numpy as np
import pytest

from bitladder.describe.workload import Criterion, Input, Workload
from bitladder.plan.bar import DEFAULT_BAR, parse_bar
from bitladder.plan.certainty import LadderEvidence
from bitladder.plan.decide import decide, judged_levels
from bitladder.plan.gate import gate_exit
from bitladder.records import to_json
from bitladder.records.evaluation import Answer, FaultCount, Speed, ToolCall, WorkloadResult
from bitladder.records.reading import from_json
from bitladder.report.behaviour import behaviour_notes
from bitladder.stages.behaviour import LOOP, UNFINISHED
from bitladder.stages.evaluate import compare, judge_answers, level_answers
from bitladder.stats.multiplicity import tarone
from bitladder.stats.noninferiority import loss_interval, repeated_counts
from bitladder.stats.paired import more_often
from ladder_examples import SIZES, SPEEDS, fidelities, plan, result

TOOL = {"type": "function", "function": {"name": "book", "parameters": {"type": "object", "required": ["day"]}}}
WANTED = {"calls": [{"name": "book", "arguments": {"seats": 2}}]}


def workload(inputs, kind, value, **about):
    return Workload(
        "w",
        tuple(
            Input(
                f"i{n}",
                ({"role": "user", "content": str(n)},),
                (Criterion(kind, value),),
                ("long" if n < inputs // 2 else "short",),
                **about,
            )
            for n in range(inputs)
        ),
    )


CALLS = workload(400, "tool_call", WANTED, tools=(TOOL,))
STORIES = workload(25, "contains_any", ["w1"])


def call(n, *, whole=True):
    arguments = {"day": "Monday", "seats": 2} if whole else {"day": "Monday"}
    return {"calls": (ToolCall("book", json.dumps(arguments)),)}


def story(n, *, words=300, loops_after=None):
    told = [f"w{number}" for number in range(loops_after or words)]
    return {"text": " ".join(told + ["and", "then"] * ((words - len(told)) // 2))}


def thought(n, *, ends=True):
    if ends:
        return {"text": "w1", "thought": "Is it w1 or w2? It is w1.", "thought_tokens": 9}
    looping = {"thought": "But wait, is it? " * 40, "thought_tokens": 200}
    return {"text": "", "finish_reason": "length", **looping}


def answered(level, asked, reply):
    answers = [
        Answer(
            one.id, passed=False, detail="", prompt_tokens=1, completion_tokens=200,
            **{"text": "", "finish_reason": "stop", **reply(number)},
        )
        for number, one in enumerate(asked.inputs)
    ]  # fmt: skip
    return level_answers(level, judge_answers(asked, answers), Speed(1.0, SPEEDS[level], 1.0))


FAULTY = {
    "drops an argument in 3% of calls": (CALLS, call, lambda n: call(n, whole=n % 33 > 0), "missing argument"),
    "loops after 200 words": (STORIES, story, lambda n: story(n, loops_after=200 if n < 12 else None), "loop"),
    "thinks without an end": (STORIES, thought, lambda n: thought(n, ends=n >= 10), "unfinished thought"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_level_with_a_fault_is_named_and_loses_the_tier(name):
    asked, good, bad, fault = FAULTY[name]
    tags = {one.id: one.tags for one in asked.inputs}
    reference = answered("F16", asked, good)
    whole, broken = (compare(reference, answered("Q2_K", asked, reply), asked) for reply in (good, bad))

    def decided(faulty):
        found = {level: broken if level == faulty else whole for level in SIZES if level != "F16"}
        results = [
            dataclasses.replace(one, level=level, decode_tokens_per_s=float(SPEEDS[level]))
            for level, one in found.items()
        ]
        return decide(plan(), fidelities(), results, reference="F16", tags=tags), {one.level: one for one in results}

    sound, results = decided(None)
    assert (sound.quality, sound.speed) == ("Q6_K", "Q4_K_M")
    assert all(one.faults == () for one in results.values())
    for level, left in (("Q4_K_M", ("Q6_K", "Q5_K_M")), ("Q6_K", ("Q8_0", "Q4_K_M"))):
        decision, results = decided(level)
        assert (decision.quality, decision.speed) == left
        verdict = next(one for one in decision.verdicts if one.level == level)
        assert verdict.status == "fails the bar"
        assert verdict.reason.startswith(fault)
        alone = dataclasses.replace(decision, verdicts=(verdict,))
        assert gate_exit(alone) == 4
    found = results["Q6_K"]
    count = next(one for one in found.faults if one.fault == fault)
    assert (count.reference, count.vanished, count.level) == (0, (), len(count.appeared))
    assert count.low < count.level / count.answers < count.high
    assert from_json(WorkloadResult, json.loads(json.dumps(to_json(found)))) == found
    notes = behaviour_notes(found, tags)
    assert notes[0].startswith(fault)
    assert "(long " in "; ".join(notes)


def test_a_loop_says_where_it_begins_and_repetition_grows_along_the_answer():
    reference = answered("F16", STORIES, story)
    looping = answered("Q2_K", STORIES, lambda n: story(n, loops_after=200))
    found = compare(reference, looping, STORIES)
    assert 200 <= found.faults[0].begins <= 204
    assert found.lost == ()  # the criteria see nothing of it
    assert found.repetition[:4] == (0.0,) * 4
    assert found.repetition[4] > 0.9
    assert found.reference_repetition == (0.0,) * 6
    assert "from word 200 on" in "; ".join(behaviour_notes(found, {}))
    short = compare(answered("F16", STORIES, lambda n: story(n, words=60)), looping, STORIES)
    assert len(short.reference_repetition) == 1


def test_thoughts_are_counted_beside_the_references():
    reference = answered("F16", STORIES, thought)
    level = answered("Q2_K", STORIES, lambda n: thought(n, ends=n >= 2))
    found = compare(reference, level, STORIES).thinking
    assert (found.thoughts, found.unfinished, found.looping, found.reference_tokens) == (25, 2, 2, 9)
    assert found.tokens == pytest.approx((2 * 200 + 23 * 9) / 25)
    assert compare(answered("F16", STORIES, story), answered("Q2_K", STORIES, story), STORIES).thinking is None


def test_a_tag_of_the_bar_sees_the_faults_of_its_inputs_alone():
    reference = answered("F16", STORIES, story)
    level = answered("Q4_K_M", STORIES, lambda n: story(n, loops_after=200 if n < 12 else None))
    results = [compare(reference, level, STORIES)]
    tags = {one.id: one.tags for one in STORIES.inputs}
    for tag, status in (("long", "fails the bar"), ("short", "both tiers")):
        bar = f"{tag}: no known loss"
        decision = decide(plan(levels=("F16", "Q4_K_M")), fidelities(), results, bar=bar, reference="F16", tags=tags)
        assert next(one.status for one in decision.verdicts if one.level == "Q4_K_M") == status


def test_answers_without_any_of_it_leave_the_record_as_it_was():
    plain = to_json(
        compare(
            answered("F16", STORIES, lambda n: {"text": "w1"}),
            answered("Q2_K", STORIES, lambda n: {"text": "w1"}),
            STORIES,
        )
    )
    assert not {"faults", "thinking", "repetition", "reference_repetition", "differences"} & set(plain)
    answer = to_json(answered("F16", STORIES, lambda n: {"text": "w1"}).answers[0])
    assert not {"thought", "thought_tokens", "calls", "earlier"} & set(answer)


# ---- error rates, by simulation of counts


def fault_count(fault, appeared, vanished):
    names = [f"i{n}" for n in range(appeared + vanished)]
    return FaultCount(fault, 25, appeared, vanished, tuple(names[:appeared]), tuple(names[appeared:]), 1.0)


def faulty_levels(faults_of, rng):
    """Which levels of a ladder are said to have a fault; ``faults_of`` draws those of a level."""
    results = [dataclasses.replace(result(level), faults=faults_of(level, rng)) for level in SIZES]
    evidence = LadderEvidence(plan().levels, fidelities(), results, {}, {})
    judged = judged_levels(evidence, parse_bar(DEFAULT_BAR), "F16")
    return {one.level for one in judged if one.evidence.known_faults}


KINDS = (LOOP, UNFINISHED, "wrong argument")


def by_chance(level, rng):
    drawn = rng.binomial(25, 0.15, size=(3, 2))
    return tuple(fault_count(name, *map(int, pair)) for name, pair in zip(KINDS, drawn, strict=True))


def test_chance_alone_costs_a_ladder_a_level_in_five_of_a_hundred_at_most():
    rng = np.random.default_rng(1)
    share = np.mean([bool(faulty_levels(by_chance, rng)) for _ in range(400)])
    assert share <= 0.05 + 1.65 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize(("calls", "dropped", "power"), [(400, 0.03, 0.75), (200, 0.03, 0.4), (100, 0.15, 0.95)])
def test_how_often_dropped_arguments_are_found(calls, dropped, power):
    """Beside a noise of one call in 200 either way, at every level."""

    def drawn(level, rng):
        share = dropped if level == "Q4_K_M" else 0.0
        return (
            fault_count("missing argument", int(rng.binomial(calls, share + 0.005)), int(rng.binomial(calls, 0.005))),
        )

    rng = np.random.default_rng(2)
    found = [faulty_levels(drawn, rng) for _ in range(200)]
    assert np.mean(["Q4_K_M" in levels for levels in found]) >= power
    assert np.mean([bool(levels - {"Q4_K_M"}) for levels in found]) <= 0.09


def test_tests_that_can_find_nothing_take_no_part_in_the_correction():
    assert tarone([0.004, 1.0, 1.0, 1.0], [0.004, 0.5, 0.5, 1.0]) == [0.004, 1.0, 1.0, 1.0]
    assert tarone([0.004, 0.02], [0.004, 0.02]) == [0.008, 0.04]
    assert tarone([], []) == []


def test_the_sign_test():
    assert more_often(0, 0) == more_often(0, 9) == 1.0
    assert more_often(8, 0) == pytest.approx(0.5**8)
    assert more_often(3, 2) == pytest.approx(0.5)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_the_interval_of_a_loss_over_repeated_inputs_covers(spread):
    """Inputs whose true losses differ, five answers each: the mean loss lies within in 95 of 100 workloads or more."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        before = rng.uniform(0.5, 1.0, 40)
        after = np.clip(before - spread * (rng.random(40) < 0.2), 0, 1)
        difference = (rng.binomial(5, before) - rng.binomial(5, after)) / 5
        truth = spread * 0.2 if spread < 0.5 else 0.2 * 0.75
        low, high = loss_interval(*repeated_counts(difference.tolist(), 40))
        inside += low <= truth <= high
    assert inside >= 0.93 * 400


def test_the_interval_of_repeated_inputs_is_no_narrower_than_what_they_can_tell():
    assert loss_interval(*repeated_counts([], 25)) == loss_interval(0, 0, 25)
    wide = loss_interval(*repeated_counts([1.0] * 3, 25))
    narrow = loss_interval(*repeated_counts([0.2] * 15, 25))
    assert wide[1] - wide[0] > narrow[1] - narrow[0]
    assert loss_interval(*repeated_counts([0.2], 25))[1] > 0.1  # one small loss does not rule out a large one
