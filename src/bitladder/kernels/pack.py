"""Codes and scales of sixteen blocks to the bytes of the file, one short function per layout.

Codes and scales are whole numbers in float32, so fields are joined by multiplying and adding and taken apart by
``div``. Byte j of the block in lane i is ``tile[16 * j + i]``; weight k of it has its code, from 0 up, at
``codes[16 * k + i]``. Drawings give a byte's bits from high to low.
"""

from __future__ import annotations

from typing import Any

from bitladder.kernels.lanes import helper, load, nearest, splat, store_f16, store_u8
from bitladder.kernels.rows import PackLayout


@helper
def div(x: Any, step: Any) -> Any:
    """x // step of whole numbers, for a step of 4, 16 or another power of two."""
    return nearest((x - splat(0.5 * (step - 1))) * splat(1.0 / step))


@helper
def mod(x: Any, step: Any) -> Any:
    """x % step of whole numbers."""
    return x - splat(step) * div(x, step)


@helper
def nibbles(codes: Any, first: Any, gap: Any, count: Any, tile: Any, at: Any) -> Any:
    """Low four bits of two weights per byte, ``gap`` weights apart: BBBBAAAA."""
    for j in range(count):
        low = mod(load(codes, 16 * (first + j)), 16)
        high = mod(load(codes, 16 * (first + gap + j)), 16)
        store_u8(tile, 16 * (at + j), low + splat(16.0) * high)


@helper
def crumbs(codes: Any, step: Any, tile: Any, at: Any) -> Any:
    """Two bits of four weights per byte, 32 weights apart: DDCCBBAA; the bits are (code // step) % 4."""
    for half in range(2):
        for j in range(32):
            byte = splat(0.0)
            for k in range(3, -1, -1):
                code = load(codes, 16 * (128 * half + 32 * k + j))
                byte = splat(4.0) * byte + mod(div(code, step), 4)
            store_u8(tile, 16 * (at + 32 * half + j), byte)


@helper
def planes(codes: Any, step: Any, tile: Any, at: Any) -> Any:
    """The bit ``code // step`` of eight weights per byte, 32 weights apart: HGFEDCBA."""
    for j in range(32):
        byte = splat(0.0)
        for k in range(7, -1, -1):
            byte = splat(2.0) * byte + div(load(codes, 16 * (32 * k + j)), step)
        store_u8(tile, 16 * (at + j), byte)


@helper
def fifth_bits(codes: Any, tile: Any, at: Any) -> Any:
    """The bit ``code // 16`` of the 32 weights of a block in a row, lowest first: 4 bytes HGFEDCBA."""
    for j in range(4):
        byte = splat(0.0)
        for k in range(7, -1, -1):
            byte = splat(2.0) * byte + div(load(codes, 16 * (8 * j + k)), 16)
        store_u8(tile, 16 * (at + j), byte)


@helper
def scales_and_minima(s: Any, m: Any, tile: Any, at: Any) -> Any:
    """Eight scales S and minima M of six bits in twelve bytes; j = 0..3, S' and M' are those of j + 4.

    j     S'S'SSSSSS   high two bits of S'
    4+j   M'M'MMMMMM   high two bits of M'
    8+j   M'M'M'M'S'S'S'S'   low four bits of both
    """
    for j in range(4):
        s1, s2 = load(s, 16 * j), load(s, 16 * (j + 4))
        m1, m2 = load(m, 16 * j), load(m, 16 * (j + 4))
        store_u8(tile, 16 * (at + j), s1 + splat(64.0) * div(s2, 16))
        store_u8(tile, 16 * (at + 4 + j), m1 + splat(64.0) * div(m2, 16))
        store_u8(tile, 16 * (at + 8 + j), mod(s2, 16) + splat(16.0) * mod(m2, 16))


@helper
def pack_q2(codes: Any, s: Any, m: Any, d: Any, dmin: Any, tile: Any) -> Any:
    """Q2_K: scales 16 (MMMMSSSS), qs 64, d, dmin."""
    for j in range(16):
        store_u8(tile, 16 * j, load(s, 16 * j) + splat(16.0) * load(m, 16 * j))
    crumbs(codes, 1, tile, 16)
    store_f16(tile, 16 * 80, d)
    store_f16(tile, 16 * 82, dmin)


@helper
def pack_q45(codes: Any, s: Any, m: Any, d: Any, dmin: Any, fifth: Any, tile: Any) -> Any:
    """Q4_K: d, dmin, scales 12, qs 128. Q5_K: d, dmin, scales 12, qh 32, qs 128."""
    store_f16(tile, 0, d)
    store_f16(tile, 16 * 2, dmin)
    scales_and_minima(s, m, tile, 4)
    at = 16
    if fifth:
        planes(codes, 16, tile, at)
        at += 32
    for k in range(4):
        nibbles(codes, 64 * k, 32, 32, tile, at + 32 * k)


@helper
def pack_q3(codes: Any, s: Any, d: Any, tile: Any) -> Any:
    """Q3_K: hmask 32, qs 64, scales 12, d. Scales are stored plus 32; those of j = 0..7 and of i = 0..3:

    j     low four bits of scales j + 8 and j
    8+i   high two bits of scales i + 12, i + 8, i + 4, i
    """
    planes(codes, 4, tile, 0)
    crumbs(codes, 1, tile, 32)
    lift = splat(32.0)
    for j in range(8):
        low, high = mod(load(s, 16 * j) + lift, 16), mod(load(s, 16 * (j + 8)) + lift, 16)
        store_u8(tile, 16 * (96 + j), low + splat(16.0) * high)
    for i in range(4):
        byte = splat(0.0)
        for k in range(3, -1, -1):
            byte = splat(4.0) * byte + div(load(s, 16 * (4 * k + i)) + lift, 16)
        store_u8(tile, 16 * (104 + i), byte)
    store_f16(tile, 16 * 108, d)


@helper
def pack_q6(codes: Any, s: Any, d: Any, tile: Any) -> Any:
    """Q6_K: ql 128, qh 64, scales 16 (signed bytes), d."""
    nibbles(codes, 0, 64, 64, tile, 0)
    nibbles(codes, 128, 64, 64, tile, 64)
    crumbs(codes, 16, tile, 128)
    for j in range(16):
        store_u8(tile, 16 * (192 + j), load(s, 16 * j))
    store_f16(tile, 16 * 208, d)


@helper
def pack_iq4_xs(codes: Any, s: Any, d: Any, tile: Any) -> Any:
    """IQ4_XS: d, scales_h 2, scales_l 4, qs 128. Scales are stored plus 32: low four bits in scales_l, two a byte,
    high two bits in scales_h, four a byte."""
    store_f16(tile, 0, d)
    lift = splat(32.0)
    for j in range(2):
        byte = splat(0.0)
        for k in range(3, -1, -1):
            byte = splat(4.0) * byte + div(load(s, 16 * (4 * j + k)) + lift, 16)
        store_u8(tile, 16 * (2 + j), byte)
    for j in range(4):
        low, high = mod(load(s, 32 * j) + lift, 16), mod(load(s, 32 * j + 16) + lift, 16)
        store_u8(tile, 16 * (4 + j), low + splat(16.0) * high)
    for k in range(8):
        nibbles(codes, 32 * k, 16, 16, tile, 8 + 16 * k)


@helper
def pack_small(codes: Any, d: Any, m: Any, with_m: Any, fifth: Any, tile: Any) -> Any:
    """Q4_0, IQ4_NL: d, qs 16. Q4_1: d, m, qs 16. Q5_0: d, qh 4, qs 16. Q5_1: d, m, qh 4, qs 16."""
    store_f16(tile, 0, d)
    at = 2
    if with_m:
        store_f16(tile, 16 * 2, m)
        at = 4
    if fifth:
        fifth_bits(codes, tile, at)
        at += 4
    nibbles(codes, 0, 16, 16, tile, at)


@helper
def pack_q8(codes: Any, d: Any, tile: Any) -> Any:
    """Q8_0: d, qs 32 (signed bytes). Codes come from 0 up, 127 above the stored ones."""
    store_f16(tile, 0, d)
    for j in range(32):
        store_u8(tile, 16 * (2 + j), load(codes, 16 * j) - splat(127.0))


@helper
def pack_affine(layout: Any, codes: Any, s: Any, m: Any, d: Any, dmin: Any, tile: Any) -> Any:
    """Bytes of the formats with a minimum. ``dmin`` is what is subtracted."""
    if layout == PackLayout.Q2_K:
        pack_q2(codes, s, m, d, dmin, tile)
    elif layout == PackLayout.Q4_K:
        pack_q45(codes, s, m, d, dmin, False, tile)
    elif layout == PackLayout.Q5_K:
        pack_q45(codes, s, m, d, dmin, True, tile)
    else:
        pack_small(codes, d, splat(0.0) - dmin, True, layout == PackLayout.Q5_1, tile)


@helper
def pack_scale(layout: Any, codes: Any, s: Any, d: Any, tile: Any) -> Any:
    """Bytes of the formats without a minimum."""
    if layout == PackLayout.Q8_0:
        pack_q8(codes, d, tile)
    elif layout == PackLayout.Q3_K:
        pack_q3(codes, s, d, tile)
    elif layout == PackLayout.Q6_K:
        pack_q6(codes, s, d, tile)
    elif layout == PackLayout.IQ4_XS:
        pack_iq4_xs(codes, s, d, tile)
    else:
        pack_small(codes, d, d, False, layout == PackLayout.Q5_0, tile)
