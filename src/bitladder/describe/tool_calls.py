"""Calls of tools: what a workload says of them, and whether those that a model made are the wanted ones.

Tools and calls are written in OpenAI's form. Wanted calls are compared with made ones in any order. A call's arguments
must fit the schema that its tool gives, whatever else is wanted of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from bitladder import json_text
from bitladder.describe import schemas
from bitladder.describe.criterion_values import a_string, a_truth, fields, json_schema, words
from bitladder.unicode import same_text

MOST_TOOLS = 128
MOST_CALLS = 32
LONGEST_ARGUMENTS = 100_000
"""Characters."""
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
NONE = "none"
"""Written in the place of calls where none is wanted."""

NO_CALL, UNWANTED, WRONG_TOOL = "no tool call", "unwanted tool call", "wrong tool"
MISSING, WRONG, NO_JSON = "missing argument", "wrong argument", "broken tool call"
CALL_FAULTS = (NO_CALL, UNWANTED, WRONG_TOOL, MISSING, WRONG, NO_JSON)
"""What can be wrong with calls, the gravest first where a call is wrong in several ways."""


class Call(Protocol):
    """A call that a model made."""

    @property
    def name(self) -> str:
        """Of the tool."""
        ...

    @property
    def arguments(self) -> str:
        """JSON, as far as the model kept to it."""
        ...


class Verdict(NamedTuple):
    """Whether the calls are the wanted ones, in a phrase; ``fault`` is one of `CALL_FAULTS`, empty where they are."""

    fault: str
    detail: str


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tools in OpenAI's form, ``{type: function, function: {name, description, parameters}}``, or the function alone.

    Raises:
        ValueError: the rest of a sentence.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("needs a list of tools that is not empty")
    if len(value) > MOST_TOOLS:
        raise ValueError(f"holds {len(value)} tools; at most {MOST_TOOLS} are taken")
    tools = tuple(_tool(one) for one in value)
    names = [tool["function"]["name"] for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"has two tools called '{twice}'")
    return tools


def _tool(value: Any) -> dict[str, Any]:
    wrapped = isinstance(value, dict) and "function" in value
    if wrapped:
        kind = fields(value, {"function": dict_of}, {"type": ("function", a_string)})
        if kind["type"] != "function":
            raise ValueError(f"has a tool of type '{kind['type'][:40]}'; tools are functions")
        value = kind["function"]
    parts = {"description": ("", a_string), "parameters": ({"type": "object", "properties": {}}, json_schema)}
    function = fields(value, {"name": tool_name}, {**parts, "strict": (False, a_truth)})
    if not function["strict"]:
        del function["strict"]
    if not isinstance(function["parameters"], dict):
        raise ValueError(f"gives the tool '{function['name']}' a schema that is no object")
    return {"type": "function", "function": function}


def dict_of(value: Any) -> dict[str, Any]:
    """A mapping."""
    if not isinstance(value, dict):
        raise ValueError(f"needs a mapping, got {str(value)[:80]!r}")
    return value


def tool_name(value: Any) -> str:
    """A name as engines take it: letters, digits, ``_``, ``-`` and ``.``, at most 64."""
    name = words(value)
    if len(name) > 64 or not set(name) <= _NAME_CHARACTERS:
        raise ValueError(f"needs a name of letters, digits, _ and - (at most 64), got {name[:80]!r}")
    return name


def wanted_calls(value: Any) -> dict[str, Any]:
    """``none``; a tool's name; ``{name, arguments, exact, schema}``; or a list of these: several calls in any order.

    ``arguments`` are values that must be among the call's; with ``exact`` there may be no others. ``schema`` is one
    that the arguments must fit.
    """
    if value == NONE:
        return {"calls": []}
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise ValueError(f"needs at least one call; write '{NONE}' where none is wanted")
    if len(listed) > MOST_CALLS:
        raise ValueError(f"holds {len(listed)} calls; at most {MOST_CALLS} are taken")
    return {"calls": [_wanted(one) for one in listed]}


def _wanted(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": tool_name(value)}
    options: Mapping[str, tuple[Any, Callable[[Any], Any]]] = {
        "arguments": (None, dict_of),
        "exact": (False, a_truth),
        "schema": (None, json_schema),
    }
    call = fields(value, {"name": tool_name}, options)
    if call["exact"] and call["arguments"] is None:
        raise ValueError("says 'exact' and gives no arguments")
    return {name: one for name, one in call.items() if one not in (None, False)}


def unknown_tools(value: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of wanted calls that are none of these tools'."""
    known = {tool["function"]["name"] for tool in tools}
    return [call["name"] for call in value["calls"] if call["name"] not in known]


def judged_calls(value: Mapping[str, Any], made: Sequence[Call], tools: Sequence[Mapping[str, Any]]) -> Verdict:
    """Whether the calls that were made are the wanted ones, each once, in any order."""
    wanted = value["calls"]
    if not wanted:
        names = ", ".join(call.name[:64] for call in made[:5])
        return Verdict(UNWANTED, f"no call is wanted; called {names}") if made else Verdict("", "no call, as wanted")
    if not made:
        return Verdict(NO_CALL, f"no call; {_count(len(wanted))} wanted")
    schema_of = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if len(made) > MOST_CALLS:
        return Verdict(UNWANTED, f"{len(made)} calls; {_count(len(wanted))} wanted")
    verdicts = [[_fits(one, call, schema_of) for call in made] for one in wanted]
    partner = _matched([[not verdict.fault for verdict in row] for row in verdicts])
    open_calls = [place for place in range(len(made)) if place not in partner.values()]
    for place, one in enumerate(wanted):
        if place not in partner:
            return _nearest([verdicts[place][number] for number in open_calls], one["name"])
    if open_calls:
        extra = made[open_calls[0]].name[:64]
        return Verdict(UNWANTED, f"{len(made)} calls, {_count(len(wanted))} wanted; {extra} is one too many")
    return Verdict("", "the call wanted" if len(wanted) == 1 else f"the {len(wanted)} calls wanted")


def _count(number: int) -> str:
    return f"{number} {'is' if number == 1 else 'are'}"


def _nearest(verdicts: Sequence[Verdict], name: str) -> Verdict:
    """What is wrong with the call that comes closest to a wanted one."""
    if not verdicts:
        return Verdict(NO_CALL, f"no further call; one of {name} is missing")
    return max(verdicts, key=lambda verdict: CALL_FAULTS.index(verdict.fault))


def _matched(fits: Sequence[Sequence[bool]]) -> dict[int, int]:
    """Wanted call to made call, as many pairs as there can be (augmenting paths)."""
    holder: dict[int, int] = {}

    def place(wanted: int, tried: set[int]) -> bool:
        for made, fitting in enumerate(fits[wanted]):
            if fitting and made not in tried:
                tried.add(made)
                if made not in holder or place(holder[made], tried):
                    holder[made] = wanted
                    return True
        return False

    for wanted in range(len(fits)):
        place(wanted, set())
    return {wanted: made for made, wanted in holder.items()}


def _fits(wanted: Mapping[str, Any], call: Call, schema_of: Mapping[str, Any]) -> Verdict:
    if call.name != wanted["name"]:
        return Verdict(WRONG_TOOL, f"called {call.name[:64]}, wanted {wanted['name']}")
    try:
        arguments = _object_in(call.arguments)
    except ValueError as error:
        return Verdict(NO_JSON, f"arguments of {call.name} are no JSON object: {str(error)[:120]}")
    schema = schema_of.get(call.name, {})
    required = schema.get("required", ())
    missing = [name for name in dict.fromkeys((*wanted.get("arguments", ()), *required)) if name not in arguments]
    if missing:
        return Verdict(MISSING, f"{call.name} lacks {', '.join(map(repr, missing[:5]))}")
    wrong = _wrong_argument(wanted, arguments)
    asked = [each for each in (schema, wanted.get("schema")) if each]
    violated = wrong or next(filter(None, (schemas.violation(each, arguments) for each in asked)), None)
    return Verdict(WRONG, f"{call.name}: {violated}") if violated else Verdict("", "fits")


def _object_in(arguments: str) -> dict[str, Any]:
    """The arguments of a call; none at all are an empty object.

    Raises:
        ValueError: they are no object in JSON.
    """
    if len(arguments) > LONGEST_ARGUMENTS:
        raise ValueError(f"{len(arguments)} characters")
    found = json_text.read(arguments or "{}")
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}")
    return found


def _wrong_argument(wanted: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """What is not as wanted, in a phrase; empty where all is."""
    given, exact = wanted.get("arguments", {}), wanted.get("exact", False)
    for name, value in given.items():
        if not same_value(value, arguments[name], exact=exact):
            return f"{name} is {_short(arguments[name])}, wanted {_short(value)}"
    others = [name for name in arguments if name not in given]
    return f"it has {', '.join(repr(name[:40]) for name in others[:5])}, too" if exact and others else ""


def same_value(wanted: Any, found: Any, *, exact: bool) -> bool:
    """Whether a value of JSON is the wanted one.

    Numbers are compared as numbers (2 is 2.0, and neither is "2" or true), texts aside from white space around them
    and forms of letters, lists place by place. Of an object, values that are not wanted count with ``exact`` only.
    """
    if isinstance(wanted, dict) and isinstance(found, dict):
        names_fit = set(found) == set(wanted) if exact else set(found) >= set(wanted)
        return names_fit and all(same_value(one, found[name], exact=exact) for name, one in wanted.items())
    if isinstance(wanted, list) and isinstance(found, list):
        pairs = zip(wanted, found, strict=False)
        return len(found) == len(wanted) and all(same_value(one, other, exact=exact) for one, other in pairs)
    if isinstance(wanted, str) and isinstance(found, str):
        return same_text(found, wanted)
    if _is_number(wanted) and _is_number(found):
        return _same_number(wanted, found)
    return isinstance(wanted, bool | None) and wanted is found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same_number(one: float, other: float) -> bool:
    try:
        return one == other or math.isclose(one, other, rel_tol=1e-9)
    except OverflowError:  # a whole number beyond all floats
        return False


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:60] + "..."
