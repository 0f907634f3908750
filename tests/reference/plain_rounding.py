"""Plain rounding to groups: the scale follows from the largest weight, or from the range."""

import numpy as np
import numpy.typing as npt

from bitladder.kernels.grid import F32
from bitladder.kernels.groups import Affine


def round_to_nearest(
    weights: F32, bits: int, group_size: int, *, sym: bool = True
) -> tuple[npt.NDArray[np.int16], Affine]:
    """Plain rounding of ``weights f32[rows, columns]``, halves to even; scales stay f32.

    Symmetric: ``scale = max|w| / (2^b - 1) * 2``, as llm-compressor does (its codes are reproduced bit for
        bit).
    Asymmetric: the range from min(w, 0) to max(w, 0) in ``2^b - 1`` steps.
    """
    rows, columns = weights.shape
    grouped = weights.reshape(rows, -1, group_size or columns)
    top = np.float32(2**bits - 1)
    if sym:
        scales = np.abs(grouped).max(axis=2) / (top / np.float32(2))
        zeros = np.full(scales.shape, 2 ** (bits - 1), np.int16)
    else:
        low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
        scales = (high - low) / top
        zeros = np.clip(np.rint(-low / np.where(scales == 0, 1, scales)), 0, top).astype(np.int16)
    scales = np.where(scales == 0, np.float32(1), scales).astype(np.float32)
    steps = np.rint(grouped / scales[:, :, None]) + zeros[:, :, None]
    codes = np.clip(steps, 0, top).astype(np.int16).reshape(rows, columns)
    return codes, Affine(scales, zeros, bits, group_size, columns)
