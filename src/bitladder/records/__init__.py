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


LEFT_OUT = {"left_out": True}
"""Metadata of a field that stands in JSON only where it is not its default: what few records have."""


def to_json(record: Any) -> Any:
    """A record (or a container of records) as JSON-able data; what is undefined (NaN) becomes null, never 0."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        fields = ((field, getattr(record, field.name)) for field in dataclasses.fields(record))
        return {
            field.name: to_json(value)
            for field, value in fields
            if not (field.metadata.get("left_out") and value == field.default)
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
