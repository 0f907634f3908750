"""Wanted calls against made ones: numbers, schemas, any order, none, and whatever a model may write."""

import json
from typing import NamedTuple

import pytest

from bitladder.describe import tool_calls
from bitladder.describe.tool_calls import judged_calls, read_tools, same_value, wanted_calls


class Made(NamedTuple):
    name: str
    arguments: str


def call(tool, /, **arguments):
    return Made(tool, json.dumps(arguments))


WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
        "required": ["city"],
    },
}
TOOLS = read_tools([WEATHER, {"type": "function", "function": {"name": "clock"}}])
PARIS = {"name": "weather", "arguments": {"city": "Paris", "days": 3}}

CASES = {
    "by its name": ("clock", [call("clock")], ""),
    "no arguments at all": ("clock", [Made("clock", "")], ""),
    "its values, among others": (
        {**PARIS, "arguments": {"city": "Paris"}},
        [call("weather", city="Paris", days=2)],
        "",
    ),
    "a number as a number": (PARIS, [call("weather", city="Paris", days=3.0)], ""),
    "a number in quotes": (PARIS, [call("weather", city="Paris", days="3")], tool_calls.WRONG),
    "true is no number": (
        {"name": "weather", "arguments": {"days": 1}},
        [call("weather", city="Oslo", days=True)],
        tool_calls.WRONG,
    ),
    "white space around a text": (PARIS, [call("weather", city=" Paris\n", days=3)], ""),
    "another value": (PARIS, [call("weather", city="Lyon", days=3)], tool_calls.WRONG),
    "an argument dropped": (PARIS, [call("weather", city="Paris")], tool_calls.MISSING),
    "one that only the tool requires": ("weather", [call("weather", days=3)], tool_calls.MISSING),
    "one that the tool's schema forbids": ("weather", [call("weather", city="Oslo", days=0)], tool_calls.WRONG),
    "exact": ({**PARIS, "exact": True}, [call("weather", city="Paris", days=3)], ""),
    "exact, with another": ({**PARIS, "exact": True}, [call("weather", city="Paris", days=3, x=1)], tool_calls.WRONG),
    "a schema": (
        {"name": "weather", "schema": {"properties": {"city": {"enum": ["Oslo", "Bergen"]}}}},
        [call("weather", city="Paris")],
        tool_calls.WRONG,
    ),
    "several in any order": (["clock", PARIS], [call("weather", city="Paris", days=3), call("clock")], ""),
    "the loose one does not take the strict one's": (
        ["weather", PARIS],
        [call("weather", city="Paris", days=3), call("weather", city="Rome")],
        "",
    ),
    "one of two missing": (["clock", PARIS], [call("clock")], tool_calls.NO_CALL),
    "the same one twice": (PARIS, [call("weather", city="Paris", days=3)] * 2, tool_calls.UNWANTED),
    "none made": (PARIS, [], tool_calls.NO_CALL),
    "none wanted": ("none", [], ""),
    "none wanted, one made": ("none", [call("clock")], tool_calls.UNWANTED),
    "another tool": (PARIS, [call("clock")], tool_calls.WRONG_TOOL),
    "a tool that is none": ("clock", [call("rm -rf /")], tool_calls.WRONG_TOOL),
    "no JSON": (PARIS, [Made("weather", '{"city": "Paris", ')], tool_calls.NO_JSON),
    "no object": (PARIS, [Made("weather", '["Paris", 3]')], tool_calls.NO_JSON),
    "deep beyond reading": (PARIS, [Made("weather", "[" * 90_000)], tool_calls.NO_JSON),
    "long beyond reading": (PARIS, [Made("weather", json.dumps({"city": "x" * 200_000}))], tool_calls.NO_JSON),
    "thousands of calls": (PARIS, [call("clock")] * 5000, tool_calls.UNWANTED),
    "a number beyond all floats": (
        PARIS,
        [Made("weather", '{"city": "Paris", "days": 1%s}' % ("0" * 400))],
        tool_calls.WRONG,
    ),
    "infinity": (PARIS, [Made("weather", '{"city": "Paris", "days": 1e999}')], tool_calls.WRONG),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_against_the_wanted_ones(name):
    wanted, made, fault = CASES[name]
    verdict = judged_calls(wanted_calls(wanted), made, TOOLS)
    assert verdict.fault == fault
    assert 0 < len(verdict.detail) < 300


def test_what_is_wrong_is_said_of_the_call_that_comes_closest():
    made = [call("clock"), call("weather", city="Paris", days=4)]
    assert judged_calls(wanted_calls(["clock", PARIS]), made, TOOLS).detail == "weather: days is 4, wanted 3"
    assert judged_calls(wanted_calls(PARIS), [call("weather", city="Paris")], TOOLS).detail == "weather lacks 'days'"


@pytest.mark.parametrize(
    ("wanted", "found", "exact", "same"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, False, True),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, True, False),
        ([1, {"a": 2}], [1.0, {"a": 2, "b": 3}], False, True),
        ([1, 2], [2, 1], False, False),
        ([1], [1, 2], False, False),
        (None, None, True, True),
        (None, 0, False, False),
        (False, 0, False, False),
        (0.1 + 0.2, 0.3, True, True),
        ("3", 3, False, False),
    ],
)
def test_values(wanted, found, exact, same):
    assert same_value(wanted, found, exact=exact) is same


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "at least one call"),
        ({"arguments": {}}, "field 'name'"),
        ({"name": "a", "exact": True}, "gives no arguments"),
        ({"name": "a", "schema": {"type": "objekt"}}, "wrong at"),
        ({"name": "a", "arguments": [1]}, "needs a mapping"),
        (["a"] * 33, "at most 32"),
        ("a b", "needs a name"),
    ],
)
def test_wanted_calls_that_cannot_be(value, said):
    with pytest.raises(ValueError, match=said):
        wanted_calls(value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "needs a list"),
        ([{"name": "a"}, {"name": "a"}], "two tools called 'a'"),
        ([{"name": "a", "parameters": {"type": "objekt"}}], "needs a JSON schema"),
        ([{"name": "a", "parameters": True}], "no object"),
        ([{"type": "retrieval", "function": {"name": "a"}}], "type 'retrieval'"),
        ([{"name": "a"}] * 129, "at most 128"),
    ],
)
def test_tools_that_cannot_be(value, said):
    with pytest.raises(ValueError, match=said):
        read_tools(value)
