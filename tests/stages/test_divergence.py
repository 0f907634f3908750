"""Where answers part, and what changed in their words."""

import math

import pytest

from bitladder.describe.criteria import KINDS
from bitladder.describe.workload import Criterion, Input, Workload
from bitladder.engines.base import TokenChoice
from bitladder.errors import BadInput
from bitladder.records.evaluation import Alternative, Answer, AnswerToken
from bitladder.stages.divergence import diverge
from bitladder.stages.wording import degeneration, substitutions, wording_changes, words

ONE = Input("i", ({"role": "user", "content": "?"},), ())
PROMPT = [100, 101]


def answer(text="", tokens=(), name="i"):
    return Answer(name, text, True, "", "stop", 2, len(tokens), tokens=tuple(tokens))


def token(token_id, other=None, p=0.9, q=0.05):
    top = (Alternative(token_id, math.log(p)),)
    top += (Alternative(other, math.log(q)),) if other else ()
    return AnswerToken(token_id, math.log(p), f"t{token_id}", top)


class FakeLevel:
    """Follows the reference except at some places: ``{position: (token, its probability, the reference token's)}``."""

    def __init__(self, said, departs):
        self.said, self.departs, self.requests = said, departs, 0

    def render(self, messages):
        return "prompt"

    def tokenize(self, text, add_special):
        return PROMPT

    def continue_tokens(self, tokens, *, max_tokens, top):
        self.requests += 1
        start = len(tokens) - len(PROMPT)
        assert tokens[len(PROMPT) :] == self.said[:start]
        choices = []
        for place in range(start, start + max_tokens):
            expected = self.said[place]
            if place in self.departs:
                other, p, q = self.departs[place]
                tops = (
                    TokenChoice(f"t{other}", math.log(p), other),
                    TokenChoice(f"t{expected}", math.log(q), expected),
                )
                return [*choices, TokenChoice(f"t{other}", math.log(p), other, tops), TokenChoice("later", -1.0, 999)]
            choices.append(TokenChoice(f"t{expected}", -0.1, expected))
        return choices


SAID = [1, 2, 3, 4, 5, 6]


def test_the_same_words_are_identical():
    level = FakeLevel(SAID, {})
    found = diverge(level, ONE, answer(tokens=[token(one) for one in SAID]))
    assert (found.kind, found.departures, found.compared_tokens, found.complete) == ("identical", (), 6, True)
    assert level.requests == 1


def test_a_tie_is_told_from_damage():
    reference = [token(1), token(2), token(3, other=9, p=0.4, q=0.35), token(4), token(5), token(6)]
    tie = diverge(FakeLevel(SAID, {2: (9, 0.42, 0.38)}), ONE, answer(tokens=reference))
    assert tie.kind == "tie-break"
    (place,) = tie.departures
    assert (place.position, place.reference_token, place.level_token) == (2, "t3", "t9")
    assert [math.exp(p) for p in (place.reference_logprob, place.reference_logprob_of_level)] == pytest.approx(
        [0.4, 0.35]
    )
    assert [math.exp(p) for p in (place.level_logprob, place.level_logprob_of_reference)] == pytest.approx([0.42, 0.38])
    sure = diverge(FakeLevel(SAID, {2: (9, 0.7, 0.1)}), ONE, answer(tokens=reference))
    assert sure.kind == "diverged"
    reference[2] = token(3, other=9, p=0.8, q=0.1)
    assert diverge(FakeLevel(SAID, {2: (9, 0.42, 0.38)}), ONE, answer(tokens=reference)).kind == "diverged"


def test_it_is_put_back_on_the_references_words_each_time():
    level = FakeLevel(SAID, {0: (9, 0.4, 0.4), 3: (8, 0.9, 0.01), 5: (7, 0.5, 0.4)})
    found = diverge(level, ONE, answer(tokens=[token(one) for one in SAID]))
    assert [each.position for each in found.departures] == [0, 3, 5]
    assert found.complete
    assert level.requests == 3
    assert math.isnan(found.departures[0].reference_logprob_of_level)  # not among the reference's likely tokens
    assert not found.departures[0].tie


def test_the_search_has_a_limit():
    departs = dict.fromkeys(range(6), (9, 0.9, 0.01))
    found = diverge(FakeLevel(SAID, departs), ONE, answer(tokens=[token(one) for one in SAID]), most=2)
    assert (len(found.departures), found.compared_tokens, found.complete) == (2, 2, False)


def test_a_reference_without_tokens_cannot_be_followed():
    with pytest.raises(BadInput, match="carries no tokens"):
        diverge(FakeLevel(SAID, {}), ONE, answer("text"))


def test_words():
    assert words("Don't pay 1,250.50 euros-now (ever).") == [
        "Don't",
        "pay",
        "1,250.50",
        "euros-now",
        "(",
        "ever",
        ")",
        ".",
    ]


def test_substitutions():
    before = "The tenant shall pay 100 euros at once."
    assert substitutions(before, "The tenant will pay 120 euros.") == [
        ("shall", "will"),
        ("100", "120"),
        ("at once", ""),
    ]
    assert substitutions(before, before) == []
    assert substitutions("a b", "a new b") == [("", "new")]


def test_wording_changes_are_summed_over_the_workload():
    items = (Criterion("set_recall", KINDS["set_recall"].parse([["unlimited", "without limit"], "penalty"])),)
    workload = Workload(
        "w", (Input("a", (), items), Input("b", (), items), Input("c", (), items), Input("d", (), items))
    )
    before = {"a": "It shall pay. A penalty, unlimited.", "b": "He shall go 5 miles.", "c": '{"n": 1}', "d": "same"}
    after = {"a": "It will pay. Without limit.", "b": "He will go 6 miles.", "c": '{"n": 1', "d": "same"}
    changes = wording_changes(
        workload, *[[answer(text, name=name) for name, text in side.items()] for side in (before, after)]
    )
    assert (changes.answers, changes.changed_answers) == (4, 3)
    assert (changes.substitutions[0].before, changes.substitutions[0].after, changes.substitutions[0].count) == (
        "shall",
        "will",
        2,
    )
    assert changes.changed_numbers == ("b",)
    assert changes.broken_format == ("c",)
    assert (changes.missing_items, changes.reference_items) == ((("a", "penalty"),), 2)


def test_degeneration():
    fresh = " ".join(f"word{n}" for n in range(40))
    looping = " ".join([f"word{n}" for n in range(10)] + ["round and"] * 15)
    healthy = degeneration([answer(fresh)])
    assert (healthy.distinct_1, healthy.distinct_4, healthy.repeated_share, healthy.looping) == (1.0, 1.0, 0.0, ())
    sick = degeneration([answer(looping, name="sick"), answer(fresh, name="well")])
    assert sick.looping == ("sick",)
    assert sick.distinct_1 == pytest.approx((12 / 40 + 1) / 2)
    assert sick.repeated_share == pytest.approx(28 / 40 / 2)
    assert degeneration([answer(fresh + " once more once more")]).looping == ()  # said twice is no loop yet
    assert degeneration([answer("too short")]).answers == 0
    assert math.isnan(degeneration([answer("too short")]).distinct_2)
