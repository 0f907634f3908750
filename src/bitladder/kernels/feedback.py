"""Block formats with error feedback: ordinary llama.cpp blocks whose codes were chosen by GPTQ.

The importance-weighted search (``kernels.quantize``) finds scales and minima; they stay. The codes are then chosen
column by column, each rounding error moved into the columns still to come (``gptq.py``). Columns go in falling order
of energy while blocks stay where they are in storage, so any llama.cpp reads the result. Scales are not refined
against the Hessian afterwards: that they were found for nearest codes is what this gives up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitladder.kernels import gptq
from bitladder.kernels.api import dequantize, quantize
from bitladder.kernels.codes import CODE_BITS, grid_of, with_codes
from bitladder.kernels.grid import F32
from bitladder.kernels.rows import Effort


@dataclass(frozen=True)
class Blocks:
    """Quantized rows uint8[rows, row_bytes], and what they cost on the calibration set.

    ``cost`` is ``tr(D H D^T)`` with D the error of the weights and H the damped Hessian; ``plain_cost`` that of the
    same scales with every weight rounded to its nearest code.
    """

    data: NDArray[np.uint8]
    cost: float
    plain_cost: float


def takes_feedback(qtype: str) -> bool:
    """Whether the codes of a format can be chosen apart from its scales: all block formats, no floats."""
    return qtype in CODE_BITS


def quantize_with_feedback(
    weights: F32,
    qtype: str,
    factor: gptq.Factor,
    *,
    importance: F32,
    effort: Effort = "good",
    threads: int = 1,
    device: str = "cpu",
) -> Blocks:
    """Store weights in a block format, rounding errors fed back into the columns not yet rounded.

    Args:
        weights: f32[rows, columns], finite; columns a multiple of the format's ``block_size``.
        qtype: a format that ``takes_feedback``.
        factor: of the Hessian [columns, columns] of the inputs that the weights meet (``gptq.prepare``).
        importance: f32[columns], by which scales are searched: the inputs' energies. (The factor's pivots, what errors
            cost once others correct them, did worse: docs/log.md.)
        effort: how long to search for scales.
        threads: for the search.
        device: "cpu", or another device of torch on which codes are chosen.

    The error is never above that of plain rounding on the same scales: rows that feedback did not help are kept plain.
    """
    data = quantize(weights, qtype, importance=importance, effort=effort, threads=threads)
    grid = grid_of(data, qtype)
    if device == "cpu":
        codes, cost = gptq.apply(factor, weights, grid)
    else:
        from bitladder.kernels import gptq_gpu  # torch is heavy, and most runs never need it here

        codes, cost = gptq_gpu.apply(factor, weights, grid, device)
    plain = gptq.cost_of(factor, dequantize(data, qtype, threads=threads) - weights)
    worse = cost > plain
    fed = with_codes(data, qtype, codes)
    fed[worse] = data[worse]
    return Blocks(fed, float(np.minimum(cost, plain).sum()), float(plain.sum()))
