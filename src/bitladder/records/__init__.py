"""The frozen records that stages exchange: plain data. ``to_json`` turns any of them into what ``--json`` prints."""

from __future__ import annotations

import dataclasses
import math
from pathlib import PurePath
from typing import Any


def to_json(record: Any) -> Any:
    """A record (or a container of records) as JSON-able data; what is undefined (NaN) becomes null, never 0."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {field.name: to_json(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple | set | frozenset):
        return [to_json(value) for value in record]
    if isinstance(record, PurePath):
        return str(record)
    if isinstance(record, float) and not math.isfinite(record):
        return None
    return record
