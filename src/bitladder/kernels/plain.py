"""Plain encoding of blocks of 32: the scale from the largest weight or the range alone, codes to the nearest.

What the two searches write when there is nothing to search, byte for byte (``Search.plain``), without their detour: a
block is two vectors, so its codes leave in the order in which its weights came. Only its extremes take the way through
lanes, sixteen blocks at once, because dividing and rounding to float16 are dear.
"""

from __future__ import annotations

from typing import Any

from bitladder.kernels.lanes import (
    helper,
    highest_of_rows,
    kernel,
    load,
    lowest_of_rows,
    maximum,
    minimum,
    nearest,
    reciprocal,
    splat,
    store,
    store_bits,
    store_f16,
    store_u8,
    to_f16,
    where,
)
from bitladder.kernels.rows import PackLayout
from bitladder.kernels.sixteen import scale_f16

SIZE = 32


@helper
def held(x: Any) -> Any:
    """x within +-1e15, where squares and differences stay finite, as the searches see it."""
    return maximum(minimum(x, splat(1e15)), splat(-1e15))


@helper
def write_nibbles(a: Any, b: Any, fifth: Any, out: Any, at: Any) -> Any:
    """Codes of weights 0 to 15 and 16 to 31 as bytes BBBBAAAA, their fifth bits in four bytes before."""
    if fifth:
        limit, step = splat(15.5), splat(16.0)
        store_bits(out, at, a > limit)
        store_bits(out, at + 2, b > limit)
        a = a - where(a > limit, step, splat(0.0))
        b = b - where(b > limit, step, splat(0.0))
        at += 4
    store_u8(out, at, a + splat(16.0) * b)


@kernel
def quantize_plain(x: Any, row: Any, scratch: Any, tile: Any, places: Any, out: Any) -> Any:
    """Blocks of 32 f32 x, one after another, to their bytes in ``out``.

    ``row`` as in ``rows.py``; its lowest code is 0 in formats with a minimum. To work in: ``scratch`` f32[32], ``tile``
    u8[16 type_size], ``places`` i64[16].
    """
    blocks, type_size = x.size // SIZE, tile.size // 16
    low, high = splat(row.low), splat(row.high)
    with_minimum, fifth = row.low == 0, (row.packing == PackLayout.Q5_1) | (row.packing == PackLayout.Q5_0)
    header = 4 if with_minimum else 2
    for first in range(0, blocks, 16):
        for lane in range(16):
            places[lane] = SIZE * min(first + lane, blocks - 1)
        lowest, highest = held(lowest_of_rows(x, places)), held(highest_of_rows(x, places))
        if with_minimum:
            d, m = scale_f16((highest - lowest) / high), to_f16(splat(0.0) - lowest)
            store_f16(tile, 32, splat(0.0) - m)
        else:
            largest = where(highest >= splat(0.0) - lowest, highest, lowest)
            d, m = scale_f16(largest / low), splat(0.0)
        store_f16(tile, 0, d)
        store(scratch, 0, reciprocal(d))
        store(scratch, 16, m)
        for lane in range(min(16, blocks - first)):
            at = (first + lane) * type_size
            for i in range(0, header, 2):
                out[at + i], out[at + i + 1] = tile[16 * i + lane], tile[16 * i + 16 + lane]
            inverse, lift = splat(scratch[lane]), splat(scratch[16 + lane])
            source = SIZE * (first + lane)
            a, b = load(x, source), load(x, source + 16)
            if with_minimum:
                a, b = a + lift, b + lift
            a = nearest(minimum(maximum(a * inverse, low), high))
            b = nearest(minimum(maximum(b * inverse, low), high))
            if row.packing == PackLayout.Q8_0:
                store_u8(out, at + 2, a)
                store_u8(out, at + 18, b)
            else:
                write_nibbles(a - low, b - low, fifth, out, at + header)
