"""Records from the JSON that `to_json` wrote: the one place where they are read, and checked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from bitladder.records import Real

T = TypeVar("T")


def from_json(kind: type[T], data: Any) -> T:
    """A record of this type (or a tuple of records: ``tuple[Record, ...]``) from parsed JSON.

    Null where a ``Real`` belongs becomes NaN, unknown fields are left out, a missing one must have a default.

    Raises:
        ValueError: the data does not describe such a record; the message says where, and what belongs there.
    """
    import msgspec  # here, because `--help` reads nothing

    try:
        return msgspec.convert(data, kind, dec_hook=_other)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error


def read_json(kind: type[T], text: str | bytes) -> T:
    """The same from JSON text, which may be anybody's.

    Raises:
        ValueError: no JSON, too deep, or no such record.
    """
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return from_json(kind, data)


def _other(kind: type, value: Any) -> float | Path:
    """A ``Real`` or a path; msgspec adds the place to what is raised."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is not Real or isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError(f"Expected `{'str' if kind is Path else 'float | null'}`, got `{type(value).__name__}`")
    return math.nan if value is None else float(value)
