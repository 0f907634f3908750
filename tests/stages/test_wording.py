"""What changed in the words of answers."""

from bitladder.describe.criteria import KINDS
from bitladder.describe.workload import Criterion, Input, Workload
from bitladder.records.evaluation import Answer
from bitladder.stages.wording import substitutions, wording_changes, words


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
