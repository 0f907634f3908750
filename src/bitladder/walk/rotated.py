"""The weights of a file whose residual stream is rotated: the same predictions of other numbers, none of which stand
out (``kernels/rotation.py``, ``formats/residual.py``)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import numpy as np
from numpy.typing import NDArray

from bitladder.formats.residual import Meets, Part
from bitladder.formats.tensors import TensorInfo
from bitladder.kernels.rotation import Rotation
from bitladder.levels.held import require_held
from bitladder.walk.weights import FileWeights

F32 = NDArray[np.float32]
Rows = slice | NDArray[np.int64] | None

STORED = "F16"
"""Three more bits than bfloat16 has, for sums of many weights; what is beyond its reach is refused when written."""


class RotatedWeights:
    """``LevelWeights`` of a source with a rotated stream, as they are stored."""

    def __init__(self, source: FileWeights, parts: Mapping[str, Part], turned: Rotation) -> None:
        self.source, self.parts, self._turned = source, parts, turned
        self._shapes = {one.name: one.shape for one in source.file.model.tensors}

    def __call__(self, name: str, rows: Rows = None) -> F32:
        """As ``LevelWeights``; a norm is read whole. Raises BadWeights for what 16 bits do not hold."""
        part, shape = self.parts[name], self._shapes[name]
        match part.meets:
            case Meets.NEITHER:
                return self.source(name, rows)
            case Meets.NORM:
                return np.ones(shape, np.float32)
            case Meets.WRITES:
                return self._written(name, rows)
            case Meets.HOLDS:
                values = self._turned.columns(self.source(name, rows))
            case Meets.READS:
                values = self._turned.columns(self.source(name, rows) * self.source(part.norm).reshape(-1))
        return self._stored(name, values)

    def _written(self, name: str, rows: Rows) -> F32:
        """Rows of what writes are sums of all rows of their matrix."""
        shape = self._shapes[name]
        if name.endswith(".bias"):
            values = self._stored(name, self._turned.columns(self.source(name)))
            return values if rows is None else values.reshape(-1, shape[-1])[rows]
        height = shape[-2]
        whole = slice(0, math.prod(shape[:-1]) // height)
        if isinstance(rows, slice) and rows.stop is not None:
            whole = slice((rows.start or 0) // height, -(-rows.stop // height))
        own = self.source(name, slice(whole.start * height, whole.stop * height))
        turned = np.concatenate([self._turned.rows(one) for one in own.reshape(-1, height, shape[-1])])
        values = self._stored(name, turned)
        if rows is None:
            return values.reshape(shape)
        if isinstance(rows, slice):
            return values[slice(*(at - whole.start * height for at in rows.indices(whole.stop * height)[:2]))]
        return values[rows]

    def _stored(self, name: str, values: F32) -> F32:
        if self.qtype(name) != STORED:
            return values
        require_held(values.reshape(-1, values.shape[-1]), [STORED], name)
        return values.astype(np.float16).astype(np.float32)

    def identity(self, name: str) -> Hashable:
        """As ``LevelWeights``."""
        if self.parts[name].meets is Meets.NEITHER:
            return self.source.identity(name)
        return id(self), name

    def qtype(self, name: str) -> str:
        """As ``LevelWeights``."""
        return stored_type(self.source.file.info(name), self.parts[name])

    def forget(self, name: str) -> None:
        """As ``LevelWeights``: nothing is kept."""


def stored_type(info: TensorInfo, part: Part) -> str:
    """The type that a tensor has in the rotated file: vectors and what does not change keep theirs."""
    vector = len(info.shape) < 2
    if part.meets is Meets.NEITHER:
        return info.qtype
    return "F32" if vector or info.qtype == "F32" else STORED
