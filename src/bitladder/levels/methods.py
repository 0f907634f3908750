"""One weight matrix of a checkpoint level: the search for scales and the choice of codes that its method
stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitladder.kernels import awq, gptq, groups
from bitladder.kernels.grid import F32
from bitladder.levels.kinds import CheckpointLevel

_FEW_CANDIDATES = np.array([1.0, 0.92, 0.84, 0.75], np.float32)
"""Enough shrinks to rank AWQ's scales by; the final search takes all."""
_FEWEST_ROWS, _SHARE_OF_ROWS = 256, 4
"""A loss that is only told comes from every fourth row, or from so many: the products cost as much as the search."""


@dataclass(frozen=True)
class Quantized:
    """Codes ``i16[rows, columns]``, their scales and zeros, and what they cost on the calibration set."""

    codes: npt.NDArray[np.int16]
    parameters: groups.Affine
    decoded: F32
    """The weights ``f32[rows, columns]`` as a reader of the file computes them."""
    loss: float
    """Squared error of the outputs as a share of the outputs' energy; NaN without calibration inputs. Without feedback
    it is known from a part of the rows, spread over all."""


def feedback(
    level: CheckpointLevel, factor: gptq.Factor, weights: F32, *, scale_dtype: str = "float16", device: str = "cpu"
) -> Quantized:
    """GPTQ: scales by what an error of each column really costs, codes with error feedback, chosen on ``device``."""
    parameters = _search(level, weights, factor.importance, scale_dtype)
    codes, cost = gptq.apply_on(device)(factor, weights, parameters.grid())
    # Costs are under the damped Hessian; the damping's own share is no error of the outputs.
    decoded = parameters.decode(codes)
    wrong = cost.sum() - factor.ridge * _square_sum(decoded - weights)
    whole = gptq.cost_of(factor, weights).sum() - factor.ridge * _square_sum(weights)
    return Quantized(codes, parameters, decoded, max(0.0, float(wrong / whole)) if whole > 0 else float("nan"))


def rounded(
    level: CheckpointLevel, gram: F32 | None, weights: F32, *, weighed: bool = True, scale_dtype: str = "float16"
) -> Quantized:
    """Nearest codes on scales searched under the inputs' energies (all equal where ``gram`` is None or they are not
    to be ``weighed``: the loss is known then, and the codes do not depend on the text)."""
    importance = None if gram is None or not weighed else _energies(gram)
    parameters = _search(level, weights, importance, scale_dtype)
    codes = parameters.grid().nearest(weights)
    decoded = parameters.decode(codes)
    if gram is None:
        return Quantized(codes, parameters, decoded, float("nan"))
    count = min(len(weights), max(_FEWEST_ROWS, len(weights) // _SHARE_OF_ROWS))
    some = np.linspace(0, len(weights) - 1, count).astype(np.intp)
    return Quantized(codes, parameters, decoded, relative_error(decoded[some] - weights[some], weights[some], gram))


def awq_scales(
    level: CheckpointLevel, gram: F32, weights: Sequence[F32], *, tied: npt.NDArray[np.intp] | None = None
) -> awq.Scales:
    """AWQ's scales for one shared input, with rounding as ``level`` will do it."""

    def round_trip(scaled: F32, importance: F32) -> F32:
        found = groups.search(
            scaled,
            level.bits,
            level.group_size,
            sym=level.sym,
            importance=importance,
            shrinks=_FEW_CANDIDATES,
        )
        return found.decode(found.grid().nearest(scaled))

    return awq.prepare(gram, weights, [round_trip] * len(weights), group_size=level.group_size, tied=tied)


def relative_error(difference: F32, weights: F32, gram: F32) -> float:
    """``tr(D G D^T) / tr(W G W^T)``: how much of the outputs' energy on the calibration set is error."""
    whole = float(np.einsum("rk,rk->", weights @ gram, weights, dtype=np.float64))
    wrong = float(np.einsum("rk,rk->", difference @ gram, difference, dtype=np.float64))
    return wrong / whole if whole > 0 else float("nan")


def _square_sum(values: F32) -> float:
    return float(np.einsum("rk,rk->", values, values, dtype=np.float64))


def _energies(gram: F32) -> F32:
    diagonal = np.diagonal(gram).astype(np.float64)
    return np.asarray(diagonal / max(float(diagonal.mean()), np.finfo(np.float64).tiny), np.float32)


def _search(level: CheckpointLevel, weights: F32, importance: F32 | None, scale_dtype: str) -> groups.Affine:
    return groups.search(
        weights,
        level.bits,
        level.group_size,
        sym=level.sym,
        importance=importance,
        least_zero=1 if level.layout == "gptq" else 0,
        scale_dtype=scale_dtype if level.layout in ("pack-quantized", "int-quantized") else "float16",
        signed=level.activations == "float",
    )
