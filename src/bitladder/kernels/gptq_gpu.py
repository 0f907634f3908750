"""GPTQ's choice of codes on a torch device: the twin of ``gptq.apply``, all rows of a matrix side by side.

Columns depend on one another, so they go one at a time within a block of 64, on CUDA inside one kernel
(``gptq_triton.py``); the errors of finished blocks reach a new block as one matrix product. Codes can differ from the
CPU's where a target lies within rounding of a tie.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import numpy.typing as npt
import torch

from bitladder.kernels.gptq import BLOCK, Factor
from bitladder.kernels.grid import F32, Grid


def apply(
    factor: Factor, weights: F32, grid: Grid, device: str, *, fused: bool | None = None
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float64]]:
    """Codes ``i16[rows, columns]`` in storage order and the cost of each row, as ``gptq.apply``. ``fused``: a block is
    one kernel of Triton's; None: on CUDA, where Triton is there."""
    fused = _can_fuse(device) if fused is None else fused
    order = torch.from_numpy(factor.order.astype(np.int64)).to(device)
    ordered = torch.from_numpy(np.ascontiguousarray(weights, np.float32)).to(device)[:, order].T.contiguous()
    coupling = torch.from_numpy(factor.coupling).to(device)
    pivots = torch.from_numpy(factor.pivots).to(device)
    groups = torch.from_numpy(grid.group_of[factor.order].astype(np.int64)).to(device)
    scale, offset = (torch.from_numpy(np.ascontiguousarray(one.T)).to(device) for one in (grid.scale, grid.offset))
    columns, rows = ordered.shape
    errors = torch.zeros(columns, rows, device=device)
    codes = torch.empty(columns, rows, dtype=torch.int16, device=device)
    cost = torch.zeros(rows, dtype=torch.float64, device=device)
    steps = None if grid.steps is None else torch.from_numpy(grid.steps).to(device)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        targets = ordered[start:stop] - coupling[:start, start:stop].T @ errors[:start]
        if fused:
            from bitladder.kernels.gptq_triton import round_block

            own = torch.zeros(BLOCK, BLOCK, device=device)
            own[: stop - start, : stop - start] = coupling[start:stop, start:stop]
            block = slice(start, stop)
            round_block(
                targets, ordered[block], own, pivots[block], scale, offset, groups[block], steps, grid.lowest,
                grid.highest, codes[block], errors[block], cost,
            )  # fmt: skip
            continue
        for k in range(start, stop):
            target, step, low = targets[k - start], scale[groups[k]], offset[groups[k]]
            code, value = _nearest(target, step, low, grid)
            codes[k] = code
            errors[k] = value - ordered[k]
            cost += pivots[k] * (value - target).double().square()
            targets[k + 1 - start :] -= coupling[k, k + 1 : stop, None] * errors[k]
    stored = torch.empty_like(codes)
    stored[order] = codes
    return stored.T.contiguous().cpu().numpy(), cost.cpu().numpy()


def _can_fuse(device: str) -> bool:
    """Builds of torch for CUDA on Linux bring Triton along."""
    return device.startswith("cuda") and importlib.util.find_spec("triton") is not None


def _nearest(
    target: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """The code nearest to each target, and the value that it stands for."""
    at = torch.where(step != 0, (target - offset) / torch.where(step != 0, step, 1), 0)
    if grid.steps is None:
        code = at.round().clamp(grid.lowest, grid.highest)
        return code.to(torch.int16), step * code + offset
    table = torch.from_numpy(grid.steps).to(at.device)
    middles = (table[1:] + table[:-1]) / 2
    entry = torch.searchsorted(middles, at)  # a tie goes to the lower entry, as on the CPU
    return (entry + grid.lowest).to(torch.int16), step * table[entry] + offset
