"""Where a quantized weight can lie: per-group scales and offsets over a range of integer codes.

At row r and column k, which belongs to group ``g = group_of[k]``, code c stands for

    value(c) = scale[r, g] * step(c) + offset[r, g],      step(c) = c, or steps[c - lowest] where a table is
    given.

That covers an affine group (``offset = -zero * scale``), a K-quant sub-block (``scale = d * sc``, ``offset =
-dmin * m``) and IQ4_NL's table of values, so rounding and error feedback are written once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

F32 = npt.NDArray[np.float32]

_SHORT = 32
"""Tables up to this long are searched from end to end, which needs no branches."""


@dataclass(frozen=True)
class Grid:
    """Scales ``f32[rows, groups]``, offsets of the same shape, ``group_of i32[columns]``, codes
    ``lowest..highest``.

    ``steps`` is None for evenly spaced codes, else ``f32[highest - lowest + 1]`` in ascending order.
    """

    scale: F32
    offset: F32
    group_of: npt.NDArray[np.int32]
    lowest: int
    highest: int
    steps: F32 | None = None

    def values(self, codes: npt.NDArray[np.integer]) -> F32:
        """The weights ``f32[rows, columns]`` that ``codes`` of the same shape stand for."""
        step = codes.astype(np.float32) if self.steps is None else self.steps[codes - self.lowest]
        return np.asarray(step * self.scale[:, self.group_of] + self.offset[:, self.group_of], np.float32)

    def nearest(self, weights: F32) -> npt.NDArray[np.int16]:
        """The nearest code of every weight: plain rounding, halves to even."""
        codes = np.empty(weights.shape, np.int16)
        _nearest(weights, self.scale, self.offset, self.group_of, self.lowest, self.highest, self.table, codes)
        return codes

    @property
    def table(self) -> F32:
        """``steps``, or an empty array for evenly spaced codes (what compiled loops take)."""
        return np.zeros(0, np.float32) if self.steps is None else self.steps


def contiguous_groups(columns: int, group_size: int) -> npt.NDArray[np.int32]:
    """Group number ``i32[columns]`` of each column when ``group_size`` neighbours share a scale; 0 means one
    group."""
    return (np.arange(columns) // (group_size or columns)).astype(np.int32)


@njit(cache=True, inline="always")
def _nearest_of_many(at: Any, table: F32) -> int:
    """The same by halving: the entries left and right of ``at``, of which one is nearest."""
    low, high = 0, table.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if table[middle] < at:
            low = middle
        else:
            high = middle
    return high if abs(at - table[high]) < abs(at - table[low]) else low


@njit(cache=True, inline="always")
def nearest_step(at: Any, lowest: int, highest: int, table: F32) -> int:
    """The code whose step is nearest to ``at``; ties go to the even code, or to the lower entry of a
    table."""
    if table.size == 0:
        return int(min(max(np.rint(at), lowest), highest))
    if table.size > _SHORT:
        return lowest + _nearest_of_many(at, table)
    best = 0
    for entry in range(1, table.size):
        if abs(at - table[entry]) < abs(at - table[best]):
            best = entry
    return lowest + best


@njit(cache=True, parallel=True)
def _nearest(
    weights: F32,
    scale: F32,
    offset: F32,
    group_of: npt.NDArray[np.int32],
    lowest: int,
    highest: int,
    table: F32,
    codes: npt.NDArray[np.int16],
) -> None:
    rows, columns = weights.shape
    for row in prange(rows):
        for column in range(columns):
            group = group_of[column]
            step = scale[row, group]
            at = (weights[row, column] - offset[row, group]) / step if step != 0 else np.float32(0)
            codes[row, column] = nearest_step(at, lowest, highest, table)
