"""A workload through an engine: slots, resuming, judging, comparing. The engine is a function."""

import contextlib
import json
import math
import threading
import time

import pytest

from bitladder.describe.criteria import KINDS, Context, Mark
from bitladder.describe.workload import Criterion, Input, Workload, question_hash
from bitladder.engines.base import Completion, TokenChoice
from bitladder.errors import EngineGone, UsageError
from bitladder.plan.gate import search_exit
from bitladder.records import to_json
from bitladder.records.evaluation import Answer, Speed
from bitladder.records.reading import from_json
from bitladder.stages.criteria_help import criteria_help
from bitladder.stages.evaluate import answer_workload, check_help, compare, judge_answers, level_answers, measure_speed
from bitladder.stages.smallest import margin_of, smallest_level

SPEED = Speed(100.0, 10.0, 1.0)


class FakeEngine:
    """Answers by a function of the last message and the seed, after a moment."""

    name = "fake"

    def __init__(self, answer, parallel=2, seconds=0.0):
        self.answer, self.parallel, self.seconds = answer, parallel, seconds
        self.asked, self.in_flight, self.most = [], 0, 0
        self.lock = threading.Lock()

    def chat(self, chat):
        with self.lock:
            self.asked.append((chat.messages[-1]["content"], chat.max_tokens))
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
        time.sleep(self.seconds)
        with self.lock:
            self.in_flight -= 1
        text = self.answer(chat.messages[-1]["content"], chat.seed)
        top = (TokenChoice("a", -0.1, 1), TokenChoice("b", -2.0, 2))
        return Completion(text, "stop", 7, 3, "fake", 0.1, 0.3, (TokenChoice("a", -0.1, 1, top),))

    def close(self):
        pass


def one(name, expected, tags=(), weight=1.0, max_tokens=8):
    criterion = Criterion("exact", KINDS["exact"].parse(expected))
    return Input(name, ({"role": "user", "content": name},), (criterion,), tags, weight, max_tokens)


WORKLOAD = Workload("w", (one("a", "A", ("x",)), one("b", "B", ("x", "y"), max_tokens=64), one("c", "C", ("y",))))


def through(answer, workload=WORKLOAD, reference=None, level="L"):
    answers = answer_workload(FakeEngine(answer), workload)
    return level_answers(level, judge_answers(workload, answers, reference=reference), SPEED)


def test_answers_come_in_the_workloads_order_and_are_judged():
    said = through(lambda prompt, seed: {"a": "A", "b": "nope", "c": "C"}[prompt])
    assert [(answer.input_id, answer.passed) for answer in said.answers] == [("a", True), ("b", False), ("c", True)]
    assert said.answers[1].detail == "expected 'B'"
    assert said.answers[0].prompt_tokens == 7


def test_slots_are_kept_full_and_the_longest_goes_first():
    many = Workload("w", tuple(one(f"i{n}", "A", max_tokens=n + 1) for n in range(12)))
    engine = FakeEngine(lambda prompt, seed: "A", parallel=4, seconds=0.01)
    answer_workload(engine, many)
    assert engine.most == 4
    assert {asked[1] for asked in engine.asked[:4]} == {9, 10, 11, 12}


def test_known_answers_are_not_asked_for_again_but_judged_again():
    stored = {}
    answer_workload(
        FakeEngine(lambda prompt, seed: prompt), WORKLOAD, on_answer=lambda a: stored.update({a.question: a})
    )
    stricter = Workload("w", (one("renamed", "a"), *WORKLOAD.inputs[1:]))
    asked_as_before = Input("renamed", WORKLOAD.inputs[0].messages, stricter.inputs[0].criteria, max_tokens=8)
    stricter = Workload("w", (asked_as_before, *WORKLOAD.inputs[1:]))
    engine = FakeEngine(lambda prompt, seed: "never asked")
    answers = judge_answers(stricter, answer_workload(engine, stricter, known=stored))
    assert engine.asked == []
    assert (answers[0].input_id, answers[0].text, answers[0].passed) == ("renamed", "a", True)


def test_a_failure_half_way_keeps_what_came_before():
    def answer(prompt, seed):
        if prompt == "a":
            time.sleep(0.1)
            raise EngineGone("it died")
        return prompt

    kept = []
    with pytest.raises(EngineGone, match="it died"):
        answer_workload(FakeEngine(answer, parallel=3), WORKLOAD, on_answer=kept.append)
    assert {answer.input_id for answer in kept} == {"b", "c"}
    known = {answer.question: answer for answer in kept}
    engine = FakeEngine(lambda prompt, seed: prompt)
    assert len(answer_workload(engine, WORKLOAD, known=known)) == 3
    assert [asked[0] for asked in engine.asked] == ["a"]


def test_progress_counts_answers():
    heard = []
    answer_workload(
        FakeEngine(lambda p, s: p), WORKLOAD, progress=lambda what, done, total: heard.append((done, total))
    )
    assert heard == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_comparing_pair_by_pair():
    reference = through(lambda prompt, seed: prompt.upper())
    level = through(lambda prompt, seed: {"a": "A", "b": "no", "c": "no"}[prompt])
    result = compare(reference, level, WORKLOAD)
    assert (result.passes, result.inputs, result.lost, result.gained) == (1, 3, ("b", "c"), ())
    assert (result.same_answers, result.p_value, result.pass_rate) == (1, 0.5, pytest.approx(1 / 3))
    assert result.pass_low < 1 / 3 < result.pass_high
    assert [(tag.tag, tag.inputs, tag.passes, tag.lost) for tag in result.tags] == [("x", 2, 1, 1), ("y", 2, 0, 2)]
    assert math.isnan(result.smallest_visible_loss)  # three inputs can show nothing at all
    back = compare(level, reference, WORKLOAD)
    assert (back.lost, back.gained) == ((), ("b", "c"))


def test_inputs_without_an_answer_are_left_out():
    reference = through(lambda prompt, seed: prompt.upper())
    part = level_answers("L", reference.answers[:2], SPEED)
    assert compare(reference, part, WORKLOAD).inputs == 2
    nothing = compare(reference, level_answers("L", (), SPEED), WORKLOAD)
    assert nothing.inputs == 0
    assert math.isnan(nothing.pass_rate)
    assert math.isnan(nothing.p_value)


def test_weights_count_in_the_rate():
    heavy = Workload("w", (one("a", "A", weight=3.0), one("b", "B")))
    said = through(lambda prompt, seed: "A", heavy)
    assert compare(said, said, heavy).pass_rate == pytest.approx(0.75)


def test_several_answers_to_each_input():
    sampled = Workload("w", WORKLOAD.inputs, temperature=0.8, samples=4)
    reference = through(lambda prompt, seed: prompt.upper(), sampled)
    level = through(lambda prompt, seed: prompt.upper() if seed < 1 else "no", sampled)
    assert [answer.sample for answer in level.answers] == [0, 1, 2, 3] * 3
    result = compare(reference, level, sampled)
    assert (result.passes, result.inputs, len(result.lost)) == (0, 3, 3)
    assert result.pass_rate == pytest.approx(0.25)
    assert result.p_value == pytest.approx(0.25)  # three equal differences: 2 of 8 sign patterns are as extreme
    half = compare(reference, through(lambda prompt, seed: prompt.upper() if seed < 2 else "no", sampled), sampled)
    assert (half.passes, half.lost, half.pass_rate) == (3, (), pytest.approx(0.5))  # half of the answers is enough


def test_agreement_is_judged_against_the_reference():
    agreeing = Workload(
        "w",
        (
            Input(
                "a",
                WORKLOAD.inputs[0].messages,
                (Criterion("agrees_with_reference", {"metric": "same", "at_least": 1}),),
            ),
        ),
    )
    reference = through(lambda prompt, seed: "x", agreeing)
    assert reference.answers[0].passed
    assert not through(lambda prompt, seed: "y", agreeing, reference.answers).answers[0].passed


def test_a_judge_and_functions_reach_the_criteria():
    asking = Workload("w", (Input("a", WORKLOAD.inputs[0].messages, (Criterion("judge", {"rubric": "r"}),)),))
    answers = answer_workload(FakeEngine(lambda prompt, seed: "x"), asking)
    context = Context(judge=lambda *_: Mark(True, "said the judge"))
    assert judge_answers(asking, answers, context=context)[0].detail == "said the judge"
    with pytest.raises(UsageError, match="asks a judge model, and none was named"):
        judge_answers(asking, answers)
    own = Workload("w", (Input("a", WORKLOAD.inputs[0].messages, (Criterion("python", "m:f"),)),))
    with pytest.raises(UsageError, match="runs Python code of its own: m:f"):
        check_help(own)


def test_answers_survive_their_json():
    answers = through(lambda prompt, seed: "A").answers
    assert from_json(tuple[Answer, ...], json.loads(json.dumps(to_json(answers)))) == answers
    assert answers[0].question == question_hash(WORKLOAD.inputs[0], 0.0, 0)
    assert answers[0].tokens[0].top[1].logprob == -2.0


def test_speed_of_an_engine_that_only_streams():
    engine = FakeEngine(lambda prompt, seed: "A")
    speed = measure_speed(engine)
    assert speed.prefill_tokens_per_s == pytest.approx(70.0)
    assert speed.decode_tokens_per_s == pytest.approx(2 / 0.2)
    assert math.isnan(speed.load_seconds)
    assert len({prompt for prompt, _ in engine.asked}) == len(engine.asked)  # no cache can serve a prompt


def test_the_smallest_level_starts_each_engine_once_and_asks_only_a_part():
    many = Workload("w", tuple(one(f"i{n}", f"I{n}") for n in range(300)))
    reference = through(lambda prompt, seed: prompt.upper(), many).answers
    started, running, heard = [], [], []

    @contextlib.contextmanager
    def open_engine(level):
        started.append(level)
        running.append(level)
        assert len(running) == 1  # one engine at a time
        yield FakeEngine(lambda prompt, seed: prompt.upper() if level != "Q2_K" else "damaged")
        running.remove(level)

    outcome = smallest_level(
        ["Q8_0", "Q4_K_M", "Q2_K"],
        many,
        reference,
        open_engine,
        margin=0.05,
        on_answer=lambda level, answer: heard.append(level),
    )
    assert outcome.chosen == "Q4_K_M"
    assert started == ["Q4_K_M", "Q2_K"]
    assert running == []
    assert len(heard) == sum(outcome.inputs_used) < 2 * 300 * 0.6


def test_what_criteria_need_is_opened_and_checked_first(tmp_path):
    (tmp_path / "my_helper_of_this_test.py").write_text("def f(text, info):\n    return text == info['id']\n")
    own = Workload("w", (Input("a", WORKLOAD.inputs[0].messages, (Criterion("python", "my_helper_of_this_test:f"),)),))
    with criteria_help(own, tmp_path, trust_python=True) as context:
        answers = answer_workload(FakeEngine(lambda prompt, seed: "a"), own)
        assert judge_answers(own, answers, context=context)[0].passed
    judged = Workload("w", (Input("a", WORKLOAD.inputs[0].messages, (Criterion("judge", {"rubric": "r"}),)),))
    with pytest.raises(UsageError, match="asks a judge model"), criteria_help(judged, tmp_path):
        pass


def test_a_search_takes_one_bar_on_passes_only():
    assert margin_of("passes >= reference - 4 points") == pytest.approx(0.04)
    for bar in (
        "kl < 0.1",
        "no loss",
        "passes >= 80%",
        "passes >= reference",
        "passes >= reference - 4 points and kl < 1",
    ):
        with pytest.raises(UsageError, match="bar on passes alone"):
            margin_of(bar)
    assert [search_exit("Q4_K_M", decided=True), search_exit(None, decided=True)] == [0, 4]
    assert [search_exit("Q4_K_M", decided=False), search_exit(None, decided=False)] == [5, 5]


def test_a_search_does_not_ask_again_what_is_stored():
    many = Workload("w", tuple(one(f"i{n}", f"I{n}") for n in range(40)))
    reference = through(lambda prompt, seed: prompt.upper(), many).answers
    stored = {answer.question: answer for answer in reference}
    engine = FakeEngine(lambda prompt, seed: "never asked")
    outcome = smallest_level(
        ["Q8_0"], many, reference, lambda _: contextlib.nullcontext(engine), margin=0.3, known=lambda _: stored
    )
    assert outcome.chosen == "Q8_0"
    assert engine.asked == []
