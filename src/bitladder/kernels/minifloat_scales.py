"""Scales for weights stored as floats of eight or four bits: which of several that a file can hold costs least.

A value is ``step * scale``, with the steps of E4M3 or E2M1 (``minifloats.py``). Candidates are scales exactly as they
will be read back, so the one that is chosen costs no more than any other of them, the plain one among them: the
error is counted, not modelled.

Steps are relative, eight (E4M3) or two (E2M1) to a power of two. A larger scale than the one that just holds the
largest weight therefore costs E4M3 next to nothing and moves the steps between the weights; E2M1 gains where the
largest weight falls on 4 instead of 6, whose neighbours are nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from bitladder.kernels import minifloats
from bitladder.kernels.grid import F32, Grid, contiguous_groups

U8 = npt.NDArray[np.uint8]

WHOLE = 0
"""A group size: all columns."""
_SCREENED, _PART, _STRETCH = 1024, 4, 64
"""Of so many weights that share a scale and more, every fourth (of columns, every fourth stretch of 64) shows which
candidate is worth comparing with the plain scale over all of them."""
_LANES = 16
_ROWS_AT_ONCE = 256
_AT_ONCE = 1 << 14
_ZERO = 126
"""The number of E4M3's step 0."""


@dataclass(frozen=True)
class Minifloat:
    """A float type that weights are rounded to."""

    name: str
    significant: int
    """Bits of a normal number's fraction, the leading one included."""
    least: float
    """The smallest normal number; below it steps are even."""
    largest: float

    @property
    def steps(self) -> F32:
        """All values, ascending, zero once."""
        return _STEPS[self.name]

    @property
    def bytes_of(self) -> U8:
        """The code in files of each step."""
        return _CODES[self.name]


def _ordered(table: F32) -> tuple[F32, U8]:
    """Finite values of a table, ascending with one zero, and their places in it."""
    codes = [code for code in range(len(table)) if np.isfinite(table[code]) and (table[code] != 0 or code == 0)]
    codes.sort(key=lambda code: float(table[code]))
    return table[codes], np.array(codes, np.uint8)


E4M3 = Minifloat("E4M3", 4, 2.0**-6, 448.0)
E2M1 = Minifloat("E2M1", 2, 1.0, 6.0)
_ORDERED = {
    "E4M3": _ordered(minifloats.e4m3(np.arange(256, dtype=np.uint8))),
    "E2M1": _ordered(minifloats.e2m1(np.arange(16, dtype=np.uint8))),
}
_STEPS = {name: steps for name, (steps, _) in _ORDERED.items()}
_CODES = {name: codes for name, (_, codes) in _ORDERED.items()}
_LARGEST_CODE = 0x7E
"""Of E4M3: 448."""
_LEAST_POWER, _LARGEST_POWER = 0, 254
"""Codes of E8M0 that are numbers."""


@dataclass(frozen=True)
class FloatScales:
    """Scales of one matrix, ``f32[rows, groups]`` as a reader computes them, for steps of ``kind``; what the file holds
    of them, where that is not the scales themselves."""

    kind: Minifloat
    scales: F32
    columns: int
    group_size: int
    codes: U8 | None = None
    """Codes ``u8[rows, groups]`` of scales that are E4M3 or E8M0."""
    divisor: float = 1.0
    """What divides the values of ``codes``."""
    input_divisor: float = 1.0
    """The same of the inputs, where engines round them."""

    def grid(self) -> Grid:
        """For choosing codes: numbers of steps, the lowest 0."""
        groups = contiguous_groups(self.columns, self.group_size)
        return Grid(self.scales, np.zeros_like(self.scales), groups, 0, len(self.kind.steps) - 1, self.kind.steps)

    def rows(self, rows: slice) -> FloatScales:
        """Those of some rows."""
        return replace(self, scales=self.scales[rows], codes=None if self.codes is None else self.codes[rows])

    def nearest(self, weights: F32) -> npt.NDArray[np.int16]:
        """Numbers of the steps nearest to ``weights f32[rows, columns]``."""
        if self.kind.name != "E4M3":
            return self.grid().nearest(weights)
        numbers = np.empty(weights.shape, np.int16)
        _nearest_e4m3(np.ascontiguousarray(weights, np.float32), self.scales, self._size, numbers)
        return numbers

    def decode(self, codes: npt.NDArray[np.integer]) -> F32:
        """Weights ``f32[rows, columns]`` of numbers of steps, exactly as a reader of the file computes them."""
        decoded = np.empty(codes.shape, np.float32)
        _decode(codes, self.kind.steps, self.scales, self._size, decoded)
        return decoded

    @property
    def _size(self) -> int:
        return self.group_size or self.columns

    def stored(self, codes: npt.NDArray[np.integer]) -> U8:
        """Numbers of steps as the float type's own codes."""
        out = np.empty(codes.shape, np.uint8)
        if self.kind.name == "E4M3":
            _e4m3_bytes(codes.reshape(-1), out.reshape(-1))
            return out
        _looked_up(codes.reshape(-1), self.kind.bytes_of, out.reshape(-1))
        return out


def peaks(weights: F32, group_size: int) -> F32:
    """The largest magnitude of each group ``f32[rows, groups]``."""
    groups = weights.reshape(len(weights), -1, group_size or weights.shape[1])
    return np.asarray(np.maximum(groups.max(axis=2), -groups.min(axis=2)), np.float32)


def free(
    weights: F32, group_size: int, importance: F32 | None, store: Callable[[F32], F32], shares: F32
) -> FloatScales:
    """E4M3 with scales that may be any number that ``store`` leaves as it is.

    Args:
        weights: ``f32[rows, columns]``, finite.
        group_size: Columns that share a scale; 0: all.
        importance: ``f32[columns]``, what a squared error costs; None: all the same.
        store: Rounds scales to what a file holds.
        shares: Candidates, as shares of the scale that just holds the largest weight; the first is 1.

    Raises:
        ValueError: from ``store``, where not even the plain scale can be held.
    """
    rows, columns = weights.shape
    plain = peaks(weights, group_size) / np.float32(E4M3.largest)
    plain = np.where(plain == 0, np.float32(1), plain)
    held = _storable(plain, shares, store)
    whole = partial(_errors, weights, group_size, importance, kind=E4M3)
    if len(held) <= 2 or group_size or columns < _SCREENED or columns % (_PART * _STRETCH):
        return FloatScales(E4M3, _least(held, whole), columns, group_size)
    some = weights.reshape(rows, -1, _STRETCH)[:, ::_PART].reshape(rows, -1)
    heights = None if importance is None else importance.reshape(-1, _STRETCH)[::_PART].reshape(-1)
    best = _least(held, partial(_errors, some, WHOLE, heights, kind=E4M3))
    return FloatScales(E4M3, _least([held[0], best], whole), columns, group_size)


def in_blocks(
    weights: F32, block: int, importance: F32 | None, store: Callable[[F32], F32], shares: F32
) -> FloatScales:
    """As ``free``, with one scale for ``block`` by ``block`` weights, repeated for each of its rows; ``block`` divides
    rows and columns."""
    rows, columns = weights.shape
    tall = peaks(weights, block).reshape(rows // block, block, -1).max(axis=1) / np.float32(E4M3.largest)
    plain = np.where(tall == 0, np.float32(1), tall)
    held = _storable(plain, shares, store)

    def errors(every: int, scales: F32) -> F32:
        """Of every so-many-th row of each block."""
        some = weights if every == 1 else np.ascontiguousarray(weights[::every])
        tall = _errors(some, block, importance, np.repeat(scales, block // every, axis=0), E4M3)
        return np.asarray(tall.reshape(len(scales), block // every, -1).sum(axis=1), np.float32)

    if len(held) > 2 and block**2 >= _SCREENED and block % _PART == 0:
        held = [held[0], _least(held, partial(errors, _PART))]
    chosen = _least(held, partial(errors, 1))
    return FloatScales(E4M3, np.repeat(chosen, block, axis=0), columns, block)


def _least(candidates: list[F32], errors: Callable[[F32], F32]) -> F32:
    """Of ``candidates f32[rows, groups]`` the one with the least error in each place; the first of equals."""
    best = np.argmin(np.stack([errors(one) for one in candidates]), axis=0)
    return np.asarray(np.take_along_axis(np.stack(candidates), best[None], axis=0)[0], np.float32)


def _storable(plain: F32, shares: F32, store: Callable[[F32], F32]) -> list[F32]:
    """The plain scale and those of its multiples that a file can hold."""
    held = [store(plain)]
    for share in shares[1:]:
        try:
            held.append(store(plain * share))
        except ValueError:
            continue
    return held


def powers_of_two(weights: F32, kind: Minifloat, group_size: int, importance: F32 | None) -> FloatScales:
    """Scales in E8M0: the plain power of two, the one above and the one below.

    The plain one puts the largest weight below the type's own largest power of two doubled, and one higher where it
    would still be rounded beyond: from 1.75 times a power of two on (as compressed-tensors has it).
    """
    exponent = np.frexp(peaks(weights, group_size) / np.float32(1.75))[1]  # peak / 1.75 in [2^(e-1), 2^e)
    plain = exponent + 127 - int(np.log2(kind.largest))
    codes = [np.clip(plain + by, _LEAST_POWER, _LARGEST_POWER).astype(np.uint8) for by in (0, 1, -1)]
    held = [minifloats.e8m0(one) for one in codes]
    chosen, number = _best(weights, group_size, importance, held, kind)
    own = np.take_along_axis(np.stack(codes), number[None], axis=0)[0]
    return FloatScales(kind, chosen, weights.shape[1], group_size, own)


def two_levels(
    weights: F32, group_size: int, importance: F32 | None, divisor: float, *, around: tuple[int, ...]
) -> tuple[FloatScales, float]:
    """E2M1 with scales in E4M3, divided by one number for all.

    Args:
        weights: ``f32[rows, columns]``, finite.
        group_size: Columns that share a scale.
        importance: As in ``free``.
        divisor: That number, as float32 holds it.
        around: Codes to try, counted from the one nearest to what just holds the largest weight of a group.

    Returns:
        The cheapest scales, and the sum of their errors.
    """
    by = np.float32(divisor)
    plain = np.clip(_nearest_code(peaks(weights, group_size) * (by / np.float32(E2M1.largest))), 1, _LARGEST_CODE)
    codes = [np.clip(plain + offset, 1, _LARGEST_CODE).astype(np.uint8) for offset in sorted(around, key=abs)]
    held = [minifloats.e4m3(one) / by for one in codes]  # code 0 would be no scale
    chosen, number = _best(weights, group_size, importance, held, E2M1)
    own = np.take_along_axis(np.stack(codes), number[None], axis=0)[0]
    error = _errors(weights, group_size, importance, chosen, E2M1)
    return FloatScales(E2M1, chosen, weights.shape[1], group_size, own, float(by)), float(error.sum(dtype=np.float64))


def _nearest_code(values: F32) -> npt.NDArray[np.intp]:
    """The E4M3 code nearest to each of ``values``, which are at least 0."""
    positive = minifloats.e4m3(np.arange(_LARGEST_CODE + 1, dtype=np.uint8))
    return np.searchsorted((positive[1:] + positive[:-1]) / 2, values)


def _best(
    weights: F32, group_size: int, importance: F32 | None, candidates: list[F32], kind: Minifloat
) -> tuple[F32, npt.NDArray[np.intp]]:
    """The cheapest of ``candidates f32[rows, groups]`` for each group, and its number; the first of equals."""
    chosen, number = candidates[0].copy(), np.zeros(candidates[0].shape, np.intp)
    least = None
    for at, scales, errors in _tried(weights, group_size, importance, candidates, kind):
        if least is None:
            least = errors
            continue
        better = errors < least
        least[better], chosen[better], number[better] = errors[better], scales[better], at
    return chosen, number


def _tried(
    weights: F32, group_size: int, importance: F32 | None, candidates: list[F32], kind: Minifloat
) -> Iterator[tuple[int, F32, F32]]:
    for at, scales in enumerate(candidates):
        yield at, scales, _errors(weights, group_size, importance, scales, kind)


def _errors(weights: F32, group_size: int, importance: F32 | None, scales: F32, kind: Minifloat) -> F32:
    """What rounding with ``scales f32[rows, groups]`` costs each group, of the same shape."""
    rows, columns = weights.shape
    size = group_size or columns
    heights = np.ones(columns, np.float32) if importance is None else importance.astype(np.float32)
    # A group that no calibration token excites still has to be stored well: equal weights there.
    dead = heights.reshape(-1, size).max(axis=1) <= 0
    heights = np.where(np.repeat(dead, size), np.float32(1), heights)
    errors = np.empty((rows, columns // size), np.float32)
    split = np.float32(2 ** (24 - kind.significant) + 1)
    fine = np.float32(2 ** (kind.significant - 1) / kind.least)
    _count(
        np.ascontiguousarray(weights, np.float32), heights, size, np.ascontiguousarray(scales, np.float32),
        split, fine, np.float32(kind.least), np.float32(kind.largest), errors,
    )  # fmt: skip
    return errors


@njit(cache=True, parallel=True, nogil=True)
def _count(
    weights: F32,
    heights: F32,
    size: int,
    scales: F32,
    split: np.float32,
    fine: np.float32,
    least: np.float32,
    largest: np.float32,
    errors: F32,
) -> None:
    """Rounding without tables: a normal number loses its low bits by Dekker's splitting, ``c - (c - x)`` with ``c = x
    (2^s + 1)`` (Numerische Mathematik 18, 1971); smaller ones fall on even steps of ``1 / fine``. Errors are summed in
    lanes side by side, in loops of a fixed length (as in ``groups.py``): eight times as fast as one after another."""
    rows, groups = scales.shape
    coarse = np.float32(1) / fine
    for row in prange(rows):
        sums = np.empty(_LANES, np.float32)
        for group in range(groups):
            step = scales[row, group]
            inverse = np.float32(1) / step if step > 0 else np.float32(0)
            for lane in range(_LANES):
                sums[lane] = np.float32(0)
            for start in range(group * size, (group + 1) * size - _LANES + 1, _LANES):
                own, high = weights[row, start : start + _LANES], heights[start : start + _LANES]
                for lane in range(_LANES):
                    at = max(-largest, min(largest, own[lane] * inverse))
                    big = at * split
                    even = np.rint(at * fine) * coarse
                    near = even if abs(at) < least else big - (big - at)
                    wrong = near * step - own[lane]
                    sums[lane] += high[lane] * wrong * wrong
            total = np.float64(0)
            for lane in range(_LANES):
                total += sums[lane]
            for k in range((group + 1) * size - size % _LANES, (group + 1) * size):
                at = max(-largest, min(largest, weights[row, k] * inverse))
                big = at * split
                even = np.rint(at * fine) * coarse
                near = even if abs(at) < least else big - (big - at)
                wrong = near * step - weights[row, k]
                total += heights[k] * wrong * wrong
            errors[row, group] = total


def _nearest_e4m3(weights: F32, scales: F32, size: int, numbers: npt.NDArray[np.int16]) -> None:
    """Numbers of the steps nearest to ``weights / scales``, ties to the even one, without a search."""
    for start in range(0, len(weights), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        own = np.ascontiguousarray(weights[rows], np.float32)
        wide = np.empty(own.shape, np.float32)
        _in_steps(own, scales[rows], size, wide)
        _numbered(wide, wide.view(np.int32), own, numbers[rows])


@njit(cache=True, parallel=True, nogil=True)
def _in_steps(weights: F32, scales: F32, size: int, wide: F32) -> None:
    """``|weights| / scales``, at most the largest step."""
    groups = scales.shape[1]
    for row in prange(len(wide)):
        for group in range(groups):
            step = scales[row, group] if scales[row, group] > 0 else np.float32(1)
            own, out = weights[row, group * size : (group + 1) * size], wide[row, group * size : (group + 1) * size]
            for k in range(size):
                out[k] = min(abs(own[k] / step), np.float32(448))


@njit(cache=True, parallel=True, nogil=True)
def _numbered(wide: F32, raw: npt.NDArray[np.int32], weights: F32, numbers: npt.NDArray[np.int16]) -> None:
    """An E4M3 number is a float32 whose fraction keeps three bits, rounded by adding half of what is cut off, and below
    2^-6 a multiple of 2^-9. Its code is what is left of the float32 with another bias, so codes of one sign follow one
    another. ``raw``: the bits of ``wide``."""
    rows, columns = wide.shape
    for row in prange(rows):
        values, bits, own, out = wide[row], raw[row], weights[row], numbers[row]
        for k in range(columns):
            normal = ((bits[k] + np.int32(0x7FFFF) + ((bits[k] >> 20) & 1)) >> 20) - np.int32(120 << 3)
            small = np.int32(np.rint(values[k] * np.float32(512)))
            code = small if values[k] < np.float32(0.015625) else normal
            out[k] = np.int16(_ZERO - code) if own[k] < 0 else np.int16(_ZERO + code)


@njit(cache=True, parallel=True, nogil=True)
def _looked_up(codes: npt.NDArray[np.integer], table: U8, out: U8) -> None:
    parts = (len(codes) + _AT_ONCE - 1) // _AT_ONCE
    for part in prange(parts):
        first = part * _AT_ONCE
        own, made = codes[first : first + _AT_ONCE], out[first : first + _AT_ONCE]
        for k in range(len(own)):
            made[k] = table[own[k]]


@njit(cache=True, parallel=True, nogil=True)
def _e4m3_bytes(numbers: npt.NDArray[np.integer], out: U8) -> None:
    """Sign, then magnitude: steps of one sign follow one another."""
    parts = (len(numbers) + _AT_ONCE - 1) // _AT_ONCE
    for part in prange(parts):
        first = part * _AT_ONCE
        own, made = numbers[first : first + _AT_ONCE], out[first : first + _AT_ONCE]
        for k in range(len(own)):
            step = np.int16(own[k]) - np.int16(_ZERO)
            made[k] = np.uint8(step if step >= 0 else 128 - step)


@njit(cache=True, parallel=True, nogil=True)
def _decode(codes: npt.NDArray[np.integer], steps: F32, scales: F32, size: int, decoded: F32) -> None:
    groups = scales.shape[1]
    for row in prange(len(codes)):
        for group in range(groups):
            scale = scales[row, group]
            own, out = codes[row, group * size : (group + 1) * size], decoded[row, group * size : (group + 1) * size]
            for k in range(size):
                out[k] = steps[own[k]] * scale
