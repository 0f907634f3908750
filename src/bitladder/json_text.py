"""JSON from outside, as its standard has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

Pairs = Callable[[list[tuple[str, Any]]], Any]


def read(text: str, pairs: Pairs | None = None) -> Any:
    """The value of a JSON document. NaN and infinity, which Python reads, are none.

    Args:
        text: the document.
        pairs: makes the value of an object from its names and values, in order; a dict unless it is given.

    Raises:
        ValueError: it is no JSON, nested too deeply, or holds a whole number of thousands of digits.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
