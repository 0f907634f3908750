"""JSON schemas of others (draft 2020-12), on documents of others: nothing is fetched, and evaluating has an end."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bitladder.describe import patterns
from bitladder.unicode import half_character

MOST_STEPS = 50_000
"""Keywords that are evaluated for one document: a schema of fifteen lines can mean billions."""
MOST_NODES = 2_000
"""Values that a schema holds."""
_MOST_DEPTH = 100
_STEPS_OF_A_NODE = 200
"""That checking a schema takes for each of its values."""

Keyword = Callable[[Any, Any, Any, Any], Iterator[Any] | None]
_STEPS: contextvars.ContextVar[list[int]] = contextvars.ContextVar("steps")


class _Endless(Exception):
    """More steps than there may be."""


def check(schema: Any) -> None:
    """Whether something is a schema that can be evaluated.

    Raises:
        ValueError: it is none, or too large; the rest of a sentence.
    """
    from jsonschema.exceptions import SchemaError

    if not isinstance(schema, dict | bool):
        raise ValueError(f"got {str(schema)[:80]!r}")
    _check_size(schema)
    try:
        _limited(lambda: _validator().check_schema(schema), _STEPS_OF_A_NODE * MOST_NODES)
    except SchemaError as error:
        raise ValueError(f"this one is wrong at {error.json_path}: {error.message[:200]}") from error
    except _Endless:
        raise ValueError("this one is too large to be checked") from None
    except (RecursionError, OverflowError, ArithmeticError) as error:
        raise ValueError(f"this one cannot be checked: {error}") from None


def violation(schema: Any, document: Any) -> str | None:
    """What of a document does not fit a schema, and where; None when all does."""
    from jsonschema.exceptions import best_match
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # An empty registry: a schema must not make us fetch things from the network.
    validator = _validator()(schema, registry=Registry())
    try:
        wrong = _limited(lambda: best_match(validator.iter_errors(document)))
    except Unresolvable as error:
        return f"the schema refers to something outside itself: {str(error)[:120]}"
    except _Endless:
        return "the schema was not evaluated: it takes too many steps on this document"
    except (RecursionError, ArithmeticError, ValueError, TimeoutError) as error:
        return f"the schema was not evaluated: {str(error)[:120]}"
    return None if wrong is None else f"at {wrong.json_path}: {wrong.message}"[:200]


def _limited(work: Callable[[], Any], steps: int = MOST_STEPS) -> Any:
    token = _STEPS.set([steps])
    try:
        return work()
    finally:
        _STEPS.reset(token)


def _check_size(schema: Any) -> None:
    left, waiting = MOST_NODES, [(schema, 0)]
    while waiting:
        value, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > _MOST_DEPTH:
            raise ValueError(f"this one has more than {MOST_NODES} values, or is nested more than {_MOST_DEPTH} deep")
        if isinstance(value, str) and half_character(value) is not None:
            raise ValueError("this one holds half of a surrogate pair, which is no character")
        children = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        waiting += [(child, depth + 1) for child in children]


@functools.cache
def _validator() -> Any:
    """The draft's validator whose keywords are counted, patterns have an end, and items are compared by value at once
    rather than in pairs."""
    from jsonschema import Draft202012Validator, validators

    own: Mapping[str, Keyword] = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "uniqueItems": _unique_items,
    }
    keywords = {name: own.get(name, keyword) for name, keyword in Draft202012Validator.VALIDATORS.items()}
    return validators.extend(Draft202012Validator, {name: _counted(keyword) for name, keyword in keywords.items()})


def _counted(keyword: Keyword) -> Keyword:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        _step(1 + (len(instance) if isinstance(instance, dict | list) else 0) // 8)
        yield from keyword(validator, value, instance, schema) or ()

    return counted


def _step(number: int) -> None:
    left = _STEPS.get()
    left[0] -= number
    if left[0] < 0:
        raise _Endless


def _pattern(validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if validator.is_type(instance, "string") and _search(pattern, instance) is None:
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, listed: Mapping[str, Any], instance: Any, _schema: Any) -> Iterator[Any]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, subschema in listed.items():
        for name, value in instance.items():
            if _search(pattern, name) is not None:
                yield from validator.descend(value, subschema, path=name, schema_path=pattern)


def _search(pattern: str, text: str) -> str | None:
    _step(1 + len(text) // 100)
    return patterns.search(pattern, text)


def _unique_items(validator: Any, wanted: Any, instance: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not wanted or not validator.is_type(instance, "array"):
        return
    seen = set()
    for item in instance:
        key = _key(item)
        if key in seen:
            yield ValidationError(f"{str(item)[:80]!r} comes twice")
            return
        seen.add(key)


def _key(value: Any) -> Any:
    """What is equal for equal values of JSON: 1 and 1.0 are, 1 and true are not."""
    _step(1)
    if isinstance(value, dict):
        return "object", frozenset((name, _key(one)) for name, one in value.items())
    if isinstance(value, list):
        return "array", tuple(_key(one) for one in value)
    return isinstance(value, bool), value
