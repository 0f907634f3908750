"""Floats of eight and four bits, as checkpoints store them, and scales spread over the weights that share them.

    E4M3    s eeee mmm    bias 7, the largest 448; all ones is NaN, and there is no infinity
    E5M2    s eeeee mm    the upper byte of a float16
    E8M0      eeeeeeee    a power of two, bias 127; all ones is NaN
    E2M1    s ee m        bias 1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives

Source: the OCP specifications OFP8 and "Microscaling Formats (MX)", version 1.0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def _e4m3() -> F32:
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    size[codes & 0x7F == 0x7F] = np.nan
    return (np.where(codes & 0x80, -1, 1) * size).astype(np.float32)


def _e2m1() -> F32:
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([sizes, -sizes])


def _e8m0() -> F32:
    powers = (np.arange(256, dtype=np.uint32) << np.uint32(23)).view(np.float32).copy()  # exponents of float32
    powers[[0, 255]] = 2.0**-127, np.nan
    return powers


_E4M3, _E2M1, _E8M0 = _e4m3(), _e2m1(), _e8m0()


def e4m3(codes: U8) -> F32:
    """Values of E4M3 codes, in their shape."""
    return _E4M3[codes]


def e5m2(codes: U8) -> F32:
    """Values of E5M2 codes, in their shape."""
    return (codes.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)


def e8m0(codes: U8) -> F32:
    """Values of E8M0 codes, in their shape."""
    return _E8M0[codes]


def e2m1(codes: U8) -> F32:
    """Values of E2M1 codes, one to a byte, in their shape."""
    return _E2M1[codes]


def e2m1_pairs(packed: U8) -> F32:
    """Values ``f32[..., 2 n]`` of E2M1 codes ``u8[..., n]``, two to a byte, the first in the low half."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return _E2M1[codes]


def pair(codes: U8) -> U8:
    """E2M1 codes ``u8[..., 2 n]``, two to a byte, the first in the low half: the inverse of unpacking."""
    return np.ascontiguousarray(codes[..., ::2] | codes[..., 1::2] << 4)


def spread(scales: F32, shape: tuple[int, int], block: tuple[int, int]) -> F32:
    """Scales of blocks of ``block`` weights as ``f32[shape]``, or as what broadcasts to it; blocks at the lower and the
    right edge may be part empty.

    Raises:
        ValueError: there are not as many scales as blocks.
    """
    wanted = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
    if scales.shape != wanted:
        raise ValueError(f"scales of shape {scales.shape} for {shape} in blocks of {block}: {wanted} are expected")
    for axis, (size, step) in enumerate(zip(shape, block, strict=True)):
        if 1 < step < size:
            scales = np.repeat(scales, step, axis)[(slice(None),) * axis + (slice(size),)]
    return scales
