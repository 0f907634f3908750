"""Affine groups: a scale, and for asymmetric ones a zero point, per group of neighbouring weights of a row.

    value = (code - zero) * scale,     code in 0 .. 2^b - 1,     symmetric: zero = 2^(b-1)

``search`` looks for the
scale and zero that cost least when every column has a weight of its own: for each of several starting scales
it rounds, then takes the scale that fits those codes best, ``s = sum(h w c) / sum(h c c)`` with ``c = code -
zero``; its error is in closed form, ``sum(h w w) - sum(h w c)^2 / sum(h c c)``, so each candidate takes one
pass. A symmetric scale may turn out negative: codes reach one step further down than up, and the sign lets
the larger side have that step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from bitladder.kernels.grid import F32, Grid, contiguous_groups

_LANES = 32
_SEARCHED_AT_ONCE = 1 << 24
"""Weights that lie side by side in a copy: 64 MiB."""
_ROWS_AT_ONCE = 512
SHRINKS = np.linspace(1.05, 0.55, 21).astype(np.float32)
"""Candidate scales, as shares of the one that just holds the largest weight."""


@dataclass(frozen=True)
class Affine:
    """Scales ``f32[rows, groups]``, zeros ``i16[rows, groups]``, for codes of ``bits`` bits in groups of
    ``group_size``."""

    scales: F32
    zeros: npt.NDArray[np.int16]
    bits: int
    group_size: int
    columns: int

    def grid(self) -> Grid:
        """The same as a Grid, for rounding with error feedback."""
        offset = (-self.zeros * self.scales).astype(np.float32)
        return Grid(self.scales, offset, contiguous_groups(self.columns, self.group_size), 0, 2**self.bits - 1)

    def nearest(self, weights: F32) -> npt.NDArray[np.int16]:
        """The code of the nearest value for each of ``f32[rows, columns]``."""
        return self.grid().nearest(weights)

    def rows(self, rows: slice) -> Affine:
        """The parameters of some rows."""
        return replace(self, scales=self.scales[rows], zeros=self.zeros[rows])

    def decode(self, codes: npt.NDArray[np.integer]) -> F32:
        """Weights ``f32[rows, columns]`` of ``codes``, exactly as a reader of the file computes them."""
        group = contiguous_groups(self.columns, self.group_size)
        decoded = np.empty(codes.shape, np.float32)
        for start in range(0, len(codes), _ROWS_AT_ONCE):  # little memory beside the result
            rows = slice(start, start + _ROWS_AT_ONCE)
            centred = codes[rows].astype(np.int32) - self.zeros[rows][:, group]
            np.multiply(centred.astype(np.float32), self.scales[rows][:, group], out=decoded[rows])
        return decoded


def store_scale(scales: F32, dtype: str = "float16") -> F32:
    """Scales as a file will hold them, back in f32: ``float16`` (never subnormal, so never zero), ``bfloat16``
    or ``float32``.

    Raises:
        ValueError: a scale is too large for float16, or no such dtype.
    """
    if dtype == "float16":
        tiny, most = np.float32(np.finfo(np.float16).tiny), float(np.finfo(np.float16).max)
        if (largest := float(np.abs(scales).max(initial=0))) > most:
            raise ValueError(f"a scale of {largest:g} does not fit float16")
        held = scales.astype(np.float16).astype(np.float32)
        return np.where(np.abs(held) < tiny, np.copysign(tiny, scales), held).astype(np.float32)
    if dtype == "bfloat16":
        raw = np.ascontiguousarray(scales, np.float32).view(np.uint32)
        rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return rounded.view(np.float32)
    if dtype == "float32":
        return scales
    raise ValueError(f"scales are stored as float16, bfloat16 or float32, not {dtype}")


def search(
    weights: F32,
    bits: int,
    group_size: int,
    *,
    sym: bool = True,
    importance: F32 | None = None,
    least_zero: int = 0,
    scale_dtype: str = "float16",
    shrinks: F32 = SHRINKS,
    signed: bool = True,
) -> Affine:
    """Scales and zeros of ``weights f32[rows, columns]`` that cost least under column weights ``importance
    f32[columns]``.

    Args:
        weights: Finite; ``group_size`` divides the columns (0: the whole row is one group).
        bits: 2 to 8.
        group_size: Columns that share a scale.
        sym: Zero in the middle of the codes, or free.
        importance: Weight of each column, at least 0; None for equal ones.
        least_zero: Smallest zero point allowed: 1 for GPTQ's first layout, which stores ``zero - 1``.
        scale_dtype: What the file stores; scales come back rounded to it.
        shrinks: Candidate scales, as shares of the one that just holds the largest weight.
        signed: Symmetric scales may be negative.
    """
    rows, columns = weights.shape
    size = group_size or columns
    groups = columns // size
    column_weight = np.ones(columns, np.float32) if importance is None else importance.astype(np.float32)
    # A group that no calibration token excites still has to be stored well: equal weights there.
    dead = column_weight.reshape(groups, size).max(axis=1) <= 0
    column_weight = np.where(np.repeat(dead, size), np.float32(1), column_weight)
    scales = np.empty((rows, groups), np.float32)
    zeros = np.empty((rows, groups), np.int16)
    candidates = np.asarray(shrinks, np.float32)
    both = np.concatenate([candidates, -candidates]) if signed else candidates
    at_once = max(_LANES, _SEARCHED_AT_ONCE // columns)
    for start in range(0, rows, at_once):
        some = slice(start, start + at_once)
        lanes = np.ascontiguousarray(weights[some].T, np.float32)
        own, zero = np.empty((groups, lanes.shape[1]), np.float32), np.empty((groups, lanes.shape[1]), np.int16)
        if sym:
            _search_symmetric(lanes, column_weight, size, 2**bits - 1, both, own, zero)
        else:
            _search_asymmetric(lanes, column_weight, size, 2**bits - 1, least_zero, candidates, own, zero)
        scales[some], zeros[some] = own.T, zero.T
    return Affine(store_scale(scales, scale_dtype), zeros, bits, group_size, columns)


@njit(cache=True, parallel=True)
def _search_symmetric(
    lanes: F32,
    column_weight: F32,
    size: int,
    top: int,
    shrinks: F32,
    scales: F32,
    zeros: npt.NDArray[np.int16],
) -> None:
    """``lanes f32[columns, rows]``: rows side by side, a tile of them through all candidates at once.

    Loops over a tile have a fixed length and arrays of their own, which LLVM needs to vectorise them: four times as
    fast as over parts of the whole arrays.
    """
    groups, rows = scales.shape
    tiles = (rows + _LANES - 1) // _LANES
    zero = np.float32((top + 1) // 2)
    low, high = -zero, np.float32(top) - zero
    for job in prange(groups * tiles):
        group, first = job // tiles, (job % tiles) * _LANES
        count = min(_LANES, rows - first)
        own = np.zeros((size, _LANES), np.float32)
        own[:, :count] = lanes[group * size : (group + 1) * size, first : first + count]
        heights = column_weight[group * size : (group + 1) * size]
        largest, best = np.zeros(_LANES, np.float32), np.full(_LANES, np.float32(-1))
        up, down, inverse = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
        scale = np.zeros(_LANES, np.float32)
        for k in range(size):
            for r in range(_LANES):
                largest[r] = max(largest[r], abs(own[k, r]))
        for share in shrinks:
            for r in range(_LANES):
                inverse[r] = zero / (largest[r] * share) if largest[r] > 0 else np.float32(0)
                up[r] = down[r] = np.float32(0)
            for k in range(size):
                for r in range(_LANES):
                    step = np.rint(own[k, r] * inverse[r])
                    step = max(low, min(high, step))
                    heavy = heights[k] * step
                    up[r] += heavy * own[k, r]
                    down[r] += heavy * step
            for r in range(_LANES):
                if down[r] > 0 and up[r] * up[r] / down[r] > best[r]:
                    best[r] = up[r] * up[r] / down[r]
                    scale[r] = up[r] / down[r]
        for r in range(count):
            scales[group, first + r] = scale[r] if best[r] > 0 else max(largest[r] / zero, np.float32(1e-4))
            zeros[group, first + r] = np.int16(zero)


@njit(cache=True, parallel=True)
def _search_asymmetric(
    lanes: F32,
    column_weight: F32,
    size: int,
    top: int,
    least_zero: int,
    shrinks: F32,
    scales: F32,
    zeros: npt.NDArray[np.int16],
) -> None:
    """As ``_search_symmetric``; every share of the range is tried with the zero below and the one above."""
    groups, rows = scales.shape
    tiles = (rows + _LANES - 1) // _LANES
    least, most = np.float32(least_zero), np.float32(top)
    for job in prange(groups * tiles):
        group, first = job // tiles, (job % tiles) * _LANES
        count = min(_LANES, rows - first)
        own = np.zeros((size, _LANES), np.float32)
        own[:, :count] = lanes[group * size : (group + 1) * size, first : first + count]
        heights = column_weight[group * size : (group + 1) * size]
        low, high = np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
        best = np.full(_LANES, np.float32(-1))
        up, down, inverse = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
        zero, scale, kept = np.empty(_LANES, np.float32), np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
        for k in range(size):
            for r in range(_LANES):
                low[r] = min(low[r], own[k, r])
                high[r] = max(high[r], own[k, r])
        for candidate in range(2 * len(shrinks)):
            share = shrinks[candidate // 2]
            for r in range(_LANES):
                reach = (high[r] - low[r]) * share
                inverse[r] = most / reach if reach > 0 else np.float32(0)
                at = -low[r] * share * inverse[r]
                near = np.floor(at) if candidate % 2 == 0 else np.ceil(at)
                zero[r] = max(least, min(most, near))
                up[r] = down[r] = np.float32(0)
            for k in range(size):
                for r in range(_LANES):
                    step = np.rint(own[k, r] * inverse[r])
                    step = max(-zero[r], min(most - zero[r], step))
                    heavy = heights[k] * step
                    up[r] += heavy * own[k, r]
                    down[r] += heavy * step
            for r in range(_LANES):
                if down[r] > 0 and up[r] > 0 and up[r] * up[r] / down[r] > best[r]:
                    best[r] = up[r] * up[r] / down[r]
                    scale[r], kept[r] = up[r] / down[r], zero[r]
        for r in range(count):
            found = best[r] > 0
            scales[group, first + r] = scale[r] if found else max((high[r] - low[r]) / top, np.float32(1e-4))
            zeros[group, first + r] = np.int16(kept[r]) if found else np.int16(max(least_zero, top // 2))
