"""Bytes back to weights, one short loop per layout, with the operations of the ``gguf`` package in its order.

Multiplying and adding round after each step as there, so results are equal bit for bit. The layouts are drawn in
``pack.py``. ``half`` holds every float16 as float32; ``data`` holds blocks one after another, ``out`` their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bitladder.kernels.lanes import helper, kernel
from bitladder.kernels.scale import IQ4_VALUES


@helper
def f16_at(data: Any, at: Any, half: Any) -> Any:
    """The float16 at a byte."""
    return half[np.uint16(data[at]) | (np.uint16(data[at + 1]) << np.uint16(8))]


@kernel
def decode_q8_0(data: Any, out: Any, half: Any) -> None:
    """Q8_0: d, qs 32 (signed)."""
    for b in range(out.size // 32):
        at = 34 * b
        d = f16_at(data, at, half)
        for j in range(32):
            out[32 * b + j] = np.float32(np.int8(data[at + 2 + j])) * d


@kernel
def decode_q4_0(data: Any, out: Any, half: Any) -> None:
    """Q4_0: d, qs 16; codes 8 too high."""
    for b in range(out.size // 32):
        at = 18 * b
        d = f16_at(data, at, half)
        for j in range(16):
            byte = data[at + 2 + j]
            out[32 * b + j] = d * np.float32(np.int32(byte & 15) - 8)
            out[32 * b + 16 + j] = d * np.float32(np.int32(byte >> 4) - 8)


@kernel
def decode_q4_1(data: Any, out: Any, half: Any) -> None:
    """Q4_1: d, m, qs 16."""
    for b in range(out.size // 32):
        at = 20 * b
        d, m = f16_at(data, at, half), f16_at(data, at + 2, half)
        for j in range(16):
            byte = data[at + 4 + j]
            out[32 * b + j] = d * np.float32(byte & 15) + m
            out[32 * b + 16 + j] = d * np.float32(byte >> 4) + m


@helper
def fifth_bit(data: Any, at: Any, j: Any) -> Any:
    """Bit j of the 32 from a byte on, as 16 or 0."""
    return ((np.int32(data[at + (j >> 3)]) >> (j & 7)) & 1) << 4


@kernel
def decode_q5_0(data: Any, out: Any, half: Any) -> None:
    """Q5_0: d, qh 4, qs 16; codes 16 too high."""
    for b in range(out.size // 32):
        at = 22 * b
        d = f16_at(data, at, half)
        for j in range(16):
            byte = data[at + 6 + j]
            low = np.int32(byte & 15) | fifth_bit(data, at + 2, j)
            high = np.int32(byte >> 4) | fifth_bit(data, at + 2, j + 16)
            out[32 * b + j] = d * np.float32(low - 16)
            out[32 * b + 16 + j] = d * np.float32(high - 16)


@kernel
def decode_q5_1(data: Any, out: Any, half: Any) -> None:
    """Q5_1: d, m, qh 4, qs 16."""
    for b in range(out.size // 32):
        at = 24 * b
        d, m = f16_at(data, at, half), f16_at(data, at + 2, half)
        for j in range(16):
            byte = data[at + 8 + j]
            low = np.int32(byte & 15) | fifth_bit(data, at + 4, j)
            high = np.int32(byte >> 4) | fifth_bit(data, at + 4, j + 16)
            out[32 * b + j] = d * np.float32(low) + m
            out[32 * b + 16 + j] = d * np.float32(high) + m


@kernel
def decode_q2_k(data: Any, out: Any, half: Any) -> None:
    """Q2_K: scales 16 (MMMMSSSS), qs 64, d, dmin."""
    for b in range(out.size // 256):
        at = 84 * b
        d, dmin = f16_at(data, at + 80, half), f16_at(data, at + 82, half)
        for part in range(16):
            scale = data[at + part]
            step, low = d * np.float32(scale & 15), dmin * np.float32(scale >> 4)
            # 16 weights: half of the 32 at one shift of one 32 bytes
            source, shift = at + 16 + 32 * (part >> 3) + 16 * (part & 1), np.uint8(2 * ((part >> 1) & 3))
            for j in range(16):
                code = (data[source + j] >> shift) & np.uint8(3)
                out[256 * b + 16 * part + j] = step * np.float32(code) - low


@kernel
def decode_q3_k(data: Any, out: Any, half: Any) -> None:
    """Q3_K: hmask 32, qs 64, scales 12, d; a set bit of hmask means 4 is not subtracted."""
    for b in range(out.size // 256):
        at = 110 * b
        d = f16_at(data, at + 108, half)
        for part in range(16):
            low = np.int32(data[at + 96 + (part & 7)]) >> (4 * (part >> 3))
            high = np.int32(data[at + 104 + (part & 3)]) >> (2 * (part >> 2))
            step = d * np.float32(((low & 15) | ((high & 3) << 4)) - 32)
            source, shift = at + 32 + 32 * (part >> 3) + 16 * (part & 1), np.uint8(2 * ((part >> 1) & 3))
            mask, bit = at + 16 * (part & 1), np.uint8(part >> 1)
            for j in range(16):
                code = np.int32((data[source + j] >> shift) & np.uint8(3))
                missing = np.int32((data[mask + j] >> bit) & np.uint8(1)) ^ 1
                out[256 * b + 16 * part + j] = step * np.float32(code - (missing << 2))


@helper
def decode_q45_k(data: Any, out: Any, half: Any, fifth: Any) -> None:
    """Q4_K: d, dmin, scales 12, qs 128. Q5_K: d, dmin, scales 12, qh 32, qs 128."""
    type_size, codes = (176, 48) if fifth else (144, 16)
    for b in range(out.size // 256):
        at = type_size * b
        d, dmin = f16_at(data, at, half), f16_at(data, at + 2, half)
        for part in range(8):
            s, m = data[at + 4 + (part & 3)], data[at + 8 + (part & 3)]
            if part < 4:
                s, m = s & np.uint8(63), m & np.uint8(63)
            else:
                both = data[at + 8 + part]
                s = (both & np.uint8(15)) | ((s >> np.uint8(2)) & np.uint8(48))
                m = (both >> np.uint8(4)) | ((m >> np.uint8(2)) & np.uint8(48))
            step, low = d * np.float32(s), dmin * np.float32(m)
            source, shift = at + codes + 32 * (part >> 1), np.uint8(4 * (part & 1))
            for j in range(32):
                code = (data[source + j] >> shift) & np.uint8(15)
                if fifth:
                    code |= ((data[at + 16 + j] >> np.uint8(part)) & np.uint8(1)) << np.uint8(4)
                out[256 * b + 32 * part + j] = step * np.float32(code) - low


@kernel
def decode_q4_k(data: Any, out: Any, half: Any) -> None:
    """Q4_K."""
    decode_q45_k(data, out, half, False)


@kernel
def decode_q5_k(data: Any, out: Any, half: Any) -> None:
    """Q5_K."""
    decode_q45_k(data, out, half, True)


@kernel
def decode_q6_k(data: Any, out: Any, half: Any) -> None:
    """Q6_K: ql 128, qh 64, scales 16 (signed), d; codes 32 too high."""
    for b in range(out.size // 256):
        at = 210 * b
        d = f16_at(data, at + 208, half)
        for part in range(16):
            step = d * np.float32(np.int8(data[at + 192 + part]))
            side, group = part >> 3, (part >> 1) & 3
            low = at + 64 * side + 32 * (group & 1) + 16 * (part & 1)
            high = at + 128 + 32 * side + 16 * (part & 1)
            low_shift, high_shift = np.uint8(4 * (group >> 1)), np.uint8(2 * group)
            for j in range(16):
                code = np.int32((data[low + j] >> low_shift) & np.uint8(15))
                code |= np.int32((data[high + j] >> high_shift) & np.uint8(3)) << 4
                out[256 * b + 16 * part + j] = step * np.float32(code - 32)


@kernel
def decode_iq4_nl(data: Any, out: Any, half: Any) -> None:
    """IQ4_NL: d, qs 16; codes number the values of a table."""
    for b in range(out.size // 32):
        at = 18 * b
        d = f16_at(data, at, half)
        for j in range(16):
            byte = data[at + 2 + j]
            out[32 * b + j] = d * IQ4_VALUES[byte & 15]
            out[32 * b + 16 + j] = d * IQ4_VALUES[byte >> 4]


@kernel
def decode_iq4_xs(data: Any, out: Any, half: Any) -> None:
    """IQ4_XS: d, scales_h 2, scales_l 4, qs 128; scales 32 too high, codes number the values of a table."""
    for b in range(out.size // 256):
        at = 136 * b
        d = f16_at(data, at, half)
        for part in range(8):
            low = (np.int32(data[at + 4 + (part >> 1)]) >> (4 * (part & 1))) & 15
            high = (np.int32(data[at + 2 + (part >> 2)]) >> (2 * (part & 3))) & 3
            step = d * np.float32((low | (high << 4)) - 32)
            for j in range(16):
                byte = data[at + 8 + 16 * part + j]
                out[256 * b + 32 * part + j] = step * IQ4_VALUES[byte & 15]
                out[256 * b + 32 * part + 16 + j] = step * IQ4_VALUES[byte >> 4]


DECODERS: dict[str, Callable[[Any, Any, Any], None]] = {
    "Q8_0": decode_q8_0,
    "Q4_0": decode_q4_0,
    "Q4_1": decode_q4_1,
    "Q5_0": decode_q5_0,
    "Q5_1": decode_q5_1,
    "Q2_K": decode_q2_k,
    "Q3_K": decode_q3_k,
    "Q4_K": decode_q4_k,
    "Q5_K": decode_q5_k,
    "Q6_K": decode_q6_k,
    "IQ4_NL": decode_iq4_nl,
    "IQ4_XS": decode_iq4_xs,
}
