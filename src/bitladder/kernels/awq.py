"""AWQ: multiply the input channels that matter by a scale before rounding, and divide by it in the layer
before.

``W x = (W diag(s)) (diag(1/s) x)``: the product does not change, but a column that is larger loses less to
rounding, and its neighbours in the group lose a little more. The layer before (a norm, or a linear layer)
takes up ``1/s``, so nothing is left to do at run time. Which scales pay follows from the inputs (Lin et al.
2023, arXiv:2306.00978):

    s = a^alpha / m^beta,    a: root mean square of each input channel, m: relative size of each column's
    weights

with ``alpha`` in 0..1 and ``beta`` either 0 or 1 - alpha. Where the paper runs the layer for every candidate,
the loss is in closed form here: with ``G = X^T X`` of the calibration inputs and ``D = round(W s)/s - W``,
the squared error of the outputs is ``tr(D G D^T)``. Every fourth row stands for the rest while searching.

What it gives up: one scale per channel, chosen from a two-parameter family; error feedback (``gptq``) can
still follow. SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) is the same folding with ``s`` from the largest
inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitladder.kernels.grid import F32

RoundTrip = Callable[[F32, F32], F32]
"""``round_trip(weights f32[rows, columns], importance f32[columns]) -> f32`` of the same shape: quantize and
decode. Rows are stored independently of one another."""

_COARSE = (0.0, 0.2, 0.4, 0.6, 0.8)
_SHARE_OF_ROWS = 4
_WIDEST = 1e4


@dataclass(frozen=True)
class Scales:
    """What the search found: multiply column k of the weights by ``factors[k]`` (f32, all ones where nothing
    paid)."""

    factors: F32
    alpha: float
    duo: bool
    """Whether the weights' sizes take part (beta = 1 - alpha)."""
    loss: float
    """Squared error of the outputs with the scales, as a share of the outputs' own energy, on the rows
    searched."""
    plain_loss: float
    """The same without scales."""


@dataclass(frozen=True)
class Fold:
    """What folding does to one tensor: columns are multiplied, rows divided, f32 factors, None for none.

    A vector (a norm's weight, a bias) has rows only: one channel each.
    """

    columns: F32 | None = None
    rows: F32 | None = None

    def apply(self, weights: F32, rows: slice = slice(None)) -> F32:
        """``weights f32[rows, columns]`` of a matrix's ``rows``, or a whole vector ``f32[channels]``, folded."""
        if weights.ndim == 1:
            return weights if self.rows is None else np.asarray(weights / self.rows, np.float32)
        scaled = weights if self.columns is None else weights * self.columns
        return np.asarray(scaled if self.rows is None else scaled / self.rows[rows, None], np.float32)

    def vectors(self) -> dict[str, F32]:
        """The factors that there are, by name: ``columns``, ``rows``."""
        both = {"columns": self.columns, "rows": self.rows}
        return {kind: factors for kind, factors in both.items() if factors is not None}

    def importance(self, energies: F32) -> F32:
        """Mean squares ``f32[..., columns]`` of the tensor's inputs, after the fold has divided those inputs."""
        return energies if self.columns is None else np.asarray(energies / self.columns**2, np.float32)


def prepare(
    gram: npt.NDArray[np.floating],
    weights: Sequence[F32],
    round_trips: Sequence[RoundTrip],
    *,
    group_size: int = 0,
    tied: npt.NDArray[np.intp] | None = None,
) -> Scales:
    """Search the scales of one input that all of ``weights`` read.

    Args:
        gram: ``X^T X`` (any multiple), ``[columns, columns]``.
        weights: ``f32[rows, columns]`` of every linear layer that reads this input.
        round_trips: How each of ``weights`` will be stored.
        group_size: Weights sizes are taken relative to the largest of their group; 0: of the row.
        tied: ``[columns]`` class of each column; columns of a class get one scale, as the layer before
            demands it (key and value heads that several query heads share).

    Raises:
        ValueError: the Gram matrix is not finite.
    """
    diagonal = np.diagonal(gram).astype(np.float64)
    if not np.isfinite(gram).all():
        raise ValueError("the Gram matrix of the inputs is not finite")
    sampled = [part[::_SHARE_OF_ROWS] for part in weights]
    rows = np.concatenate(sampled)
    matrix = np.ascontiguousarray(gram, np.float32) / np.float32(max(diagonal.mean(), np.finfo(np.float32).tiny))
    energy = _loss(rows, matrix)
    ones = np.ones(len(diagonal), np.float32)
    if energy == 0:
        return Scales(ones, 0.0, False, 0.0, 0.0)
    inputs, sizes = _channel_sizes(diagonal, rows, group_size)

    def measure(factors: F32) -> float:
        importance = (np.diagonal(matrix) / factors**2).astype(np.float32)
        kept = [store(part * factors, importance) for store, part in zip(round_trips, sampled, strict=True)]
        return _loss(np.concatenate(kept) / factors - rows, matrix) / energy

    plain = measure(ones)
    best = Scales(ones, 0.0, False, plain, plain)
    for duo in (False, True):
        for alpha in _COARSE:
            best = _better(best, measure, inputs, sizes, alpha, duo, tied)
    for step in (-0.1, 0.1):
        best = _better(best, measure, inputs, sizes, best.alpha + step, best.duo, tied)
    return best


def apply(scales: Scales, weights: F32) -> F32:
    """``weights f32[rows, columns]`` with the scales multiplied in."""
    return np.asarray(weights * scales.factors, np.float32)


def absorb(factors: F32, before: F32) -> F32:
    """The layer before with ``1/s`` taken up: a norm's ``f32[channels]`` or bias, or the rows of
    ``f32[channels, columns]``."""
    divisor = factors if before.ndim == 1 else factors[:, None]
    return np.asarray(before / divisor, np.float32)


def smooth_factors(
    largest_inputs: F32,
    weights: Sequence[F32],
    *,
    strength: float = 0.5,
    tied: npt.NDArray[np.intp] | None = None,
) -> F32:
    """SmoothQuant's ``s = max|x|^-strength max|w|^(1-strength)`` inverted to multiply columns, normalised to
    mean 1 in the log.

    Args:
        largest_inputs: ``f32[columns]``, the largest magnitude of each channel in the calibration set.
        weights: Every linear layer that reads this input.
        strength: 0 leaves the outliers with the inputs, 1 moves all of them into the weights.
        tied: As in ``prepare``.
    """
    columns = np.max([np.abs(part).max(axis=0) for part in weights], axis=0)
    raw = np.maximum(largest_inputs, 1e-5) ** strength / np.maximum(columns, 1e-5) ** (1 - strength)
    return _normalised(raw, tied)


def _better(
    best: Scales,
    measure: Callable[[F32], float],
    inputs: npt.NDArray[np.float64],
    sizes: npt.NDArray[np.float64],
    alpha: float,
    duo: bool,
    tied: npt.NDArray[np.intp] | None,
) -> Scales:
    if not 0 <= alpha <= 1 or (alpha == 0 and not duo):
        return best
    factors = _normalised(inputs**alpha / (sizes ** (1 - alpha) if duo else 1.0), tied)
    loss = measure(factors)
    return Scales(factors, alpha, duo, loss, best.plain_loss) if loss < best.loss else best


def _channel_sizes(
    diagonal: npt.NDArray[np.float64], rows: F32, group_size: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Root mean square of each input channel, and mean size of each column relative to the largest of its
    group."""
    columns = len(diagonal)
    size = group_size if group_size and columns % group_size == 0 else columns
    grouped = np.abs(rows.reshape(len(rows), -1, size))
    largest = np.maximum(grouped.max(axis=2, keepdims=True), np.finfo(np.float32).tiny)
    relative = (grouped / largest).reshape(len(rows), columns).mean(axis=0, dtype=np.float64)
    # Channels that are silent in the calibration set would get scales from nothing: give them the quietest
    # live one's.
    live = diagonal > 0
    floor = diagonal[live].min() if live.any() else 1.0
    return np.sqrt(np.where(live, diagonal, floor)), np.maximum(relative, 1e-4)


def _normalised(raw: npt.NDArray[np.floating], tied: npt.NDArray[np.intp] | None) -> F32:
    """Positive, finite, geometric mean of the extremes 1, at most ``_WIDEST`` apart from it; equal within
    tied classes."""
    logs = np.log(np.maximum(raw.astype(np.float64), np.finfo(np.float64).tiny))
    if tied is not None:
        counts = np.bincount(tied)
        logs = (np.bincount(tied, weights=logs) / np.maximum(counts, 1))[tied]
    logs -= (logs.max() + logs.min()) / 2
    return np.asarray(np.exp(np.clip(logs, -np.log(_WIDEST), np.log(_WIDEST))), np.float32)


def _loss(difference: F32, gram: F32) -> float:
    """``tr(D G D^T)``."""
    return float(np.einsum("rk,rk->", difference @ gram, difference, dtype=np.float64))
