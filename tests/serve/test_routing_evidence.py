"""What the evidence says about `auto`: calibration, held-out halves, similarity, advice."""

import math
import timeit

import numpy as np
import pytest

from bitladder.records.evaluation import Answer, LevelAnswers, Speed
from bitladder.records.run import InputFacts
from bitladder.serve.escalation import (
    ScoredInput,
    calibrate,
    is_sure,
    logprobs_of,
    outcome,
    score,
)
from bitladder.serve.evidence import (
    HeldOut,
    RoutedInput,
    advise,
    agreement_bar,
    by_escalation,
    by_tag,
    held_out,
    routed_inputs,
    tag_table,
)
from bitladder.serve.router import Features, TagEvidence, choose
from bitladder.serve.similarity import Similarity


def scored(value: float, *, speed: bool, quality: bool = True) -> ScoredInput:
    return ScoredInput(value, speed, quality, 1.0, 2.0)


def test_score_is_the_least_sure_token_of_the_window():
    assert score([-0.1, -2.0, -0.5]) == -2.0
    assert score([-0.1, -2.0, -0.5], window=1) == -0.1
    assert math.isnan(score([]))
    assert not is_sure(math.nan, -math.inf)
    assert is_sure(-1.0, -1.0) and not is_sure(-1.01, -1.0)


def test_calibration_separates_what_can_be_separated():
    inputs = [scored(-0.1, speed=True)] * 8 + [scored(-3.0, speed=False)] * 2
    found = calibrate(inputs)
    assert found.threshold == pytest.approx(-1.55)
    assert (found.escalated, found.recovered, found.extra_cost) == pytest.approx((0.2, 1.0, 0.4))
    assert not found.pays  # 40% more is too much: it says so


def test_calibration_that_pays():
    inputs = [scored(-0.1, speed=True)] * 19 + [scored(-3.0, speed=False)]
    assert calibrate(inputs).pays


def test_without_a_loss_nothing_is_escalated_and_nothing_is_claimed():
    found = calibrate([scored(-0.1, speed=True), scored(-5.0, speed=True)])
    assert (found.threshold, found.escalated) == (-math.inf, 0.0)
    assert math.isnan(found.recovered) and not found.pays


def test_losses_among_the_surest_answers_need_everything_escalated():
    inputs = [scored(-0.1, speed=False), scored(-5.0, speed=True), scored(-6.0, speed=True)]
    assert calibrate(inputs).threshold == math.inf


def test_what_quality_loses_counts_against_escalation():
    inputs = [scored(-3.0, speed=False), scored(-3.0, speed=True, quality=False), scored(-0.1, speed=False)]
    assert outcome(inputs, -1.0).recovered == 0.0


def test_log_probabilities_of_both_apis():
    chat = {"choices": [{"logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1}]}}]}
    completion = {"choices": [{"logprobs": {"token_logprobs": [None, -2.0]}}, {"logprobs": None}]}
    assert logprobs_of(chat) == [-0.5, -1]
    assert logprobs_of(completion) == [-2.0]
    assert logprobs_of({"choices": []}) == []


def item(number: int, tag: str, *, speed: bool, quality: bool = True, value: float = math.nan) -> RoutedInput:
    prompt = f"{tag}: please handle case number {number} of kind {tag}"
    return RoutedInput(f"{tag}{number}", prompt, (tag,), speed, quality, 1.0, 2.0, value)


def test_routing_by_tag_when_one_small_kind_of_work_loses_everything():
    inputs = [item(i, "easy", speed=True) for i in range(40)] + [item(i, "hard", speed=False) for i in range(6)]
    found = held_out(inputs, by_tag, np.random.default_rng(0), twice=False)
    assert found.recovered > 0.95
    assert found.extra_cost == pytest.approx(6 / 46, abs=0.03)
    advice = advise(inputs, np.random.default_rng(0))
    assert advice.sentence.startswith("Routing pays: on held-out halves, routing by tags recovers")
    assert advice.rule.tags == {"easy": TagEvidence(40, 0), "hard": TagEvidence(6, 6)}
    assert not advice.rule.fixed


def test_a_loss_spread_at_random_is_not_claimed_to_be_recovered():
    chance = np.random.default_rng(1)
    lost = set(chance.choice(48, 6, replace=False).tolist())
    inputs = [item(i, "abcdef"[i % 6], speed=i not in lost) for i in range(48)]
    advice = advise(inputs, np.random.default_rng(0))
    assert advice.by_tag is not None and not advice.by_tag.pays
    assert advice.sentence.startswith(("Routing cannot reach", "Routing gains nothing"))


def test_escalation_is_used_where_tags_do_not_tell():
    lost = range(0, 96, 16)
    inputs = [
        item(i, "mixed", speed=i not in lost, value=-4 - i / 100 if i in lost else -0.5 - i / 100) for i in range(96)
    ]
    found = held_out(inputs, by_escalation, np.random.default_rng(0), twice=True)
    assert found.pays
    advice = advise(inputs, np.random.default_rng(0))
    assert advice.rule.escalate
    assert "the speed tier's probabilities recovers" in advice.sentence
    assert -4.2 < advice.threshold < -1.0  # the lowest that recovers four fifths


@pytest.mark.parametrize(
    ("inputs", "tier", "words"),
    [
        ([item(i, "a", speed=True) for i in range(5)], "speed", "no loss measured on your 5 inputs"),
        ([RoutedInput(f"{i}", "x", ("a",), i > 0, True, 2.0, 1.0) for i in range(5)], "quality", "saves no time"),
    ],
)
def test_when_routing_gains_nothing_one_tier_is_recommended(inputs, tier, words):
    advice = advise(inputs, np.random.default_rng(0))
    assert advice.rule.fixed == tier
    assert words in advice.sentence and "Routing gains nothing" in advice.sentence


def test_no_evidence_is_no_advice():
    assert advise([], np.random.default_rng(0)).rule.tags == {}


def test_untagged_inputs_have_a_tag_of_their_own():
    assert tag_table([RoutedInput("x", "x", (), False, True, 1, 2)]) == {"untagged": TagEvidence(1, 1)}


def test_answers_of_two_levels_become_routed_inputs():
    def answers(level: str, rate: float, passed: tuple[bool, bool]) -> LevelAnswers:
        given = [Answer(name, "t", good, "", "stop", 100, 50) for name, good in zip("ab", passed, strict=True)]
        return LevelAnswers(level, tuple(given), Speed(1000.0, rate, 1.0))

    facts = [InputFacts(name, "prompt", "exact", ("t",)) for name in "abc"]
    quality, speed = answers("Q8_0", 50.0, (True, True)), answers("Q4_K_M", 100.0, (True, False))
    found = routed_inputs(facts, quality, speed, {"a": -1.5})
    assert [(one.id, one.lost) for one in found] == [("a", False), ("b", True)]
    assert (found[0].speed_s, found[0].quality_s) == pytest.approx((0.6, 1.1))
    assert found[0].score == -1.5 and math.isnan(found[1].score)


def test_shadow_mode_expects_what_the_workload_showed():
    def answers(level: str, texts: str) -> LevelAnswers:
        given = [Answer(str(i), text, True, "", "stop", 1, 1) for i, text in enumerate(texts)]
        return LevelAnswers(level, tuple(given), Speed(1.0, 1.0, 1.0))

    assert agreement_bar(answers("a", "abcdefghij"), answers("b", "abcdefghXX")) == pytest.approx(0.490, abs=0.001)
    assert agreement_bar(answers("a", ""), answers("b", "")) == 0.0


INPUTS = [
    ("capital", "facts", "What is the capital of Australia? Answer with one word."),
    ("river", "facts", "What is the longest river of South America? Answer with one word."),
    ("invoice", "extraction", "Extract the invoice number and total from: Invoice 4411, total 19.99 EUR. JSON only."),
    ("order", "extraction", "Extract the order number and date from: Order 77, placed 3 May. JSON only."),
]


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("What is the capital of Canada? Answer with one word.", "facts"),
        ("Extract the invoice number and total from: Invoice 9, total 3.50 EUR. JSON only.", "extraction"),
        ("Write a sonnet about rust", None),
        ("", None),
        ("\udcff", None),
        ("国の首都はどこですか", None),
    ],
)
def test_similarity_knows_its_kin_and_leaves_strangers(text, tag):
    guess = Similarity(INPUTS).guess(text)
    assert (guess.tag if guess else None) == tag


def test_an_input_resembles_itself_fully_and_the_floor_comes_from_the_workload():
    similar = Similarity(INPUTS)
    guess = similar.guess(INPUTS[2][2])
    assert guess is not None and guess.input_id == "invoice"
    assert guess.similarity == pytest.approx(1.0)
    assert 0.0 < similar.floor < 1.0


def test_one_input_is_no_workload_to_resemble():
    assert Similarity(INPUTS[:1]).guess(INPUTS[0][2]) is None


def test_a_guess_is_quick():
    similar = Similarity([(str(i), "t", f"Question {i} about topic {i % 7}, in two sentences.") for i in range(30)])
    text = "What would you say about topic 3? " * 100
    assert min(timeit.repeat(lambda: similar.guess(text), number=1, repeat=5)) < 0.02


def kind(tag: str, inputs: int, lost: int, gained: int) -> list[RoutedInput]:
    outcomes = [(False, True)] * lost + [(True, False)] * gained + [(True, True)] * (inputs - lost - gained)
    return [
        RoutedInput(f"{tag}-{number}", tag, (tag,), speed, quality, 1.0, 1.4)
        for number, (speed, quality) in enumerate(outcomes)
    ]


def test_in_a_large_workload_every_kind_loses_something_and_only_the_costly_ones_go_to_quality():
    inputs = [*kind("bad", 40, 20, 0), *kind("noisy", 40, 3, 3), *kind("slightly", 40, 2, 0), *kind("fine", 40, 0, 1)]
    assert tag_table(inputs) == {
        "bad": TagEvidence(40, 20),
        "noisy": TagEvidence(40, 3, 3, spared=True),  # as much gained as lost
        "slightly": TagEvidence(40, 2, spared=True),  # the loss is nearly all in "bad"
        "fine": TagEvidence(40, 0, 1),
    }
    assert [tag for tag, seen in tag_table(inputs).items() if seen.needs_quality] == ["bad"]
    advice = advise(inputs, np.random.default_rng(0))
    assert advice.sentence.startswith("Routing pays")
    assert advice.by_tag is not None and advice.by_tag.extra_cost < 0.2  # for everything: 0.4
    choice = choose(Features("auto", tags=("noisy",)), frozenset(), (), advice.rule)
    assert choice is not None
    assert (choice.tier, choice.reason) == ("speed", "auto: tag noisy: the speed tier lost 3 and gained 3 of 40 inputs")


def test_what_was_gained_in_one_kind_of_work_does_not_make_good_what_was_lost_in_another():
    inputs = [*kind("recall", 40, 12, 1), *kind("sorting", 40, 0, 15), *kind("fine", 60, 0, 0)]
    advice = advise(inputs, np.random.default_rng(0))
    assert advice.sentence.startswith(
        "Routing pays: the speed tier passes no fewer of your 140 inputs than the quality tier, and yet"
    )
    assert [tag for tag, seen in advice.rule.tags.items() if seen.needs_quality] == ["recall"]
    assert advice.by_tag is not None
    assert advice.by_tag.gained == pytest.approx(11 / 140, abs=0.005)  # what recall lost net
    assert advice.by_tag.extra_cost == pytest.approx(0.4 * 40 / 140, abs=0.02)


def test_chance_losses_without_a_net_loss_are_no_reason_to_route():
    inputs = [*kind("a", 40, 2, 1), *kind("b", 40, 1, 2), *kind("c", 40, 1, 1), *kind("d", 40, 0, 1)]
    advice = advise(inputs, np.random.default_rng(0))
    assert advice.rule.fixed == "speed"
    assert advice.sentence.startswith(
        "Routing gains nothing: the speed tier passes no fewer of your 160 inputs than the quality tier, and routing by"
    )
    assert "held-out" not in advice.rule.because, "what stands in every answer's header is short"


def test_of_two_ways_that_pay_the_one_that_passes_more_is_used():
    tags, sure = HeldOut(1.5, 0.08, 200, 0.06, 0.02), HeldOut(1.0, 0.03, 200, 0.02, 0.0)
    assert tags.pays and sure.pays
    assert tags.better_than(sure) and not sure.better_than(tags)
    assert HeldOut(1.0, 0.02, 200, 0.02, 0.0).better_than(sure)  # as many, for less
    assert not HeldOut(12.0, 0.06, 200, 0.03, -0.01).pays  # a net loss of two inputs, recovered by chance
