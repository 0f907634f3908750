"""Plain floats, F16 and BF16, and the largest of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitladder.kernels.lanes import kernel


@kernel
def encode_bf16(bits: Any, out: Any) -> None:
    """Nearest bfloat16, ties to even: the upper half of the float32. ``bits`` f32[n] as uint32, ``out`` uint16[n]."""
    for i in range(bits.size):
        out[i] = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@kernel
def decode_bf16(data: Any, bits: Any) -> None:
    """``data`` uint16[n] to ``bits``, f32[n] as uint32."""
    for i in range(bits.size):
        bits[i] = np.uint32(data[i]) << np.uint32(16)


@kernel
def decode_f16(data: Any, bits: Any) -> None:
    """``data`` uint16[n] to ``bits``, f32[n] as uint32, in steps that the compiler turns into vectors; numpy has none
    for it.

    Exponent and fraction move up 13 bits and the exponent's bias grows by 112, or to all ones for NaN and infinity;
    what has no exponent counts in steps of 2^-24.
    """
    for i in range(bits.size):
        h = np.uint32(data[i])
        magnitude = (h & np.uint32(0x7FFF)) << np.uint32(13)
        exponent = magnitude & np.uint32(0x0F800000)
        bias = np.uint32(0x70000000) if exponent == np.uint32(0x0F800000) else np.uint32(0x38000000)
        tiny = np.float32(np.float32(np.int32(h & np.uint32(0x3FF))) * np.float32(2.0**-24)).view(np.uint32)
        size = tiny if exponent == np.uint32(0) else magnitude + bias
        bits[i] = size | ((h & np.uint32(0x8000)) << np.uint32(16))  # one store: with two nothing becomes vectors


@kernel
def largest_bits(bits: Any) -> Any:
    """The largest of ``bits``, f32 as uint32, without their signs: magnitudes are ordered as their bits are, infinity
    and NaN above all others."""
    found = np.uint32(0)
    for i in range(bits.size):
        found = max(found, bits[i] & np.uint32(0x7FFFFFFF))
    return np.int64(found)
