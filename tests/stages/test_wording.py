"""What changed in the words of answers."""

import dataclasses
import math

import pytest

from bitladder.describe.criteria import KINDS
from bitladder.describe.workload import Criterion, Input, Workload
from bitladder.records.evaluation import Alternative, Answer, AnswerToken
from bitladder.stages.wording import first_parting, item_recall, substitutions, wording_changes, words


def answer(text="", name="i"):
    return Answer(name, text, True, "", "stop", 2, 0)


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


FRESH = " ".join(f"word{n}" for n in range(40))
SICK = " ".join([f"word{n}" for n in range(10)] + ["round and"] * 15)


def test_answers_that_end_in_a_loop_where_the_references_do_not_are_named():
    texts = {
        "sick": (FRESH, SICK),
        "cut short": (FRESH, SICK + " round"),
        "both": (SICK, SICK),
        "twice": (FRESH, FRESH + " once more once more"),  # no loop yet
        "short": (FRESH, "no no no no"),
        "well": (SICK, FRESH),
    }
    workload = Workload("w", tuple(Input(name, (), ()) for name in texts))
    before, after = ([answer(pair[side], name) for name, pair in texts.items()] for side in (0, 1))
    assert wording_changes(workload, before, after).looping == ("sick", "cut short")


ITEMS = [f"item{n}" for n in range(10)]


def recall_workload(inputs, **changes):
    criteria = (Criterion("set_recall", KINDS["set_recall"].parse(ITEMS)),)
    return Workload("w", tuple(Input(f"in{n}", (), criteria) for n in range(inputs)), **changes)


def test_item_recall_counts_what_the_reference_catches_and_its_interval_knows_that_inputs_are_few():
    workload = recall_workload(12)
    everything, nine = " ".join(ITEMS), " ".join(ITEMS[:9])
    before = [answer(everything, f"in{n}") for n in range(11)] + [answer("nothing", "in11")]
    spread = [answer(nine if n < 5 else everything, f"in{n}") for n in range(11)] + [answer(everything, "in11")]
    items, kept, rate = item_recall(workload, before, spread)
    assert (items, kept) == (110, 105), "what only the level catches does not count"
    assert rate.value == pytest.approx(105 / 110)
    assert rate.low < 105 / 110 < rate.high < 1
    gone = [answer("nothing" if n == 0 else everything, f"in{n}") for n in range(11)]
    items, kept, heaped = item_recall(workload, before[:11], gone)
    assert (items, kept) == (110, 100)
    one_by_one = [answer(nine if n < 10 else everything, f"in{n}") for n in range(11)]
    same = item_recall(workload, before[:11], one_by_one)[2]
    assert same.value == heaped.value
    assert heaped.high - heaped.low > 2 * (same.high - same.low), "ten items of one input are one piece of evidence"
    perfect = item_recall(workload, before[:11], before[:11])[2]
    assert perfect.low == pytest.approx(11 / (11 + 1.96**2), abs=1e-3), "eleven inputs, not 110 items"
    assert item_recall(workload, [], before)[:2] == (0, 0)
    assert math.isnan(item_recall(workload, [], before)[2].value)


def token(number, text, chance, **others):
    top = tuple(Alternative(int(name[1:]), math.log(other)) for name, other in others.items())
    return AnswerToken(number, math.log(chance), text, top)


def test_where_two_answers_part_with_all_four_probabilities():
    before = [token(1, "the", 0.9), token(2, " fee", 0.8, t2=0.8, t3=0.15), token(9, "", 1.0)]
    after = [token(1, "the", 0.9), token(3, " sum", 0.6, t3=0.6, t2=0.35), token(7, " of", 1.0)]
    place = first_parting(before, after)
    assert (place.index, place.token_a, place.token_b) == (1, " fee", " sum")
    assert (place.a_of_a, place.a_of_b, place.b_of_a, place.b_of_b) == pytest.approx((0.8, 0.15, 0.35, 0.6))
    assert not place.is_tie
    tie = first_parting([token(2, "a", 0.5, t3=0.4)], [token(3, "b", 0.5, t2=0.45)])
    assert tie.is_tie
    unlisted = first_parting([token(2, "a", 0.9)], [token(3, "b", 0.9)])
    assert math.isnan(unlisted.a_of_b) and not unlisted.is_tie
    assert first_parting(before, before) is None
    assert first_parting(before[:1], before) is None, "one is the beginning of the other"
    assert first_parting([], after) is None
    assert first_parting([token(1, "the", 0.9), token(2, "x", 0.9)], [token(2, "the", 0.9), token(3, "x", 0.9)]) is None
    half = [token(1, "\ufffd", 0.9), token(5, "a", 0.9)], [token(1, "\u00e9", 0.9), token(6, "b", 0.9)]
    assert first_parting(*half).index == 1, "half a character is no other vocabulary"


def test_every_workload_says_where_its_answers_part():
    one = Input("a", (), ())
    before = dataclasses.replace(answer("the fee", "a"), tokens=(token(1, "the", 0.9), token(2, " fee", 0.8)))
    after = dataclasses.replace(answer("the sum", "a"), tokens=(token(1, "the", 0.9), token(3, " sum", 0.7)))
    assert wording_changes(Workload("w", (one,)), [before], [after]).partings["a"].index == 1
    sampled = Workload("w", (one,), temperature=0.7)
    assert wording_changes(sampled, [before], [after]).partings == {}, "chance, not the level, chose"
