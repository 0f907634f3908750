"""Criteria: each kind as a table of answers that pass and fail."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitladder.describe.criteria import KINDS, Context, Mark, extract_json, found_items, judge
from bitladder.describe.similarity import rouge_l
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
    ("contains_all", ["北京"], "中国的首都是北京。", True),
    ("contains_none", ["抱歉"], "非常抱歉，我不能回答。", False),
    ("contains_all", ["C"], "written in C++", False),
    ("contains_all", [{"text": "ing", "within_words": True}], "PRICING", True),
    ("contains_all", [{"text": "ing", "within_words": True, "same_case": True}], "PRICING", False),
    ("contains_all", [{"text": "USA", "same_case": True}], "the usa", False),
    ("contains_all", [{"text": "USA", "same_case": True}], "the USA.", True),
    ("contains_none", [{"text": "ing", "within_words": True}], "pricing", False),
    ("contains_any", ["a", {"text": "b"}], "B", True),
    ("one_of", ["北京"], "北京。", True),
    ("one_of", ["ja"], "„Ja“.", True),
    ("exact", "café\nx", "cafe\u0301\r\nx\r\n", True),
    ("exact", "don't", "don’t", False),
    ("regex", ["a", "b"], "b and a", True),
    ("regex", ["a", "c"], "b and a", False),
    ("regex", "^yes$", "yes\r\n", True),
    ("regex", "a{e}b", "a{e}b", True),
    ("regex", r"\{x}", "{x}", True),
    ("regex", "é", "e\u0301", True),
    ("number", {"value": 0.5, "locale": "de"}, "0,5", True),
    ("number", {"value": 1234567.5, "locale": "de"}, "1.234.567,5", True),
    ("number", 12, "12km", True),
    ("number", 7, "Q7", True),
    ("number", 2.5e6, "2.5M", True),
    ("number", 2.5, "2.5M", True),
    ("number", 5, "9" * 5000, False),
    ("json_schema", {"type": "number"}, "NaN", False),
    ("json_schema", {"multipleOf": 0.1}, "9" * 400, False),
    ("json_schema", {"multipleOf": 0.1}, "1e400", False),
    ("json_schema", {"type": "array", "uniqueItems": True}, "[1, true, 1.5, [1], {}]", True),
    ("json_schema", {"type": "array", "uniqueItems": True}, '[{"a": 1, "b": 2}, {"b": 2.0, "a": 1}]', False),
    ("json_schema", {"patternProperties": {"^n": {"type": "number"}}}, '{"n1": 1, "x": "y"}', True),
    ("json_schema", {"patternProperties": {"^n": {"type": "number"}}}, '{"n1": "y"}', False),
    ("json_schema", {"pattern": "^a+$"}, '"aab"', False),
    ("json_schema", {"pattern": "^a+$"}, '"aaa"', True),
    ("json_schema", {"type": "object"}, '\ufeff{"a": 1}\r\n', True),
    ("set_recall", [["违约"], ["赔偿"]], "本条款涉及违约责任和赔偿上限。", True),
    ("max_words", 5, "这是一个很长的没有空格的中文句子", False),
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


TREE = {"$defs": {"t": {"type": "object", "properties": {"c": {"$ref": "#/$defs/t"}}}}, "$ref": "#/$defs/t"}
DOUBLING = {
    "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)} | {"d40": {}},
    "$ref": "#/$defs/d0",
}
SLOW_NAMES = {"patternProperties": {"^(a+)+$": {"type": "number"}}, "required": ["z"]}
HOSTILE = {
    "an ordinary pattern": ("regex", r"^(\w+\s?)+\.$", "yes " * 40),
    "a pattern of the attack": ("regex", "^(a+)+$", "a" * 5000 + "!"),
    "a pattern of another": ("regex", "(x+x+)+y", "x" * 5000),
    "a pattern in a schema": ("json_schema", {"pattern": "^(a+)+$"}, '"' + "a" * 400 + '!"'),
    "a pattern of properties": ("json_schema", SLOW_NAMES, '{"' + "a" * 400 + '!": "x"}'),
    "a schema that doubles": ("json_schema", DOUBLING, "{}"),
    "a schema that is itself": ("json_schema", {"$ref": "#"}, "{}"),
    "a deep answer": ("json_schema", TREE, '{"c":' * 400 + "3" + "}" * 400),
    "a deeper answer": ("json_schema", TREE, "[" * 100_000),
    "many items": ("json_schema", {"uniqueItems": True, "maxItems": 1}, json.dumps([{"a": n} for n in range(3000)])),
    "many fences": ("json_schema", {"type": "object"}, "```\n" * 50_000),
    "long similar": ("similarity", {"to": "a b " * 5000, "metric": "rouge_l", "at_least": 1.0}, "b c " * 10_000),
    "long chrf": ("similarity", {"to": "a b", "metric": "chrf", "at_least": 1.0}, "b c " * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_answer_makes_judging_endless(name):
    kind, value, text = HOSTILE[name]
    began = time.process_time()
    assert not outcome(kind, value, text).passed
    assert time.process_time() - began < 20


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


def test_two_fences_are_no_single_answer():
    with pytest.raises(ValueError, match="Expecting value"):
        extract_json("```json\n{}\n```\nor\n```json\n[]\n```\n")


@given(st.text("abcd .,'\n", max_size=60), st.text("abcd .,'\n", max_size=60))
@settings(deadline=None, max_examples=60)
def test_rouge_l_is_that_of_the_library_where_both_read_the_text(one, other):
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs the package rouge-score").RougeScorer(
        ["rougeL"]
    )
    assert rouge_l(one, other) == pytest.approx(scorer.score(other, one)["rougeL"].fmeasure)


def test_rouge_l_reads_every_script():
    assert rouge_l("北京是中国的首都", "北京是首都") == pytest.approx(2 * 5 / 13)
    assert rouge_l("", "a") == rouge_l("a", "") == 0


def test_similarity_by_the_libraries_that_define_it():
    pytest.importorskip("sacrebleu", reason="needs the extra 'similarity'")
    assert outcome("similarity", {"to": "the cat sat", "at_least": 1.0}, "the cat sat").passed
    # rouge-score 0.1.2: the longest common subsequence has 2 of 3 and 2 of 2 words, F = 0.8
    assert outcome("similarity", {"to": "the cat sat", "metric": "rouge_l", "at_least": 0.79}, "the cat").passed
    assert not outcome("similarity", {"to": "the cat sat", "metric": "rouge_l", "at_least": 0.81}, "the cat").passed
