"""Blocks improved in turns: every code, scale and minimum set to what is best while all else stays.

The cost of a row of weights w stored as q is ``(q - w)^T H (q - w)``. Along any one thing that a block stores, a code
or the whole number that scales a sub-block, it is a parabola: moving q by t v adds ``2 t v^T g + t^2 v^T H v`` with
``g = H (q - w)``, so the best that can be stored is what lies nearest to ``t = -v^T g / v^T H v``. Taking all of them
in turns is coordinate descent: the cost never rises. Error feedback visits each column once and leaves something for
it. The float16 that all scales of a super-block are multiples of stays; in blocks of 32 the float16 is the scale.

Weights go through in chunks of columns. A chunk's gradients come from one matrix product and follow every change in it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from bitladder.kernels.api import dequantize
from bitladder.kernels.codes import grid_of, row_of, with_codes
from bitladder.kernels.grid import F32, Grid, nearest_step
from bitladder.kernels.scales import units_of, with_scales

U8 = npt.NDArray[np.uint8]
I16 = npt.NDArray[np.int16]

_F16_DIGITS, _F16_LEAST, _F16_MOST = 11, 2.0**-24, 65504.0


def refine(data: U8, qtype: str, weights: F32, hessian: F32, *, ridge: float, chunk: int, sweeps: int) -> U8:
    """The same blocks with better codes and scales.

    Args:
        data: uint8[rows, row_bytes].
        qtype: a key of ``codes.CODE_BITS``.
        weights: f32[rows, columns], what the blocks stand for.
        hessian: f32[columns, columns], symmetric.
        ridge: what is to be added to its diagonal.
        chunk: columns at a time; whole blocks, and a divisor of the columns.
        sweeps: how often to go through all of them.
    """
    row, grid, units = row_of(qtype), grid_of(data, qtype), units_of(data, qtype)
    codes = grid.nearest(dequantize(data, qtype))
    errors = grid.values(codes) - weights
    added = np.float32(ridge)
    for start in np.tile(np.arange(0, weights.shape[1], chunk), sweeps).tolist():
        columns, groups = slice(start, start + chunk), slice(start // row.size, (start + chunk) // row.size)
        gradients = np.asarray(errors @ hessian[:, columns] + added * errors[:, columns], np.float32)
        square = np.asarray(hessian[columns, columns] + added * np.eye(chunk, dtype=np.float32), np.float32)
        own = np.ascontiguousarray(codes[:, columns])
        scale, offset = np.ascontiguousarray(grid.scale[:, groups]), np.ascontiguousarray(grid.offset[:, groups])
        _sweep(
            gradients, square, own, scale, offset, units.scale[:, groups], units.offset[:, groups],
            units.least, units.most, units.has_offset, grid.lowest, grid.highest, grid.table,
        )  # fmt: skip
        codes[:, columns], grid.scale[:, groups], grid.offset[:, groups] = own, scale, offset
        part = Grid(scale, offset, grid.group_of[:chunk], grid.lowest, grid.highest, grid.steps)
        errors[:, columns] = part.values(own) - weights[:, columns]
    return with_codes(with_scales(data, qtype, grid), qtype, codes)


@njit(cache=True)
def _allowed(value: float, unit: float, least: int, most: int) -> Any:
    """The nearest value that can be stored: a multiple of the unit, or without one a float16."""
    if unit != 0:
        return np.float32(unit * min(max(np.rint(value / unit), least), most))
    if value == 0 or not math.isfinite(value):
        return np.float32(0)
    _, exponent = math.frexp(abs(value))
    step = max(2.0 ** (exponent - _F16_DIGITS), _F16_LEAST)
    return np.float32(min(max(np.rint(value / step) * step, -_F16_MOST), _F16_MOST))


@njit(cache=True)
def _step(code: int, lowest: int, table: F32) -> Any:
    """What a code stands for before its scale."""
    return np.float32(code) if table.size == 0 else table[code - lowest]


@njit(cache=True)
def _move(gradient: F32, square: F32, first: int, by: F32) -> None:
    """The gradient after the columns from ``first`` on have moved by so much each."""
    for k in range(len(by)):
        if by[k] != 0:
            for j in range(len(gradient)):
                gradient[j] += by[k] * square[first + k, j]


@njit(cache=True)
def _scale_step(gradient: F32, square: F32, first: int, steps: F32) -> float:
    """How far the scale of a sub-block is from its best; 0 where nothing depends on it."""
    slope, curve = 0.0, 0.0
    for k in range(len(steps)):
        inner = np.float32(0)
        for j in range(len(steps)):
            inner += square[first + k, first + j] * steps[j]
        slope += steps[k] * gradient[first + k]
        curve += steps[k] * inner
    return -slope / curve if curve > 0 else 0.0


@njit(cache=True)
def _improve_codes(gradient: F32, square: F32, codes: I16, first: int, steps: F32, scale: Any, ends: Any) -> None:
    """Each code of a sub-block in turn; ``ends``: the lowest and the highest, and the table."""
    lowest, highest, table = ends
    by = np.empty(1, np.float32)
    for k in range(first, first + len(steps)):
        if square[k, k] > 0:
            code = nearest_step(steps[k - first] - gradient[k] / (square[k, k] * scale), lowest, highest, table)
            by[0] = (_step(code, lowest, table) - steps[k - first]) * scale
            if by[0] != 0:
                _move(gradient, square, k, by)
                codes[k] = code


@njit(cache=True, parallel=True)
def _sweep(
    gradients: F32,
    square: F32,
    codes: I16,
    scale: F32,
    offset: F32,
    unit: F32,
    offset_unit: F32,
    least: int,
    most: int,
    has_offset: bool,
    lowest: int,
    highest: int,
    table: F32,
) -> None:
    """Once through a chunk, row by row and sub-block by sub-block: its scale, its minimum, its codes."""
    rows, columns = codes.shape
    parts = scale.shape[1]
    size = columns // parts
    for r in prange(rows):
        gradient = gradients[r]
        steps = np.empty(size, np.float32)
        for p in range(parts):
            first = p * size
            for k in range(size):
                steps[k] = _step(codes[r, first + k], lowest, table)
            if scale[r, p] != 0:
                away = _scale_step(gradient, square, first, steps)
                best = _allowed(scale[r, p] + away, unit[r, p], least, most)
                if best != 0 and best != scale[r, p]:
                    _move(gradient, square, first, (best - scale[r, p]) * steps)
                    scale[r, p] = best
            if has_offset and (offset_unit[r, p] != 0 or unit[r, p] == 0):
                ones = np.ones(size, np.float32)
                away = _scale_step(gradient, square, first, ones)
                best = _allowed(offset[r, p] + away, offset_unit[r, p], 0, most)
                if best != offset[r, p]:
                    _move(gradient, square, first, (best - offset[r, p]) * ones)
                    offset[r, p] = best
            if scale[r, p] != 0:
                _improve_codes(gradient, square, codes[r], first, steps, scale[r, p], (lowest, highest, table))
