"""The kernel for CUDA beside the loop that it stands for: codes equal, costs too. Run by Triton's interpreter,
which is chosen when Triton is imported:

    TRITON_INTERPRET=1 python triton_codes.py
"""

import numpy as np

from bitladder.kernels import gptq, gptq_gpu, quantize
from bitladder.kernels.codes import grid_of
from bitladder.kernels.grid import Grid, contiguous_groups


def inputs(columns: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((600, 8)) @ rng.standard_normal((8, columns))
    return (mixed + 0.3 * rng.standard_normal((600, columns))).astype(np.float32)


def evenly_spaced_codes(rows: int, columns: int, group: int) -> None:
    """Rows and columns that fill no tile, and a group whose scale is zero."""
    x, weights = inputs(columns), np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
    factor = gptq.prepare(x.T @ x, damp=0.01)
    groups = contiguous_groups(columns, group)
    scale = np.full((rows, groups.max() + 1), 0.4, np.float32)
    scale[2, 0] = 0
    grid = Grid(scale, np.full_like(scale, -0.1), groups, -8, 7)
    agree(factor, weights, grid)


def codes_of_block_formats(qtype: str) -> None:
    x, weights = inputs(256), np.random.default_rng(2).standard_normal((5, 256)).astype(np.float32)
    agree(gptq.prepare(x.T @ x, damp=0.01), weights, grid_of(quantize(weights, qtype), qtype))


def agree(factor: gptq.Factor, weights: np.ndarray, grid: Grid) -> None:
    codes, cost = gptq_gpu.apply(factor, weights, grid, "cpu", fused=False)
    fused, fused_cost = gptq_gpu.apply(factor, weights, grid, "cpu", fused=True)
    np.testing.assert_array_equal(fused, codes)
    np.testing.assert_allclose(fused_cost, cost, rtol=1e-5)
    here, _ = gptq.apply(factor, weights, grid)
    assert np.mean(fused != here) < 2e-3  # ties within rounding, and what follows them


if __name__ == "__main__":
    for shape in ((40, 96, 32), (7, 64, 0), (33, 160, 16)):
        evenly_spaced_codes(*shape)
    for kind in ("IQ4_NL", "Q4_K"):
        codes_of_block_formats(kind)
    print("equal")
