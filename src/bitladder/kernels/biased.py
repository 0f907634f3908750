"""Groups with a scale and a bias, both floats: the affine grid of MLX.

    value = scale * code + bias,     code in 0 .. 2^b - 1

``search`` looks for the pair that costs least when every column has a weight of its own. Each of several ranges is
rounded to, and the pair that fits those codes best follows from the normal equations of a line,

    scale = (H sum(h w c) - sum(h w) sum(h c)) / (H sum(h c c) - sum(h c)^2),   bias = (sum(h w) - scale sum(h c)) / H

with ``H = sum(h)``; codes and pair are then found anew from one another a few times. The file holds both numbers in the
float type of the model, and of eight bits a bfloat16 scale may be wrong by half a step at the far end: so the last
choice is among pairs as they will be read back, by errors that are counted, plain rounding's own pair among them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from bitladder.kernels.grid import F32, Grid, contiguous_groups
from bitladder.kernels.groups import store_scale

_LANES = 32
_ROWS_AT_ONCE = 512
_SHARES = np.linspace(1.04, 0.6, 12).astype(np.float32)
_FINE = np.linspace(1.02, 0.9, 4).astype(np.float32)
"""Shares of the range to try; with steps as fine as those of five bits and more, little is ever cut off."""
_REFITS = 3


@dataclass(frozen=True)
class Biased:
    """Scales and biases ``f32[rows, groups]``, as a file holds them, for codes of ``bits`` bits in groups of
    ``group_size``."""

    scales: F32
    biases: F32
    bits: int
    group_size: int
    columns: int

    def grid(self) -> Grid:
        """The same as a Grid, for rounding with error feedback."""
        return Grid(self.scales, self.biases, contiguous_groups(self.columns, self.group_size), 0, 2**self.bits - 1)

    def nearest(self, weights: F32) -> npt.NDArray[np.int16]:
        """The code of the nearest value for each of ``f32[rows, columns]``."""
        return self.grid().nearest(weights)

    def rows(self, rows: slice) -> Biased:
        """Those of some rows."""
        return replace(self, scales=self.scales[rows], biases=self.biases[rows])

    def decode(self, codes: npt.NDArray[np.integer]) -> F32:
        """Weights ``f32[rows, columns]`` of codes: each product and sum in f32."""
        return decode(codes, self.scales, self.biases, self.group_size)


def decode(codes: npt.NDArray[np.integer], scales: F32, biases: F32, group_size: int) -> F32:
    """Weights ``f32[rows, columns]`` of codes with ``f32[rows, groups]`` scales and biases."""
    group = contiguous_groups(codes.shape[1], group_size)
    decoded = np.empty(codes.shape, np.float32)
    for start in range(0, len(codes), _ROWS_AT_ONCE):  # little memory beside the result
        rows = slice(start, start + _ROWS_AT_ONCE)
        np.multiply(codes[rows].astype(np.float32), scales[rows][:, group], out=decoded[rows])
        decoded[rows] += biases[rows][:, group]
    return decoded


def search(
    weights: F32,
    bits: int,
    group_size: int,
    *,
    importance: F32 | None = None,
    scale_dtype: str = "float16",
    quick: bool = False,
) -> Biased:
    """Scales and biases of ``weights f32[rows, columns]`` that cost least under column weights ``importance
    f32[columns]``, and never more than those of plain rounding.

    Args:
        weights: Finite; ``group_size`` divides the columns.
        bits: 2 to 8.
        group_size: Columns that share a pair.
        importance: Weight of each column, at least 0; None for equal ones.
        scale_dtype: What the file stores: ``float16``, ``bfloat16`` or ``float32``; pairs come back rounded to it.
        quick: Only good enough to rank versions of the same matrix by.

    Raises:
        ValueError: a scale or a bias is too large for float16.
    """
    rows, columns = weights.shape
    groups, top = columns // group_size, np.float32(2**bits - 1)
    heights = np.ones(columns, np.float32) if importance is None else importance.astype(np.float32)
    # A group that no calibration token excites still has to be stored well: equal weights there.
    dead = heights.reshape(groups, group_size).max(axis=1) <= 0
    heights = np.where(np.repeat(dead, group_size), np.float32(1), heights)
    lanes = np.ascontiguousarray(weights.T, np.float32)
    found = [np.empty((groups, rows), np.float32) for _ in range(4)]
    shares = _FINE if quick or bits > 4 else _SHARES
    _search(lanes, heights, group_size, top, shares, 1 if quick else _REFITS, *found)
    scale, bias, plain_scale, plain_bias = found
    pairs = _Stored(lanes, heights, group_size, top, scale_dtype)
    pairs.try_pair(plain_scale, plain_bias)
    pairs.try_pair(scale, bias)
    for _ in range(1 if quick else 2):
        for step in (0, 1, -1):
            pairs.try_scale(step)
        for step in (1, -1):
            pairs.try_bias(step)
    return Biased(pairs.of(pairs.scale), pairs.of(pairs.bias), bits, group_size, columns)


def store_bias(values: F32, dtype: str) -> F32:
    """Biases as a file will hold them, back in f32.

    Raises:
        ValueError: one is too large for float16, or no such dtype.
    """
    if dtype == "float16":
        most = float(np.finfo(np.float16).max)
        if (largest := float(np.abs(values).max(initial=0))) > most:
            raise ValueError(f"a bias of {largest:g} does not fit float16")
        return values.astype(np.float16).astype(np.float32)
    return store_scale(values, dtype)


def _beside(values: F32, dtype: str, step: int) -> F32:
    """Stored numbers ``step`` places further from zero, among those that the type has."""
    if dtype == "float32" or step == 0:
        return values
    if dtype == "float16":
        raw = values.astype(np.float16).view(np.int16)
        size = np.clip((raw & 0x7FFF) + step, 0x0400, 0x7BFF).astype(np.int16)  # no subnormals, no infinity
        both: F32 = (size | (raw & np.int16(-0x8000))).view(np.float16).astype(np.float32)
        return both
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    size = np.clip((raw >> 16 & 0x7FFF).astype(np.int64) + step, 0x0080, 0x7F7F).astype(np.uint32)
    return ((size << np.uint32(16)) | (raw & np.uint32(0x80000000))).view(np.float32)


class _Stored:
    """The cheapest of the pairs tried so far, each as a file would hold it; all arrays are ``f32[groups, rows]``."""

    def __init__(self, lanes: F32, heights: F32, size: int, top: np.float32, dtype: str) -> None:
        self._text = lanes, heights, size, top
        self._dtype = dtype
        shape = (len(lanes) // size, lanes.shape[1])
        self.scale, self.bias = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._error = np.full(shape, np.inf, np.float32)
        self._wanted = np.zeros(shape, np.float32)
        """The bias that would fit the codes of the cheapest pair best."""

    def try_pair(self, scale: F32, bias: F32) -> None:
        """Take a pair where it is cheaper."""
        held, offset = store_scale(scale, self._dtype), store_bias(bias, self._dtype)
        error, wanted = np.empty_like(held), np.empty_like(held)
        _cost(*self._text, held, offset, error, wanted)
        better = error < self._error
        for own, new in ((self.scale, held), (self.bias, offset), (self._error, error), (self._wanted, wanted)):
            own[better] = new[better]

    def try_scale(self, step: int) -> None:
        """The neighbour of the cheapest scale, with the bias that keeps the middle of the codes where it is."""
        scale = _beside(self.scale, self._dtype, step)
        _, _, _, top = self._text
        self.try_pair(scale, self._wanted - (scale - self.scale) * (top / np.float32(2)))

    def try_bias(self, step: int) -> None:
        """The neighbour of the cheapest bias."""
        self.try_pair(self.scale, _beside(self.bias, self._dtype, step))

    @staticmethod
    def of(values: F32) -> F32:
        """``f32[rows, groups]``."""
        return np.ascontiguousarray(values.T)


@njit(cache=True, parallel=True)
def _search(
    lanes: F32,
    heights: F32,
    size: int,
    top: np.float32,
    shares: F32,
    refits: int,
    scales: F32,
    biases: F32,
    plain_scales: F32,
    plain_biases: F32,
) -> None:
    """``lanes f32[columns, rows]``: rows side by side, a tile of them through all candidates at once, in loops of a
    fixed length (as in ``groups.py``). Every share of the range is tried around its middle, from below and from above;
    then the best pair is refitted."""
    groups, rows = scales.shape
    tiles = (rows + _LANES - 1) // _LANES
    for job in prange(groups * tiles):
        group, first = job // tiles, (job % tiles) * _LANES
        count = min(_LANES, rows - first)
        own = np.zeros((size, _LANES), np.float32)
        own[:, :count] = lanes[group * size : (group + 1) * size, first : first + count]
        weigh = heights[group * size : (group + 1) * size]
        low, high = own[0].copy(), own[0].copy()
        total = np.zeros(_LANES, np.float32)
        whole = np.float32(0)
        for k in range(size):
            whole += weigh[k]
            for r in range(_LANES):
                low[r] = min(low[r], own[k, r])
                high[r] = max(high[r], own[k, r])
                total[r] += weigh[k] * own[k, r]
        best = np.full(_LANES, np.float32(-1))
        scale, bias = np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
        start, inverse = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
        codes, squares = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
        mixed = np.empty(_LANES, np.float32)
        tries = 3 * len(shares)
        for candidate in range(tries + refits):
            for r in range(_LANES):
                if candidate < tries:
                    share, reach = shares[candidate // 3], high[r] - low[r]
                    cut = reach * (np.float32(1) - share)
                    at = candidate % 3
                    start[r] = low[r] + (cut * np.float32(0.5) if at == 0 else cut if at == 1 else np.float32(0))
                    inverse[r] = top / (reach * share) if reach > 0 else np.float32(0)
                else:
                    start[r] = bias[r]
                    inverse[r] = np.float32(1) / scale[r] if scale[r] > 0 else np.float32(0)
                codes[r] = squares[r] = mixed[r] = np.float32(0)
            for k in range(size):
                for r in range(_LANES):
                    step = np.rint((own[k, r] - start[r]) * inverse[r])
                    step = max(np.float32(0), min(top, step))
                    heavy = weigh[k] * step
                    codes[r] += heavy
                    squares[r] += heavy * step
                    mixed[r] += heavy * own[k, r]
            for r in range(_LANES):
                spread = squares[r] - codes[r] * codes[r] / whole
                along = mixed[r] - codes[r] * total[r] / whole
                # What a line explains beyond the mean; a line that falls is not worth its sign.
                if spread > 0 and along > 0 and along * along / spread > best[r]:
                    best[r] = along * along / spread
                    scale[r] = along / spread
                    bias[r] = (total[r] - scale[r] * codes[r]) / whole
        for r in range(count):
            reach = high[r] - low[r]
            plain_scales[group, first + r] = reach / top if reach > 0 else np.float32(1e-4)
            plain_biases[group, first + r] = low[r]
            found = best[r] > 0
            scales[group, first + r] = scale[r] if found else plain_scales[group, first + r]
            biases[group, first + r] = bias[r] if found else low[r]


@njit(cache=True, parallel=True)
def _cost(
    lanes: F32,
    heights: F32,
    size: int,
    top: np.float32,
    scales: F32,
    biases: F32,
    errors: F32,
    wanted: F32,
) -> None:
    """What rounding with pairs costs each group, and the bias that would suit its codes best."""
    groups, rows = scales.shape
    tiles = (rows + _LANES - 1) // _LANES
    for job in prange(groups * tiles):
        group, first = job // tiles, (job % tiles) * _LANES
        count = min(_LANES, rows - first)
        scale, bias = np.ones(_LANES, np.float32), np.zeros(_LANES, np.float32)
        scale[:count] = scales[group, first : first + count]
        bias[:count] = biases[group, first : first + count]
        own = np.zeros((size, _LANES), np.float32)
        own[:, :count] = lanes[group * size : (group + 1) * size, first : first + count]
        spent, short = np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
        whole = np.float32(0)
        for k in range(size):
            height = heights[group * size + k]
            whole += height
            for r in range(_LANES):
                step = np.rint((own[k, r] - bias[r]) / scale[r])
                step = max(np.float32(0), min(top, step))
                wrong = step * scale[r] + bias[r] - own[k, r]
                spent[r] += height * wrong * wrong
                short[r] += height * wrong
        errors[group, first : first + count] = spent[:count]
        wanted[group, first : first + count] = bias[:count] - short[:count] / whole
