"""Reading the values of criteria: each function completes one, or raises ValueError with the rest of a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from bitladder.describe import patterns, schemas
from bitladder.describe.numbers import LOCALES
from bitladder.describe.similarity import METRICS
from bitladder.unicode import half_character

Reader = Callable[[Any], Any]
MOST = 10_000_000
"""Of anything that is counted: tokens, words, samples."""


def a_string(value: Any) -> str:
    """Any text. Numbers and truth values are refused: YAML reads ``no`` and ``1.0`` as such, and few people know."""
    if not isinstance(value, str):
        raise ValueError(f"needs a text, got {_shown(value)}; put it in quotes if it is meant as a text")
    if half_character(value) is not None:
        raise ValueError("holds half of a surrogate pair, which is no character")
    return value


def _shown(value: Any) -> str:
    """A value as a message repeats it."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "..."


def words(value: Any) -> str:
    """A text with something in it."""
    if not a_string(value).strip():
        raise ValueError("needs a text that is not empty")
    return str(value)


def several_words(value: Any) -> list[str]:
    """One text or a list of texts, as a list."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("needs at least one text")
    return [words(item) for item in items]


def several_parts(value: Any) -> list[str | dict[str, Any]]:
    """Texts, or mappings ``{text: ing, within_words: true, same_case: true}``, one or a list of them, as a list."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("needs at least one text")
    optional = {"within_words": (False, a_truth), "same_case": (False, a_truth)}
    return [fields(item, {"text": words}, optional) if isinstance(item, dict) else words(item) for item in items]


def fields(value: Any, required: Mapping[str, Reader], optional: Mapping[str, tuple[Any, Reader]]) -> dict[str, Any]:
    """A mapping with these fields and no others; optional ones are ``(default, reader)``."""
    if not isinstance(value, dict):
        raise ValueError(f"needs the field{'s' * (len(required) > 1)} {', '.join(required)}, got {_shown(value)}")
    for name in value:
        if name not in required and name not in optional:
            raise ValueError(f"has no field '{name}'; it has {', '.join([*required, *optional])}")
    for name in required:
        if name not in value:
            raise ValueError(f"needs the field '{name}'")
    result = {name: _field(name, read, value[name]) for name, read in required.items()}
    for name, (default, read) in optional.items():
        result[name] = _field(name, read, value[name]) if name in value else default
    return result


def _field(name: str, read: Reader, value: Any) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"field '{name}' {error}") from error


def a_number(value: Any) -> float:
    """A finite number."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        raise ValueError("needs a number, got one of more than 308 digits") from None
    if not math.isfinite(number):
        raise ValueError(f"needs a number, got {_shown(value)}")
    return number


def a_count(value: Any) -> int:
    """A whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"needs a whole number from 1, got {_shown(value)}")
    if value > MOST:
        raise ValueError(f"needs a whole number of at most {MOST}")
    return value


def a_whole(value: Any) -> int:
    """A whole number from 0."""
    return 0 if value == 0 and not isinstance(value, bool) else a_count(value)


def a_share(value: Any) -> float:
    """A number from 0 to 1."""
    share = a_number(value)
    if not 0 <= share <= 1:
        raise ValueError(f"needs a share between 0 and 1, got {share:g}")
    return share


def a_tolerance(value: Any) -> float:
    """A number that is not negative."""
    number = a_number(value)
    if number < 0:
        raise ValueError(f"needs a number of 0 or more, got {number:g}")
    return number


def a_truth(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"needs true or false, got {_shown(value)}")
    return value


def choice(*allowed: str) -> Callable[[Any], str]:
    """One of these words."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"needs one of {', '.join(allowed)}, got {_shown(value)}")
        return str(value)

    return read


def pattern(value: Any) -> str | list[str]:
    """A regular expression in Python's dialect, or a list of some that must all match."""
    if isinstance(value, list):
        return [_one_pattern(one) for one in (value or [None])]
    return _one_pattern(value)


def _one_pattern(value: Any) -> str:
    try:
        patterns.check(a_string(value))
    except ValueError as error:
        if not isinstance(value, str):
            raise
        raise ValueError(f"needs a regular expression; {_shown(value)} is none: {error}") from error
    return str(value)


def number(value: Any) -> dict[str, Any]:
    """``42`` or ``{value: 42, tolerance: 0.5, relative: 0.01, which: last, locale: de}``."""
    plain = value if isinstance(value, dict) else {"value": value}
    which = choice("last", "first", "any")
    options = {"tolerance": (0.0, a_tolerance), "relative": (0.0, a_tolerance), "which": ("last", which)}
    found = fields(plain, {"value": a_number}, {**options, "locale": ("", choice(*LOCALES))})
    if not found["locale"]:
        del found["locale"]
    return found


def json_schema(value: Any) -> Any:
    """A JSON schema (draft 2020-12) that is itself correct."""
    try:
        schemas.check(value)
    except ValueError as error:
        raise ValueError(f"needs a JSON schema; {error}") from error
    return value


def set_recall(value: Any) -> dict[str, Any]:
    """A list of items, or ``{items: [...], at_least: 0.9}``; an item is a text or a list of its wordings."""

    def items(listed: Any) -> list[list[str]]:
        if not isinstance(listed, list) or not listed:
            raise ValueError("needs a list of items that is not empty")
        return [several_words(item) for item in listed]

    plain = {"items": value} if isinstance(value, list) else value
    return fields(plain, {"items": items}, {"at_least": (1.0, a_share)})


def similar(value: Any) -> dict[str, Any]:
    """``{to: "...", at_least: 0.6, metric: chrf}``."""
    return fields(value, {"to": words, "at_least": a_share}, {"metric": ("chrf", choice(*METRICS))})


def agreement(value: Any) -> dict[str, Any]:
    """``true`` for the same text, or ``{metric: chrf, at_least: 0.9}``."""
    plain = {} if value is True else value
    metric = choice("same", *METRICS)
    return fields(plain, {}, {"metric": ("same", metric), "at_least": (1.0, a_share)})


def judged(value: Any) -> dict[str, Any]:
    """A rubric, or ``{rubric: "...", against: reference, examples: [{answer: "...", passes: true}]}``."""

    def examples(listed: Any) -> list[dict[str, Any]]:
        if not isinstance(listed, list):
            raise ValueError("needs a list of examples, each with 'answer' and 'passes'")
        return [fields(example, {"answer": a_string, "passes": a_truth}, {}) for example in listed]

    plain = {"rubric": value} if isinstance(value, str) else value
    against = choice("none", "reference")
    return fields(plain, {"rubric": words}, {"against": ("none", against), "examples": ([], examples)})


def import_path(value: Any) -> str:
    """``module:function``."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", a_string(value)):
        raise ValueError(f"needs an import path like my_checks:is_polite, got {_shown(value)}")
    return str(value)
