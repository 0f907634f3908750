"""Criteria: each kind as a table of answers that pass and fail."""

import pytest

from bitladder.describe.criteria import KINDS, Context, Mark, extract_json, found_items, judge, normal, numbers
from bitladder.describe.workload import Criterion, Input


def outcome(kind, value, text, context=None):
    criterion = Criterion(kind, KINDS[kind].parse(value))
    return judge(Input("i", ({"role": "user", "content": "?"},), (criterion,)), text, context)


CASES = [
    ("exact", "Paris", " Paris\n", True),
    ("exact", "Paris", "paris", False),
    ("exact", "Paris", "Paris.", False),
    ("one_of", "yes", '"Yes."', True),
    ("one_of", ["a", "b"], "B!", True),
    ("one_of", ["no"], "not", False),
    ("contains_all", ["Paris"], "It is PARIS, of course.", True),
    ("contains_all", "no", "I know", False),
    ("contains_all", ["New York"], "in New\n York", True),
    ("contains_all", ["a.b"], "axb", False),
    ("contains_all", ["C++"], "I write C++.", True),
    ("contains_all", ["one", "two"], "one", False),
    ("contains_any", ["rain", "sun"], "against the sun", True),
    ("contains_any", ["rain", "sun"], "against the sunlight", False),
    ("contains_none", ["cat"], "concatenate", True),
    ("contains_none", ["cat"], "A cat.", False),
    ("regex", r"^\d{3}$", "123", True),
    ("regex", r"^\d{3}$", "1234", False),
    ("number", 5, "2 + 3 = 5", True),
    ("number", 5, "5 is what 2 + 2 is not", False),
    ("number", {"value": 5, "which": "first"}, "5 is what 2 + 2 is not", True),
    ("number", {"value": 2, "which": "any"}, "5 is what 2 + 2 is not", True),
    ("number", 1250, "It costs $1,250.00.", True),
    ("number", -3, "−3", True),
    ("number", {"value": 100, "tolerance": 2}, "about 98.5 degrees", True),
    ("number", {"value": 100, "relative": 0.01}, "98.5", False),
    ("number", 5, "five", False),
    ("number", 25, "25%", True),
    ("json_schema", {"type": "object", "required": ["a"]}, '{"a": 1}', True),
    ("json_schema", {"type": "object", "required": ["a"]}, 'Here:\n```json\n{"a": 1}\n```\n', True),
    ("json_schema", {"type": "object", "required": ["a"]}, '{"b": 1}', False),
    ("json_schema", {"type": "object"}, "{'a': 1}", False),
    ("json_schema", {"$ref": "https://schemas.invalid/x"}, "{}", False),
    ("set_recall", ["a", "b"], "B and a", True),
    ("set_recall", ["a", "b"], "only a", False),
    ("set_recall", {"items": [["unlimited", "without limit"], "b"], "at_least": 0.5}, "liable without limit", True),
    ("max_words", 3, "one two three", True),
    ("max_words", 3, "one two three four", False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "text", "passes"), CASES)
def test_kinds(kind, value, text, passes):
    assert outcome(kind, value, text).passed is passes


def test_every_kind_that_needs_no_help_is_in_the_table():
    helped = {name for name, kind in KINDS.items() if kind.ask}
    assert {case[0] for case in CASES} == set(KINDS) - helped - {"similarity"}


DETAILS = [
    ("exact", "Paris", "Rome", "expected 'Paris'"),
    ("contains_all", ["a", "b"], "a", "lacks 'b'"),
    ("number", 5, "7", "7, expected 5"),
    ("set_recall", ["a", "b", "c"], "a", "found 1 of 3; missing 'b', 'c'"),
    ("json_schema", {"properties": {"n": {"type": "integer"}}}, '{"n": "x"}', "at $.n: 'x' is not of type 'integer'"),
]


@pytest.mark.parametrize(("kind", "value", "text", "detail"), DETAILS)
def test_the_reason_names_what_is_missing(kind, value, text, detail):
    assert outcome(kind, value, text) == Mark(False, detail)


def test_all_criteria_must_hold():
    criteria = tuple(
        Criterion(kind, KINDS[kind].parse(value)) for kind, value in {"contains_all": "a", "max_words": 1}.items()
    )
    one = Input("i", (), criteria)
    assert judge(one, "a").passed
    assert judge(one, "a b") == Mark(False, "2 words, at most 1 allowed")


def test_agreement_with_the_reference():
    assert outcome("agrees_with_reference", True, "x", Context(reference=None)).passed
    assert outcome("agrees_with_reference", True, "x ", Context(reference="x")).passed
    assert outcome("agrees_with_reference", True, "x", Context(reference="y")) == Mark(False, "the reference says 'y'")


def test_own_function_and_judge_get_what_they_need():
    context = Context(
        reference="r",
        functions={"m:f": lambda text, info: (text == info["reference"], info["id"])},
        judge=lambda one, value, answer, reference: Mark(True, f"{one.id} {value['rubric']} {answer} {reference}"),
    )
    assert outcome("python", "m:f", "r", context) == Mark(True, "i")
    assert outcome("judge", "be kind", "a", context) == Mark(True, "i be kind a r")
    with pytest.raises(ValueError, match="a judge is needed"):
        outcome("judge", "be kind", "a")


def test_found_items_go_by_their_first_wording():
    criterion = Criterion("set_recall", KINDS["set_recall"].parse([["unlimited", "without limit"], "b"]))
    assert found_items(criterion, "liable without limit") == ("unlimited",)


def test_numbers_in_a_text():
    assert numbers("1,250.5 and -3, 2e3; v1.2.3, A4 and 50%.") == [1250.5, -3.0, 2000.0, 50.0]


def test_normal_form():
    assert normal('  "Yes,  sir."\n') == "yes, sir"


def test_two_fences_are_no_single_answer():
    with pytest.raises(ValueError, match="Expecting value"):
        extract_json("```json\n{}\n```\nor\n```json\n[]\n```\n")


def test_similarity_by_the_libraries_that_define_it():
    pytest.importorskip("sacrebleu", reason="needs the extra 'similarity'")
    pytest.importorskip("rouge_score", reason="needs the extra 'similarity'")
    assert outcome("similarity", {"to": "the cat sat", "at_least": 1.0}, "the cat sat").passed
    # rouge-score 0.1.2: the longest common subsequence has 2 of 3 and 2 of 2 words, F = 0.8
    assert outcome("similarity", {"to": "the cat sat", "metric": "rouge_l", "at_least": 0.79}, "the cat").passed
    assert not outcome("similarity", {"to": "the cat sat", "metric": "rouge_l", "at_least": 0.81}, "the cat").passed
