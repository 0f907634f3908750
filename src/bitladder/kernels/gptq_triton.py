"""GPTQ's rounding of one block of columns as a single kernel of Triton, for CUDA: a block of 64 columns is otherwise
some six hundred small launches, one after another.

A program has a tile of rows, whose 64 targets it holds in registers; columns go one at a time, as in ``gptq_gpu``.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 32
_HALF_TO_EVEN = 12582912.0
"""1.5 * 2^23: adding it to a small f32 and taking it away rounds to the nearest integer, halves to even."""


@triton.jit
def _round(
    targets, weights, coupling, pivots, scale, offset, groups, steps, codes, errors, cost,
    rows, width, lowest, highest, magic, entries: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, block)
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = row < rows
    whole = (column[:, None] < width) & inside[None, :]
    left = tl.load(targets + column[:, None] * rows + row[None, :], mask=whole, other=0.0)
    spent = tl.zeros([tile], tl.float64)
    for k in range(width):
        target = tl.sum(tl.where(column[:, None] == k, left, 0.0), axis=0)
        group = tl.load(groups + k)
        step = tl.load(scale + group * rows + row, mask=inside, other=0.0)
        low = tl.load(offset + group * rows + row, mask=inside, other=0.0)
        at = tl.where(step != 0, (target - low) / tl.where(step != 0, step, 1.0), 0.0)
        if entries > 0:
            entry = tl.zeros([tile], tl.int32)
            for one in range(entries - 1):  # a tie goes to the lower entry
                middle = (tl.load(steps + one) + tl.load(steps + one + 1)) / 2
                entry += (middle < at).to(tl.int32)
            code = entry + lowest
            value = step * tl.load(steps + entry) + low
        else:
            near = tl.minimum(tl.maximum(at, lowest * 1.0), highest * 1.0)
            level = (near + magic) - magic
            code = level.to(tl.int32)
            value = step * level + low
        wrong = value - tl.load(weights + k * rows + row, mask=inside, other=0.0)
        tl.store(codes + k * rows + row, code.to(tl.int16), mask=inside)
        tl.store(errors + k * rows + row, wrong, mask=inside)
        short = (value - target).to(tl.float64)
        spent += tl.load(pivots + k) * short * short
        pull = tl.load(coupling + k * block + column)
        left -= pull[:, None] * wrong[None, :]
    tl.store(cost + row, tl.load(cost + row, mask=inside, other=0.0) + spent, mask=inside)


def round_block(
    targets: torch.Tensor,
    weights: torch.Tensor,
    coupling: torch.Tensor,
    pivots: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    groups: torch.Tensor,
    steps: torch.Tensor | None,
    lowest: int,
    highest: int,
    codes: torch.Tensor,
    errors: torch.Tensor,
    cost: torch.Tensor,
) -> None:
    """Round a block, as the loop in ``gptq_gpu.apply`` does.

    Args:
        targets: f32[columns, rows], at most 64 columns, what the errors of blocks before have made of the weights.
        weights: f32[columns, rows].
        coupling: f32[64, 64], zero on and below the diagonal and beyond the columns.
        pivots: f64[columns].
        scale: f32[groups, rows].
        offset: f32[groups, rows].
        groups: int64[columns], of each column.
        steps: f32[codes] in ascending order, or None for evenly spaced ones.
        lowest: The first code.
        highest: The last.
        codes: int16[columns, rows], filled.
        errors: f32[columns, rows], filled.
        cost: f64[rows], added to.
    """
    width, rows = targets.shape
    _round[(triton.cdiv(rows, _ROWS),)](
        targets, weights, coupling, pivots, scale, offset, groups, targets if steps is None else steps, codes, errors,
        cost, rows, width, lowest, highest, _HALF_TO_EVEN, 0 if steps is None else len(steps), len(coupling), _ROWS,
    )  # fmt: skip
