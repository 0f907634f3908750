"""Records from the JSON that `to_json` wrote."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from enum import StrEnum
from typing import Any, TypeVar

T = TypeVar("T")


def from_json(kind: type[T], data: Any) -> T:
    """A record of this type; null where a number belongs becomes NaN, unknown fields are left out.

    Raises:
        ValueError: the data does not describe such a record; the message names the field.
    """
    return typing.cast(T, _build(kind, data, kind.__name__))


def _build(kind: Any, data: Any, where: str) -> Any:
    """Follow the type."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build_record(kind, data, where)
    if origin in (types.UnionType, typing.Union):
        inner = next(one for one in typing.get_args(kind) if one is not type(None))
        return None if data is None else _build(inner, data, where)
    if origin in (tuple, list, dict):
        return _build_container(kind, data, where)
    return _build_tuple(kind, data, where) if hasattr(kind, "_fields") else _build_plain(kind, data, where)


def _build_container(kind: Any, data: Any, where: str) -> Any:
    """A tuple or list of one type, or a dictionary by name."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        _expect(data, dict, where)
        return {name: _build(arguments[1], value, f"{where}.{name}") for name, value in data.items()}
    _expect(data, list, where)
    return origin(_build(arguments[0], value, f"{where}[{number}]") for number, value in enumerate(data))


def _build_tuple(kind: Any, data: Any, where: str) -> Any:
    """A named tuple from an array."""
    _expect(data, list, where)
    hints = typing.get_type_hints(kind)
    if len(data) != len(kind._fields):
        raise ValueError(f"{where} must hold {len(kind._fields)} values; got {len(data)} instead")
    named = zip(kind._fields, data, strict=True)
    return kind(*(_build(hints[name], value, f"{where}.{name}") for name, value in named))


def _build_plain(kind: Any, data: Any, where: str) -> Any:
    """A number, text, one of a few texts, or truth value."""
    if kind is float:
        if data is None:
            return math.nan
        _expect(data, (int, float), where)
        return float(data)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        _expect(data, str, where)
        if data not in tuple(kind):
            raise ValueError(f"{where} must be one of {', '.join(filter(None, kind))}; got '{data[:40]}' instead")
        return kind(data)
    if kind in (str, int, bool):
        _expect(data, kind, where)
    return data


def _build_record(kind: Any, data: Any, where: str) -> Any:
    """A dataclass from an object; a missing field must have a default."""
    _expect(data, dict, where)
    hints = typing.get_type_hints(kind)
    fields = {
        field.name: _build(hints[field.name], data[field.name], f"{where}.{field.name}")
        for field in dataclasses.fields(kind)
        if field.name in data
    }
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _expect(data: Any, kind: Any, where: str) -> None:
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where} must be {wanted}; got {type(data).__name__} instead")
