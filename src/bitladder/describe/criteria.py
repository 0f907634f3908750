"""What an answer must satisfy: one row per kind of criterion, each a pure function from a text to an outcome.

    exact                  a text                  is this text, white space around it aside
    one_of                 texts                   is one of these, aside from case, quotes and a final full stop
    contains_all           texts                   has all of these as whole words, in any case
    contains_any           texts                   has at least one
    contains_none          texts                   has none
    regex                  pattern or patterns     is matched somewhere by each, in Python's dialect
    number                 value, tolerance, which has as its last (first, any) number one within the tolerance
    json_schema            schema                  is JSON, alone or in one code fence, that fits
    set_recall             items, at_least         names at least this share; an item may have several wordings
    max_words              count                   has at most so many words
    similarity             to, metric, at_least    has at least this chrF or ROUGE-L (0 to 1) with a text
    agrees_with_reference  metric, at_least        the same with the reference's answer; ``same``: the same text
    judge                  rubric                  is found good by a judge model (``engines.judge``)
    python                 module:function         pleases the user's own function, if the user trusts the file
    tool_call              calls, or none          calls the tools that are wanted, with their arguments, in any order

To add a kind, add a row to KINDS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bitladder import json_text
from bitladder.describe import criterion_values as values
from bitladder.describe import patterns, schemas, similarity, tool_calls
from bitladder.describe.numbers import numbers, spelled
from bitladder.describe.workload import Criterion, Input
from bitladder.unicode import canonical, count_words, has_text, has_words, same_text, short_answer


class Mark(NamedTuple):
    """Did the answer pass, and why, in a phrase."""

    passed: bool
    detail: str


@dataclass(frozen=True)
class Context:
    """What some criteria need besides the answer."""

    reference: str | None = None
    """The reference's answer to the same input; None while the reference itself is judged."""
    judge: Callable[[Input, Any, str, str | None], Mark] | None = None
    """``judge(input, value, answer, reference)``."""
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """The user's own functions by ``module:function``."""
    calls: Sequence[tool_calls.Call] = ()
    """The calls of tools that the answer holds."""


@dataclass(frozen=True)
class Kind:
    """``parse`` checks and completes a value (ValueError: the rest of a sentence).

    ``check`` judges from the answer alone; kinds that need more have ``ask`` instead.
    """

    parse: Callable[[Any], Any]
    check: Callable[[Any, str], Mark] | None = None
    ask: Callable[[Any, str, Input, Context], Mark] | None = None


def judge(one: Input, text: str, context: Context | None = None, criteria: Sequence[Criterion] | None = None) -> Mark:
    """Judge an answer by all criteria of its input, or by these: it passes when all pass; the first failure is the
    reason."""
    chosen = one.criteria if criteria is None else criteria
    outcomes = [_outcome(criterion, text, one, context or Context()) for criterion in chosen]
    failed = [outcome for outcome in outcomes if not outcome.passed]
    return failed[0] if failed else Mark(True, "; ".join(outcome.detail for outcome in outcomes))


def _outcome(criterion: Criterion, text: str, one: Input, context: Context) -> Mark:
    kind = KINDS[criterion.kind]
    if kind.check is not None:
        return kind.check(criterion.value, text)
    assert kind.ask is not None
    return kind.ask(criterion.value, text, one, context)


def found_items(criterion: Criterion, text: str) -> tuple[str, ...]:
    """Which items of a ``set_recall`` an answer names, each by its first wording."""
    return tuple(
        wordings[0] for wordings in criterion.value["items"] if any(has_words(text, wording) for wording in wordings)
    )


def _quote(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return f"'{line}'" if len(line) <= width else f"'{line[:width]}...'"


def _exact(value: str, text: str) -> Mark:
    same = same_text(text, value)
    return Mark(same, "the very text" if same else f"expected {_quote(value)}")


def _one_of(value: list[str], text: str) -> Mark:
    for allowed in value:
        if short_answer(text) == short_answer(allowed):
            return Mark(True, f"is {_quote(allowed)}")
    return Mark(False, f"is none of {', '.join(map(_quote, value))}")


def _holds(text: str, wanted: str | dict[str, Any]) -> bool:
    """Whether words stand in a text, or what a mapping asks for: a part of a word, in the same case."""
    if isinstance(wanted, str):
        return has_words(text, wanted)
    if wanted["within_words"]:
        return has_text(text, wanted["text"], same_case=wanted["same_case"])
    return has_words(text, wanted["text"], same_case=wanted["same_case"])


def _named(wanted: list[str | dict[str, Any]]) -> str:
    return ", ".join(_quote(one if isinstance(one, str) else one["text"]) for one in wanted)


def _contains_all(value: list[str | dict[str, Any]], text: str) -> Mark:
    missing = [wanted for wanted in value if not _holds(text, wanted)]
    return Mark(not missing, f"lacks {_named(missing)}" if missing else "contains all")


def _contains_any(value: list[str | dict[str, Any]], text: str) -> Mark:
    found = [wanted for wanted in value if _holds(text, wanted)]
    return Mark(bool(found), f"contains {_named(found[:1])}" if found else f"contains none of {_named(value)}")


def _contains_none(value: list[str | dict[str, Any]], text: str) -> Mark:
    found = [wanted for wanted in value if _holds(text, wanted)]
    return Mark(not found, f"contains {_named(found)}" if found else "contains none of the unwanted")


def _regex(value: str | list[str], text: str) -> Mark:
    matched = ""
    for pattern in [value] if isinstance(value, str) else value:
        try:
            match = patterns.search(pattern, canonical(text))
        except TimeoutError as error:
            return Mark(False, f"{_quote(pattern)}: {error}")
        if match is None:
            return Mark(False, f"no match for {_quote(pattern)}")
        matched = match
    return Mark(True, f"matches at {_quote(matched)}")


def _number(value: dict[str, Any], text: str) -> Mark:
    locale = value.get("locale", "en")
    found = spelled(text, locale)
    if not found:
        return Mark(False, f"no number; expected {value['value']:g}")
    candidates = {"last": found[-1:], "first": found[:1], "any": found}[value["which"]]
    allowed = max(value["tolerance"], value["relative"] * abs(value["value"]), 1e-9 * abs(value["value"]))
    readings = [reading for number in candidates for reading in number.readings]
    nearest = min(readings, key=lambda reading: abs(reading - value["value"]))
    if abs(nearest - value["value"]) <= allowed:
        return Mark(True, f"{nearest:g}, expected {value['value']:g}")
    likeliest = numbers(text, locale)[0 if value["which"] == "first" else -1]
    return Mark(False, f"{likeliest:g}, expected {value['value']:g}")


def extract_json(text: str) -> Any:
    """The JSON of an answer: the whole of it, or the content of its only code fence. NaN and infinity are none.

    Raises:
        ValueError: it is no JSON (the message says where).
    """
    text = text.removeprefix("\ufeff")
    fences = _FENCE.findall(text) if len(text) <= _LONGEST_JSON else []
    return json_text.read(fences[0] if len(fences) == 1 else text)


_FENCE = re.compile(r"```(?:json)?[^\S\n]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
_LONGEST_JSON = 4 << 20


def _json_schema(value: Any, text: str) -> Mark:
    try:
        document = extract_json(text)
    except ValueError as error:
        return Mark(False, f"no JSON: {error}")
    wrong = schemas.violation(value, document)
    return Mark(wrong is None, wrong or "fits the schema")


def _set_recall(value: dict[str, Any], text: str) -> Mark:
    found = found_items(Criterion("set_recall", value), text)
    missing = [wordings[0] for wordings in value["items"] if wordings[0] not in found]
    detail = f"found {len(found)} of {len(value['items'])}"
    if missing:
        detail += f"; missing {', '.join(map(_quote, missing))}"
    return Mark(len(found) >= value["at_least"] * len(value["items"]) - 1e-9, detail)


def _max_words(value: int, text: str) -> Mark:
    words = count_words(text)
    return Mark(words <= value, f"{words} words, at most {value} allowed")


def _similarity(value: dict[str, Any], text: str) -> Mark:
    if max(len(text), len(value["to"])) > similarity.LONGEST:
        return Mark(False, f"longer than the {similarity.LONGEST} characters that are compared")
    score = similarity.METRICS[value["metric"]](text, value["to"])
    return Mark(score >= value["at_least"], f"{value['metric']} {score:.2f}, at least {value['at_least']:g} wanted")


def _agrees(value: dict[str, Any], text: str, _one: Input, context: Context) -> Mark:
    if context.reference is None:
        return Mark(True, "is the reference")
    if value["metric"] == "same":
        same = same_text(text, context.reference)
        return Mark(same, "same as the reference" if same else f"the reference says {_quote(context.reference)}")
    return _similarity({**value, "to": context.reference}, text)


def _ask_judge(value: dict[str, Any], text: str, one: Input, context: Context) -> Mark:
    if context.judge is None:
        raise ValueError("a judge is needed and none was given")
    return context.judge(one, value, text, context.reference)


def _ask_function(value: str, text: str, one: Input, context: Context) -> Mark:
    answer = context.functions[value](text, {"id": one.id, "messages": one.messages, "reference": context.reference})
    if isinstance(answer, tuple):
        return Mark(bool(answer[0]), str(answer[1]))
    return Mark(bool(answer), f"{value} says {'yes' if answer else 'no'}")


def _tool_call(value: dict[str, Any], _text: str, one: Input, context: Context) -> Mark:
    verdict = tool_calls.judged_calls(value, context.calls, one.tools)
    return Mark(not verdict.fault, verdict.detail)


KINDS: dict[str, Kind] = {
    "exact": Kind(values.words, _exact),
    "one_of": Kind(values.several_words, _one_of),
    "contains_all": Kind(values.several_parts, _contains_all),
    "contains_any": Kind(values.several_parts, _contains_any),
    "contains_none": Kind(values.several_parts, _contains_none),
    "regex": Kind(values.pattern, _regex),
    "number": Kind(values.number, _number),
    "json_schema": Kind(values.json_schema, _json_schema),
    "set_recall": Kind(values.set_recall, _set_recall),
    "max_words": Kind(values.a_count, _max_words),
    "similarity": Kind(values.similar, _similarity),
    "agrees_with_reference": Kind(values.agreement, ask=_agrees),
    "judge": Kind(values.judged, ask=_ask_judge),
    "python": Kind(values.import_path, ask=_ask_function),
    "tool_call": Kind(tool_calls.wanted_calls, ask=_tool_call),
}


def doubts(one: Input) -> list[tuple[int, str]]:
    """Criteria that can never fail or never pass, as ``(line, sentence)``."""
    found: list[tuple[int, str]] = []
    alone = [c for c in one.criteria if KINDS[c.kind].check is not None and c.kind != "similarity"]

    def passes(text: str, criteria: list[Criterion]) -> bool:
        return all(_outcome(criterion, text, one, Context()).passed for criterion in criteria)

    for criterion in one.criteria:
        others = [other for other in alone if other is not criterion]
        if criterion.kind in ("exact", "one_of"):
            allowed = [criterion.value] if criterion.kind == "exact" else criterion.value
            if not any(passes(text, others) for text in allowed):
                found.append((criterion.line, f"can never pass: what {criterion.kind} allows fails another criterion"))
        elif criterion.kind == "contains_all":
            unwanted = [other for other in others if other.kind == "contains_none"]
            wanted = [one if isinstance(one, str) else one["text"] for one in criterion.value]
            if not passes(" ".join(wanted), unwanted):
                found.append((criterion.line, "can never pass: contains_all wants what contains_none forbids"))
        elif criterion.kind == "json_schema" and criterion.value is False:
            found.append((criterion.line, "can never pass: the schema accepts nothing"))
        elif criterion.kind in ("similarity", "agrees_with_reference") and criterion.value["at_least"] == 0:
            found.append((criterion.line, "can never fail: at_least is 0"))
        elif criterion.kind == "regex" and _regex(criterion.value, "").passed:
            found.append((criterion.line, "can never fail: the pattern matches an empty answer"))
    if len(alone) == len(one.criteria) and not found and passes("", alone):
        found.append((one.criteria[0].line, "passes even an empty answer: add a criterion that asks for something"))
    return found
