"""The scales and minima inside blocks, apart from their codes: which can be stored, and other ones put in their place.

The twin of ``codes.py``. Scales are read off a decoded block (``codes.grid_of``) and never unpacked; to write them one
table says where each format keeps the bits of its whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitladder.formats.blocks import QTYPES
from bitladder.kernels.codes import row_of
from bitladder.kernels.grid import F32, Grid

U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Piece:
    """``width`` bits of a whole number, from its bit ``up`` on: in byte ``byte`` of a field, from bit ``shift`` on."""

    field: str
    byte: int
    shift: int
    width: int
    up: int = 0


def _six_bits(first: int, high: int) -> Callable[[int], tuple[Piece, ...]]:
    """Q4_K and Q5_K: numbers 0 to 3 whole from byte ``first`` on; of 4 to 7 the low bits behind, the high two above."""

    def pieces(j: int) -> tuple[Piece, ...]:
        if j < 4:
            return (Piece("scales", first + j, 0, 6),)
        return Piece("scales", 4 + j, high, 4), Piece("scales", first + j - 4, 6, 2, 4)

    return pieces


def _nibble(shift: int) -> Callable[[int], tuple[Piece, ...]]:
    return lambda j: (Piece("scales", j, shift, 4),)


_SCALES: dict[str, Callable[[int], tuple[Piece, ...]]] = {
    "Q2_K": _nibble(0),
    "Q3_K": lambda j: (Piece("scales", j % 8, 4 * (j // 8), 4), Piece("scales", 8 + j % 4, 2 * (j // 4), 2, 4)),
    "Q4_K": _six_bits(0, 0),
    "Q5_K": _six_bits(0, 0),
    "Q6_K": lambda j: (Piece("scales", j, 0, 8),),
    "IQ4_XS": lambda j: (Piece("scales_l", j // 2, 4 * (j % 2), 4), Piece("scales_h", j // 4, 2 * (j % 4), 2, 4)),
}
_MINIMA: dict[str, Callable[[int], tuple[Piece, ...]]] = {
    "Q2_K": _nibble(4),
    "Q4_K": _six_bits(4, 4),
    "Q5_K": _six_bits(4, 4),
}
_LIFTED = {"Q3_K": 32, "IQ4_XS": 32}
"""What is added to a scale before it is stored."""


@dataclass(frozen=True)
class Units:
    """What scales and offsets of each group can be: whole multiples, f32[rows, groups] each, 0 for any float16.

    Multiples run from ``least`` to ``most``, for offsets from 0. ``has_offset``: whether there are any.
    """

    scale: F32
    offset: F32
    least: int
    most: int
    has_offset: bool


def units_of(data: U8, qtype: str) -> Units:
    """The units that these blocks fix. ``data``: uint8[rows, row_bytes], of a key of ``codes.CODE_BITS``."""
    kind, row = QTYPES[qtype], row_of(qtype)
    blocks = data.reshape(-1, kind.type_size)
    has_offset = any(name in ("m", "dmin") for name, _ in kind.fields)
    if qtype not in _SCALES:
        free = np.zeros((len(data), data.shape[1] // kind.type_size), np.float32)
        return Units(free, free, row.low, row.high, has_offset)

    def of(field: str) -> F32:
        at = kind.offset(field)
        stored = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)
        return np.repeat(stored.reshape(len(data), -1), row.parts, axis=1)

    scale = of("d")
    return Units(scale, -of("dmin") if has_offset else np.zeros_like(scale), row.scale_low, row.scale_high, has_offset)


def with_scales(data: U8, qtype: str, grid: Grid) -> U8:
    """The same blocks with other scales and offsets, which must be such as ``units_of`` allows."""
    kind, units, row = QTYPES[qtype], units_of(data, qtype), row_of(qtype)
    out = data.reshape(-1, kind.type_size).copy()
    for name, own in (("d", grid.scale), ("m", grid.offset)):
        if qtype not in _SCALES and (name == "d" or units.has_offset):
            at = kind.offset(name)
            out[:, at : at + 2] = own.astype(np.float16).reshape(-1, 1).view(np.uint8)
    for table, values, unit, lift in (
        (_SCALES, grid.scale, units.scale, _LIFTED.get(qtype, 0)),
        (_MINIMA, grid.offset, units.offset, 0),
    ):
        if qtype in table:
            counts = np.rint(np.divide(values, unit, out=np.zeros_like(values), where=unit != 0)).astype(np.int64)
            _store(out, kind.offset, table[qtype], (counts + lift).reshape(len(out), row.parts))
    return out.reshape(data.shape)


def _store(
    out: U8, offset: Callable[[str], int], pieces: Callable[[int], tuple[Piece, ...]], counts: NDArray[np.int64]
) -> None:
    """Put the whole numbers i64[blocks, parts] into their bits."""
    for j in range(counts.shape[1]):
        for piece in pieces(j):
            at, mask = offset(piece.field) + piece.byte, (1 << piece.width) - 1
            kept = out[:, at] & np.uint8(255 ^ mask << piece.shift & 255)
            out[:, at] = kept | ((counts[:, j] >> piece.up & mask) << piece.shift).astype(np.uint8)
