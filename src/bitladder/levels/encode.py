"""Codes, scales and zeros as the arrays of a checkpoint, and back. Layouts: ``levels/checkpoint.py``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.kernels.grid import F32, contiguous_groups
from bitladder.kernels.groups import Affine
from bitladder.kernels.packing import pack, unpack
from bitladder.levels.checkpoint import LAYOUTS, Layout
from bitladder.levels.kinds import WHOLE_ROW, CheckpointLevel

Arrays = dict[str, npt.NDArray[Any]]


def encode(level: CheckpointLevel, codes: npt.NDArray[np.integer], parameters: Affine) -> Arrays:
    """The arrays of one linear layer by suffix. Scales stay f32 where the file holds them in the model's
    dtype.

    Args:
        level: Says the layout, bits and group size.
        codes: ``[outputs, inputs]``, unsigned.
        parameters: Scales already rounded to what the file stores.
    """
    layout = LAYOUTS[level.layout]
    rows, columns = codes.shape
    if layout.name == "int-quantized":
        signed = (codes.astype(np.int16) - 128).astype(np.int8)
        return {layout.codes: signed, layout.scales: parameters.scales}
    if layout.name == "pack-quantized":
        arrays: Arrays = {
            layout.codes: pack(codes, level.bits),
            layout.scales: parameters.scales,
            layout.shape: np.array([rows, columns], np.int64),
        }
        if not level.sym:
            packed = pack(parameters.zeros.T, level.bits)
            arrays[layout.zeros] = np.ascontiguousarray(packed.T)
        return arrays
    along_outputs = layout.name == "awq"
    packed = pack(codes.T, level.bits, layout.order) if along_outputs else pack(codes, level.bits).T
    zeros = (parameters.zeros.T - layout.zero_shift) & (2**level.bits - 1)
    arrays = {
        layout.codes: np.ascontiguousarray(packed),
        layout.scales: np.ascontiguousarray(parameters.scales.T).astype(np.float16),
        layout.zeros: pack(zeros, level.bits, layout.order),
    }
    if layout.group_index:
        arrays[layout.group_index] = contiguous_groups(columns, level.group_size)
    return arrays


def decode(level: CheckpointLevel, arrays: Mapping[str, npt.NDArray[Any]], shape: tuple[int, int]) -> F32:
    """Weights ``f32[outputs, inputs]`` of the arrays that ``encode`` made, for checking what was written.

    Raises:
        ValueError: arrays and shape contradict each other.
    """
    layout = LAYOUTS[level.layout]
    rows, columns = shape
    group = contiguous_groups(columns, level.group_size)
    if layout.name == "int-quantized":
        return np.asarray(arrays[layout.codes].astype(np.float32) * arrays[layout.scales].astype(np.float32))
    if layout.name == "pack-quantized":
        codes = unpack(arrays[layout.codes], level.bits, columns).astype(np.int32)
        scales = arrays[layout.scales].astype(np.float32)
        zeros = np.full(scales.shape, 2 ** (level.bits - 1), np.int32)
        if layout.zeros in arrays:
            zeros = unpack(np.ascontiguousarray(arrays[layout.zeros].T), level.bits, rows).T.astype(np.int32)
    else:
        codes = _codes(layout, arrays[layout.codes], level.bits, shape).astype(np.int32)
        scales = arrays[layout.scales].T.astype(np.float32)
        zeros = unpack(arrays[layout.zeros], level.bits, rows, layout.order).T.astype(np.int32)
        zeros = zeros + layout.zero_shift
    groups = 1 if level.group_size == WHOLE_ROW else columns // level.group_size
    if scales.shape != (rows, groups):
        raise ValueError(f"scales of shape {scales.shape}, expected {(rows, groups)}")
    return np.asarray((codes - zeros[:, group]).astype(np.float32) * scales[:, group])


def digest(weights: F32) -> str:
    """A hash of decoded weights, shape included."""
    found = hashlib.blake2b(repr(weights.shape).encode(), digest_size=16)
    found.update(np.ascontiguousarray(weights, np.float32).data)
    return found.hexdigest()


def _codes(layout: Layout, words: npt.NDArray[np.int32], bits: int, shape: tuple[int, int]) -> npt.NDArray[np.uint16]:
    if layout.name == "awq":
        return unpack(words, bits, shape[0], layout.order).T
    return unpack(np.ascontiguousarray(words.T), bits, shape[1])
