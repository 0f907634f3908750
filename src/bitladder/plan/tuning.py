"""What is tuned of a level, how finely, and which part of the text decides whether it helped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from bitladder.formats.blocks import QTYPES
from bitladder.formats.tensors import TensorInfo
from bitladder.kernels.free_numbers import Grain, free_fields, shape_of

_HELD_OUT = 5
"""Every fifth document decides, or where there is one document only, every fifth window."""
_LEAST_HELD_OUT = 3
"""Windows that must decide at least."""
LEAST_WINDOWS = _HELD_OUT * _LEAST_HELD_OUT
"""With so many there are enough to decide, whatever the documents."""
_SHARES_PER_TOKEN = 64
"""How many shares by which numbers move are risked for a token of text. A token brings a whole distribution of
predictions to match, not one number, and steps are few and small: 44 shares for a token were measured to help text of
another domain, too (docs/log.md)."""
_COARSER: tuple[Grain, ...] = ("each", "rows", "whole")


@dataclass(frozen=True)
class TuningChoice:
    """How finely the numbers of each tensor move, by how many shares in all, and what the text was too short for."""

    grains: Mapping[str, Grain]
    shares: int
    note: str


def chosen(
    tensors: Sequence[TensorInfo], qtype: Callable[[str], str], tokens: int, also: Collection[str] = ()
) -> TuningChoice:
    """The finest way to move the numbers of layers that the text is long enough for.

    Args:
        tensors: of the model.
        qtype: the type that each is stored in.
        tokens: of the text that numbers are moved by.
        also: norms outside the layers.
    """
    shapes = {
        info.name: shape
        for info in tensors
        if (info.name.startswith("blk.") or info.name in also) and (shape := _shape(info, qtype(info.name)))
    }
    return finest(shapes, tokens)


def finest(shapes: Mapping[str, tuple[int, ...]], tokens: int) -> TuningChoice:
    """The finest way to move numbers of these shapes, by what they move together as, that a text of so many tokens is
    long enough for."""
    for grain in _COARSER:
        shares = sum(prod(shape_of(grain, shape)) for shape in shapes.values())
        if shares <= tokens * _SHARES_PER_TOKEN or grain == _COARSER[-1]:
            break
    each = sum(map(prod, shapes.values()))
    note = ""
    if grain != "each":
        note = f"{each:,} numbers moved by {shares:,} shares, as the text has {tokens:,} tokens only"
    return TuningChoice(dict.fromkeys(shapes, grain), shares, note)


def numbers_of_level(tensors: Sequence[TensorInfo], qtypes: Mapping[str, str]) -> int:
    """How many free numbers the layers of a level have."""
    shapes = (_shape(info, qtypes.get(info.name, info.qtype)) for info in tensors if info.name.startswith("blk."))
    return sum(prod(shape) for shape in shapes if shape)


def _shape(info: TensorInfo, qtype: str) -> tuple[int, ...]:
    """Of a tensor's free numbers: rows, blocks and numbers of each block, or a norm's weights; empty where it has
    none."""
    if qtype == "F32":
        return info.shape if info.name.endswith("_norm.weight") and len(info.shape) == 1 else ()
    fields = free_fields(qtype)
    return (prod(info.shape[:-1]), info.shape[-1] // QTYPES[qtype].block_size, len(fields)) if fields else ()


def held_places(documents: Sequence[str]) -> list[int]:
    """Places of the windows that decide; ``documents``: of which each window is. Empty where there are too few
    windows to decide anything."""
    names = list(dict.fromkeys(documents))
    held = set(names[_HELD_OUT - 1 :: _HELD_OUT])
    places = [at for at, name in enumerate(documents) if name in held]
    if len(places) < _LEAST_HELD_OUT:
        places = list(range(_HELD_OUT - 1, len(documents), _HELD_OUT))
    return places if len(places) >= _LEAST_HELD_OUT else []
