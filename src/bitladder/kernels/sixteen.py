"""Sixteen blocks at a time: how a search holds them, and their way in and out."""

from __future__ import annotations

from typing import Any, NamedTuple

from bitladder.kernels.lanes import (
    helper,
    kernel,
    load_transposed,
    magnitude,
    splat,
    store,
    store_transposed,
    to_f16,
    where,
)
from bitladder.kernels.rows import BlockRow


class Sixteen(NamedTuple):
    """Blocks in search, one per lane (in ``gpu.py`` all there are). A row of ``state`` is a value per sub-block."""

    x: Any
    """Weights: weight k of the block in lane i at [16 k + i]."""
    w: Any
    """What their squared errors count."""
    state: Any
    n: Any
    """The length of a row of the state: 16 per sub-block."""
    low: Any
    high: Any
    """The lowest and the highest code, in lanes."""
    row: BlockRow


@helper
def scale_f16(x: Any) -> Any:
    """The float16 nearest to a scale; the smallest there is instead of zero where the scale is none: all weights of the
    block would vanish with it."""
    stored, zero, least = to_f16(x), splat(0.0), splat(2.0**-24)
    lifted = where(x > zero, least, where(x < zero, zero - least, zero))
    return where(magnitude(stored) > zero, stored, lifted)


@helper
def sixteen_in(row: Any, scratch: Any) -> Any:
    """Room for sixteen blocks with equal importance, and for their codes, in f32[``BlockRow.scratch``]."""
    length = 16 * row.parts * row.size
    for i in range(2 * length, 3 * length, 16):
        store(scratch, i, splat(1.0))
    low, high = splat(row.low), splat(row.high)
    blocks = Sixteen(scratch, scratch[2 * length :], scratch[3 * length :], 16 * row.parts, low, high, row)
    return blocks, scratch[length:]


@helper
def read(blocks: Any, first: Any, x: Any, columns: Any, importance: Any, places: Any, type_size: Any) -> Any:
    """Fill the lanes from block ``first`` of x on, the last block over again where x ends; ``places`` i64[48]
    gets where the blocks start in x, in their rows and in the file."""
    length = blocks.row.parts * blocks.row.size
    source, column, target = places, places[16:], places[32:]
    for lane in range(16):
        block = min(first + lane, x.size // length - 1)
        source[lane], target[lane] = block * length, block * type_size
        column[lane] = block * length % columns
    for i in range(0, length, 16):
        load_transposed(x, source, i, blocks.x, 16 * i)
        if importance.size:
            load_transposed(importance, column, i, blocks.w, 16 * i)


@helper
def write(tile: Any, out: Any, places: Any) -> Any:
    """The bytes in ``tile`` u8[16 type_size] to where ``read`` has found they belong."""
    type_size = tile.size // 16
    for i in range(0, type_size, 16):
        at = min(i, type_size - 16)
        store_transposed(tile, 16 * at, out, places[32:], at)


def kernel_of(encode: Any) -> Any:
    """The kernel of a helper ``encode(blocks, ladder, codes, tile)``, which leaves the bytes of sixteen blocks in
    ``tile``.

    It takes blocks of f32 x, one after another, to their bytes in ``out``. ``importance`` is f32[columns], or empty for
    equal weights; ``columns`` the length of a row of x; ``row`` and ``ladder`` as in ``rows.py``. To work in:
    ``scratch`` f32[``BlockRow.scratch``], ``tile`` u8[16 type_size], ``places`` i64[48].
    """

    @kernel
    def quantize(
        x: Any, columns: Any, importance: Any, row: Any, ladder: Any, scratch: Any, tile: Any, places: Any, out: Any
    ) -> Any:
        blocks, codes = sixteen_in(row, scratch)
        for first in range(0, x.size // (row.parts * row.size), 16):
            read(blocks, first, x, columns, importance, places, tile.size // 16)
            encode(blocks, ladder, codes, tile)
            write(tile, out, places)

    return quantize
