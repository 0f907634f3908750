"""The codes inside blocks, apart from their scales: what error feedback changes in bytes that a search has made.

A search (``kernels.quantize``) fixes the scales and minima of every block. ``grid_of`` says where that lets each
weight lie, ``with_codes`` puts other codes into the same blocks. Scales are never unpacked: a block is decoded twice,
once with all codes at 0 and once at 1, and what comes out is the offset and the step of every weight, whatever the
format. One table serves all formats, with a row per field that holds bits of codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitladder.formats.blocks import QTYPES
from bitladder.kernels.api import dequantize
from bitladder.kernels.grid import Grid
from bitladder.kernels.rows import AFFINE, SCALE, BlockRow
from bitladder.kernels.scale import IQ4_VALUES

U8 = NDArray[np.uint8]
I16 = NDArray[np.int16]


@dataclass(frozen=True)
class Bits:
    """A field that stores ``width`` bits of each code, from bit ``shift`` up, 8 / width weights to a byte.

    Weights of a byte lie ``gap`` apart in the block, lowest bits first: nibbles 32 apart are byte j = BBBBAAAA of
    weights j and j + 32 within each run of 64.
    """

    field: str
    shift: int
    width: int
    gap: int


CODE_BITS: dict[str, tuple[Bits, ...]] = {
    "Q4_0": (Bits("qs", 0, 4, 16),),
    "Q4_1": (Bits("qs", 0, 4, 16),),
    "Q5_0": (Bits("qs", 0, 4, 16), Bits("qh", 4, 1, 1)),
    "Q5_1": (Bits("qs", 0, 4, 16), Bits("qh", 4, 1, 1)),
    "Q8_0": (Bits("qs", 0, 8, 1),),
    "IQ4_NL": (Bits("qs", 0, 4, 16),),
    "Q2_K": (Bits("qs", 0, 2, 32),),
    "Q3_K": (Bits("qs", 0, 2, 32), Bits("hmask", 2, 1, 32)),
    "Q4_K": (Bits("qs", 0, 4, 32),),
    "Q5_K": (Bits("qs", 0, 4, 32), Bits("qh", 4, 1, 32)),
    "Q6_K": (Bits("ql", 0, 4, 64), Bits("qh", 4, 2, 32)),
    "IQ4_XS": (Bits("qs", 0, 4, 16),),
}


def row_of(qtype: str) -> BlockRow:
    """How the searches see a format. Raises KeyError for one whose codes cannot be chosen apart."""
    return AFFINE[qtype] if qtype in AFFINE else SCALE[qtype]


def with_codes(data: U8, qtype: str, codes: I16) -> U8:
    """The same blocks with other codes.

    Args:
        data: uint8[rows, row_bytes], from ``kernels.quantize``.
        qtype: a key of ``CODE_BITS``.
        codes: i16[rows, columns] from ``Grid.lowest`` to ``Grid.highest`` of ``grid_of``.
    """
    kind, row = QTYPES[qtype], row_of(qtype)
    out = data.reshape(-1, kind.type_size).copy()
    stored = codes.reshape(-1, kind.block_size)
    if not row.table and qtype != "Q8_0":  # Q8_0 stores signed bytes, tables are counted from 0 already
        stored = stored - np.int16(row.low)
    unsigned = stored.astype(np.uint8)
    for bits in CODE_BITS[qtype]:
        per_byte = 8 // bits.width
        runs = (unsigned >> bits.shift & (1 << bits.width) - 1).reshape(len(out), -1, per_byte, bits.gap)
        packed = np.zeros((len(out), runs.shape[1], bits.gap), np.uint8)
        for place in range(per_byte):
            packed |= runs[:, :, place] << place * bits.width
        at = kind.offset(bits.field)
        out[:, at : at + kind.block_size * bits.width // 8] = packed.reshape(len(out), -1)
    return out.reshape(data.shape)


def grid_of(data: U8, qtype: str) -> Grid:
    """Where the weights of these blocks can lie. Group g of a row is its g-th run of weights that share a scale.

    Args:
        data: uint8[rows, row_bytes], from ``kernels.quantize``.
        qtype: a key of ``CODE_BITS``.
    """
    row, kind = row_of(qtype), QTYPES[qtype]
    rows, columns = len(data), data.shape[1] // kind.type_size * kind.block_size
    zero, one = (int(np.flatnonzero(IQ4_VALUES == 1)[0]),) * 2 if row.table else (0, 1)
    codes = np.full((rows, columns), zero, np.int16)
    firsts = np.arange(0, columns, row.size)
    offset = np.zeros((rows, len(firsts)), np.float32)
    if not row.table:
        offset = dequantize(with_codes(data, qtype, codes), qtype)[:, firsts]
    codes[:] = one
    scale = dequantize(with_codes(data, qtype, codes), qtype)[:, firsts] - offset
    group_of = (np.arange(columns) // row.size).astype(np.int32)
    if row.table:
        return Grid(scale, offset, group_of, 0, len(IQ4_VALUES) - 1, IQ4_VALUES)
    return Grid(scale, offset, group_of, row.low, row.high)
