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
_TOKENS_EACH = 2
"""Tokens for each share by which numbers move."""
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
    """The finest way to move the numbers of layers that leaves several tokens for each share.

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
    for grain in _COARSER:
        shares = sum(prod(shape_of(grain, shape)) for shape in shapes.values())
        if shares * _TOKENS_EACH <= tokens or grain == _COARSER[-1]:
            break
    each = sum(map(prod, shapes.values()))
    note = "" if grain == "each" else f"{shares} shares for {each} numbers: the text has {tokens} tokens"
    return TuningChoice(dict.fromkeys(shapes, grain), shares, note)


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
