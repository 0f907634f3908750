"""The frozen records that stages exchange: plain data. ``to_json`` turns any of them into what ``--json`` prints."""

from __future__ import annotations

import dataclasses
import math
import numbers
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Real = float
else:
    Real = numbers.Real
    """A float of a record that is read back: what is undefined (NaN) is null in JSON. It is a type of its own while
    the program runs, so that ``reading.from_json`` can tell it from a float that must be there."""


_LEFT_OUT = "left out"
OPTIONAL = {_LEFT_OUT: True}
"""Metadata of a field that most records do without: it is left out of the JSON where it has its default."""


def to_json(record: Any) -> Any:
    """A record (or a container of records) as JSON-able data; what is undefined (NaN) becomes null, never 0."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        values = {field: getattr(record, field.name) for field in dataclasses.fields(record)}
        return {
            field.name: to_json(value)
            for field, value in values.items()
            if _LEFT_OUT not in field.metadata or value != field.default
        }
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple | set | frozenset):
        return [to_json(value) for value in record]
    if isinstance(record, PurePath):
        return str(record)
    if isinstance(record, float) and not math.isfinite(record):
        return None
    return record
