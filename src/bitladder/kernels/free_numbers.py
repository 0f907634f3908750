"""The float16 numbers of blocks, apart from all else that they hold: what can be tuned while codes stay.

With its codes and whole-number scales fixed, a block's weights are linear in them, ``w = d a + dmin b``, and a is what
the block decodes to with d = 1 and dmin = 0. So no format is unpacked here: a block is decoded once for each number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitladder.formats.blocks import QTYPES, TRAINED
from bitladder.kernels.api import dequantize
from bitladder.kernels.grid import F32

U8 = NDArray[np.uint8]

_FIELDS = ("d", "dmin", "m")
_LARGEST = 65504.0


Grain = Literal["each", "rows", "whole"]
"""Which numbers of a tensor move by one share: each by its own; those of a row alike, of each kind; all of a kind."""


def shape_of(grain: Grain, shape: Sequence[int]) -> tuple[int, ...]:
    """Of the shares by which numbers of a shape move: f32[rows, blocks, numbers], or a norm's weights."""
    if grain == "each":
        return tuple(shape)
    if len(shape) < 3:
        return (1,) * len(shape)
    return (shape[0] if grain == "rows" else 1, 1, *shape[2:])


def free_fields(qtype: str) -> tuple[str, ...]:
    """The fields of a block that hold one float16 each by which all of its weights scale, or a part of each weight;
    none of formats that have none (floats, IQ1_M) and of those that models are trained in."""
    if qtype in TRAINED or not QTYPES[qtype].is_quantized:
        return ()
    return tuple(name for name, size in QTYPES[qtype].fields if name in _FIELDS and size == 2)


def numbers_of(data: U8, qtype: str) -> F32:
    """f32[rows, blocks, numbers] of uint8[rows, row_bytes], in the order of ``free_fields``."""
    kind, blocks = QTYPES[qtype], data.reshape(-1, QTYPES[qtype].type_size)
    found = [_read(blocks, kind.offset(field)) for field in free_fields(qtype)]
    return np.stack(found, axis=-1).reshape(len(data), -1, len(found))


def basis_of(data: U8, qtype: str, *, threads: int = 1) -> F32:
    """What each number is multiplied by in each weight: f32[numbers, rows, columns]."""
    fields, kind = free_fields(qtype), QTYPES[qtype]
    found = []
    for own in fields:
        blocks = data.reshape(-1, kind.type_size).copy()
        for field in fields:
            _write(blocks, kind.offset(field), np.full(len(blocks), float(field == own), np.float32))
        found.append(dequantize(blocks.reshape(data.shape), qtype, threads=threads))
    return np.stack(found)


def with_numbers(data: U8, qtype: str, numbers: F32) -> U8:
    """The same blocks with other numbers f32[rows, blocks, numbers], each the nearest float16."""
    kind = QTYPES[qtype]
    blocks = data.reshape(-1, kind.type_size).copy()
    for place, field in enumerate(free_fields(qtype)):
        _write(blocks, kind.offset(field), numbers[:, :, place].reshape(-1))
    return blocks.reshape(data.shape)


def slopes(basis: F32, gradient: F32, blocks: int) -> F32:
    """The gradient f32[rows, blocks, numbers] of the numbers, of that of the weights f32[rows, columns]."""
    rows, columns = gradient.shape
    each = basis.reshape(len(basis), rows, blocks, columns // blocks)
    own = gradient.reshape(rows, blocks, columns // blocks)
    return np.ascontiguousarray(np.einsum("krbc,rbc->rbk", each, own, optimize=True), np.float32)


def _read(blocks: U8, at: int) -> F32:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0].astype(np.float32)


def _write(blocks: U8, at: int, values: F32) -> None:
    held = np.clip(values, -_LARGEST, _LARGEST).astype(np.float16)
    blocks[:, at : at + 2] = held[:, None].view(np.uint8)
