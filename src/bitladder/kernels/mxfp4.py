"""GGUF's MXFP4: 32 weights of four bits (E2M1, ``minifloats.py``) with a power of two as scale. A block's bytes:

    e       1     the power (E8M0, bias 127)
    qs     16     BBBBAAAA: weight k of the first half in the low bits, weight k + 16 in the high ones

Of three powers, the one that just holds the largest weight and its neighbours, each block gets the one whose rounding
costs least: ggml's own, which goes by the largest weight alone, is among them. Arrays of numpy do: there is nothing to
look for beside the powers, and a type of experts alone is written once in a while.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitladder.kernels import minifloats

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

SIZE = 32
_LARGEST = 252
"""The largest power whose steps float32 holds."""
_OFFSETS = (0, 1, -1)
_CODE_OF = np.zeros(13, np.uint8)
_CODE_OF[[0, 1, 2, 3, 4, 6, 8, 12]] = np.arange(8)
"""Codes of E2M1 by twice their value."""


def encode(weights: F32, importance: F32 | None, out: U8) -> None:
    """Write blocks.

    Args:
        weights: f32[rows, columns], columns a multiple of 32.
        importance: f32[columns], what a squared error of each column costs; None: all the same.
        out: u8[rows, columns / 32 * 17].
    """
    rows = len(weights)
    blocks = weights.reshape(-1, SIZE)
    heights = np.ones((1, SIZE), np.float32)
    if importance is not None:
        heights = np.tile(importance.reshape(-1, SIZE), (rows, 1))
    peak = np.abs(blocks).max(axis=1)
    plain = np.frexp(peak / np.float32(1.75))[1] + 127 - 2
    power = np.zeros(len(blocks), np.uint8)
    steps = np.zeros(blocks.shape, np.float32)
    least = np.full(len(blocks), np.inf, np.float32)
    for offset in _OFFSETS:
        tried = np.clip(plain + offset, 0, _LARGEST).astype(np.uint8)
        scale = minifloats.e8m0(tried)[:, None]
        found = _nearest(blocks / scale)
        with np.errstate(over="ignore"):  # of numbers near the end of float32 the plain power is kept
            wrong = (np.square(found * scale - blocks) * heights).sum(axis=1)
        better = (wrong < least) if offset else np.ones(len(blocks), bool)
        power[better], steps[better], least[better] = tried[better], found[better], wrong[better]
    codes = _CODE_OF[np.abs(2 * steps).astype(np.intp)] | (np.signbit(steps).astype(np.uint8) << np.uint8(3))
    room = out.reshape(-1, 1 + SIZE // 2)
    room[:, 0] = power
    room[:, 1:] = codes[:, : SIZE // 2] | (codes[:, SIZE // 2 :] << np.uint8(4))


def _nearest(x: F32) -> F32:
    """The nearest values of E2M1, ties to the even code."""
    size = np.minimum(np.abs(x), np.float32(6))
    step = np.where(size < 2, np.float32(0.5), np.where(size < 4, np.float32(1), np.float32(2)))
    return np.asarray(np.copysign(np.rint(size / step) * step, x), np.float32)
