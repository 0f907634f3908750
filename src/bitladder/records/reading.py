"""Records from the JSON that `to_json` wrote."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
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
    if dataclasses.is_dataclass(kind):
        return _build_record(kind, data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return (
            None
            if data is None
            else _build(next(one for one in arguments if one is not type(None)), data, where)
        )
    if origin in (tuple, list):
        _expect(data, list, where)
        items = [_build(arguments[0], value, f"{where}[{number}]") for number, value in enumerate(data)]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        _expect(data, dict, where)
        return {name: _build(arguments[1], value, f"{where}.{name}") for name, value in data.items()}
    if kind is float:
        if data is None:
            return math.nan
        _expect(data, (int, float), where)
        return float(data)
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
