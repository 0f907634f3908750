"""GPTQ: round column by column, and let the columns not yet rounded absorb each rounding error.

The calibration inputs X give ``H = X^T X``; a row of weights w rounded to q costs ``(q-w)^T H (q-w)``. Take
the columns in some order and factor ``H = V V^T`` with V upper triangular. Then the cost is a sum of squares,
one per column:

    cost = sum_k V_kk^2 (q_k - t_k)^2,      t_k = w_k - sum_{j<k} (V_jk / V_kk) (q_j - w_j)

so each column in turn is rounded to the code nearest to its target t_k, which the errors before it have
moved. This is GPTQ (Frantar et al. 2022, arXiv:2210.17323) written as Babai's nearest plane: the same codes
as with the Cholesky factor of the inverse, but H is never inverted, and the errors before a block reach it as
one matrix product.

What it gives up: it is greedy, never returning to a column. Columns with much energy go first
(``act_order``), while the groups that share scales stay where they are in storage, so any reader of plain
groups can run the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from bitladder.kernels.cholesky import upper_factor
from bitladder.kernels.grid import F32, Grid, nearest_step

BLOCK = 64
_TILE = 64
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 1024, 256
_AT_ONCE = 1 << 23
"""Weights that are worked on at once, rows of them: some 10 bytes of memory for each."""
DAMP = 0.05
"""Share of the mean diagonal that is added to it, where nobody says another."""
_MAX_DAMP = 1.0
_MADE_UP = 0.5
"""Of what a matrix could make up for of the errors before it."""


@dataclass(frozen=True)
class Factor:
    """A factored Hessian. ``order[k]`` is the column handled k-th; the other arrays follow that order.

    ``coupling[j, k]`` is ``V_jk / V_kk`` for j < k, else 0; ``pivots[k]`` is ``V_kk^2``, what a squared error
    of column k costs once the columns before it are fixed.
    """

    order: npt.NDArray[np.intp]
    coupling: F32
    pivots: npt.NDArray[np.float64]
    ridge: float
    """What was added to the diagonal."""
    damp: float
    """Share of the mean diagonal that was added to the diagonal; above the asked for when factoring had to be
    rescued."""
    rescued: int
    """How often the damping had to be raised before the factor existed."""
    dead: int
    """Columns whose inputs were always zero in the calibration set; they are rounded plainly."""

    def part(self, start: int, stop: int) -> Factor:
        """The same for the ``start``-th to ``stop``-th column handled, which must be a run in storage order."""
        own = slice(start, stop)
        order = self.order[own] - self.order[own].min()
        return replace(self, order=order, coupling=self.coupling[own, own], pivots=self.pivots[own])

    @property
    def importance(self) -> F32:
        """``pivots`` in storage order, normalised to mean 1: the weight of each column in a search for
        scales."""
        back = np.empty(len(self.order), np.float32)
        back[self.order] = self.pivots / max(float(self.pivots.mean()), np.finfo(np.float64).tiny)
        return back


def prepare(
    hessian: npt.NDArray[np.floating],
    *,
    damp: float = DAMP,
    act_order: bool = True,
    together: int = 1,
    overwrite: bool = False,
) -> Factor:
    """Factor ``H = X^T X``, shape ``[columns, columns]``, in float64 (``cholesky.py``).

    Args:
        hessian: Symmetric; sum or mean over tokens, the scale does not matter.
        damp: Share of the mean diagonal to add to the diagonal. Raised tenfold, and reported, until the
            factor exists.
        act_order: Handle columns in falling order of their diagonal entry rather than in storage order.
        together: Runs of so many columns stay together, in falling order of their sums, each in its own order inside.
        overwrite: The factor may lie where ``hessian`` was, which must not be used again.

    Raises:
        ValueError: not square, not finite, or with a negative diagonal.
    """
    diagonal = np.diagonal(hessian).astype(np.float64)
    if (
        hessian.ndim != 2
        or hessian.shape[0] != hessian.shape[1]
        or not np.isfinite(hessian).all()
        or diagonal.min() < 0
    ):
        raise ValueError("a Hessian must be square and finite with a diagonal of squares")
    mean = float(diagonal.mean())
    if mean == 0:
        mean = 1.0
    order = _order(diagonal, together) if act_order else np.arange(len(diagonal))
    used, rescued = max(damp, 1e-10), 0
    while (found := upper_factor(hessian, order, used * mean, overwrite=overwrite)) is None:
        used, rescued = used * 10, rescued + 1
        if used > _MAX_DAMP * 10:
            raise ValueError("the Hessian is not positive semidefinite, even damped by its mean diagonal tenfold")
    coupling, pivots = found
    return Factor(order, coupling, pivots**2, used * mean, used, rescued, int((diagonal == 0).sum()))


def shrink(hessian: npt.NDArray[np.floating], tokens: int) -> None:
    """Shrink ``H = X^T X`` of so many tokens towards its diagonal, in place, by as much as it was learnt from few.

    Correlations of n channels over T tokens are noise of the order sqrt(n / T), and feedback that follows noise fits
    the calibration text. Each diagonal entry grows by the share n / T, as if n tokens of unrelated channels had been
    seen too; fixed shares from 0.05 to 0.5, and damping alone, did no better (docs/log.md).
    """
    hessian[np.diag_indices_from(hessian)] *= 1 + len(hessian) / max(1, tokens)


def solve(factor: Factor, right: F32) -> F32:
    """``right H^-1`` f32[rows, columns] for the damped Hessian of a factor, columns in storage order."""
    from scipy.linalg import solve_triangular

    coupling = factor.coupling  # H = (coupling + 1) diag(pivots) (coupling + 1)^T; its diagonal is taken for 1
    found: Any = np.asfortranarray(right[:, factor.order].T)
    found = solve_triangular(coupling, found, unit_diagonal=True, overwrite_b=True, check_finite=False)
    found /= factor.pivots[:, None].astype(np.float32)
    found = solve_triangular(coupling, found, trans="T", unit_diagonal=True, overwrite_b=True, check_finite=False)
    out = np.empty_like(right)
    out[:, factor.order] = found.T
    return out


def making_up(factor: Factor, weights: F32, drift: F32) -> F32:
    """Weights f32[rows, columns] that make up by half for what the layers before them lost: the whole of it fits the
    calibration text more than other text (docs/log.md).

    Args:
        factor: of ``X^T X`` of the inputs that they will meet.
        weights: what they are in the source.
        drift: ``(R - X)^T X`` f32[columns, columns] with R the inputs that they meet there.

    Raises:
        ValueError: the drift is not finite.
    """
    if not np.isfinite(drift).all():
        raise ValueError("the inputs of the source differ from the level's by more than a number can hold")
    made = np.empty(weights.shape, np.float32)
    at_once = max(1, _AT_ONCE // weights.shape[1])
    for start in range(0, len(weights), at_once):
        some = slice(start, start + at_once)
        made[some] = weights[some] + np.float32(_MADE_UP) * solve(factor, weights[some] @ drift)
    return made


def _order(diagonal: npt.NDArray[np.float64], together: int) -> npt.NDArray[np.intp]:
    """Columns by falling energy, or runs of them by falling energy and columns so within each."""
    runs = diagonal.reshape(-1, together).sum(axis=1)
    rank = np.empty(len(runs), np.intp)
    rank[np.argsort(-runs, kind="stable")] = np.arange(len(runs))
    return np.lexsort((-diagonal, np.repeat(rank, together) if together > 1 else np.zeros(len(diagonal))))


def apply(factor: Factor, weights: F32, grid: Grid) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float64]]:
    """Choose the codes of ``weights f32[rows, columns]`` on ``grid`` with error feedback.

    Returns:
        Codes ``i16[rows, columns]`` in storage order, and the cost of each row ``f64[rows]`` under the damped
        Hessian.
    """
    rows, columns = weights.shape
    codes, cost = np.empty((rows, columns), np.int16), np.zeros(rows, np.float64)
    at_once = max(1, _AT_ONCE // columns)
    for start in range(0, rows, at_once):
        some = slice(start, start + at_once)
        codes[some, factor.order] = _codes_of(factor, weights[some], grid, some, cost[some]).T
    return codes, cost


def _codes_of(
    factor: Factor, weights: F32, grid: Grid, some: slice, cost: npt.NDArray[np.float64]
) -> npt.NDArray[np.int16]:
    """Codes i16[columns, rows] of some rows, columns in the factor's order; adds to the cost of each."""
    rows, columns = weights.shape
    ordered = np.ascontiguousarray(weights.T[factor.order], np.float32)
    groups = np.ascontiguousarray(grid.group_of[factor.order])
    scale, offset = np.ascontiguousarray(grid.scale[some].T), np.ascontiguousarray(grid.offset[some].T)
    errors = np.zeros((columns, rows), np.float32)
    codes = np.empty((columns, rows), np.int16)
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        targets = ordered[block].copy()
        if start:
            targets -= factor.coupling[:start, block].T @ errors[:start]
        _round_block(
            targets, ordered[block], factor.coupling[block, block].copy(), factor.pivots[block],
            scale, offset, groups[block], grid.lowest, grid.highest, grid.table,
            codes[block], errors[block], cost,
        )  # fmt: skip
    return codes


def cost_of(factor: Factor, errors: F32) -> npt.NDArray[np.float64]:
    """The cost f64[rows] of any errors f32[rows, columns] under the damped Hessian, as ``apply`` counts it."""
    cost = np.zeros(len(errors))
    columns = len(factor.order)
    for first in range(0, len(errors), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        ordered = np.ascontiguousarray(errors[rows][:, factor.order], np.float32)
        for start in range(0, columns, _COLUMNS_AT_ONCE):
            stop = min(start + _COLUMNS_AT_ONCE, columns)
            block = slice(start, stop)
            moved = ordered[:, block] + ordered[:, :stop] @ factor.coupling[:stop, block]
            cost[rows] += np.square(moved, dtype=np.float64) @ factor.pivots[block]
    return cost


@njit(cache=True, parallel=True)
def _round_block(
    targets: F32,
    weights: F32,
    coupling: F32,
    pivots: npt.NDArray[np.float64],
    scale: F32,
    offset: F32,
    groups: npt.NDArray[np.int32],
    lowest: int,
    highest: int,
    table: F32,
    codes: npt.NDArray[np.int16],
    errors: F32,
    cost: npt.NDArray[np.float64],
) -> None:
    """One block of columns, ``[columns of the block, rows]``; rows lie side by side and go through in tiles, each
    with arrays of its own and loops of a fixed length (as in ``groups.py``)."""
    width, rows = targets.shape
    for tile in prange((rows + _TILE - 1) // _TILE):
        first = tile * _TILE
        count = min(_TILE, rows - first)
        own = np.zeros((width, _TILE), np.float32)
        own[:, :count] = targets[:, first : first + count]
        wrong, spent = np.zeros(_TILE, np.float32), np.zeros(_TILE, np.float64)
        for k in range(width):
            group, target = groups[k], own[k]
            for r in range(count):
                step, shift = scale[group, first + r], offset[group, first + r]
                at = (target[r] - shift) / step if step != 0 else np.float32(0)
                code = nearest_step(at, lowest, highest, table)
                value = step * (np.float32(code) if table.size == 0 else table[code - lowest]) + shift
                codes[k, first + r] = code
                wrong[r] = value - weights[k, first + r]
                spent[r] += pivots[k] * (value - target[r]) ** 2
            errors[k, first : first + count] = wrong[:count]
            for later in range(k + 1, width):
                pull, row = coupling[k, later], own[later]
                for r in range(_TILE):
                    row[r] -= pull * wrong[r]
        cost[first : first + count] += spent[:count]
