"""Levels whose numbers beside codes can be moved: what a layer is with its present numbers, and how gradients of its
parameters become slopes of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bitladder.files.gguf import GgufFile
from bitladder.formats.roles import Parameter, layer_tensor
from bitladder.kernels import dequantize
from bitladder.kernels.free_numbers import basis_of, free_fields, numbers_of, slopes, with_numbers
from bitladder.walk.layers import LayeredModel, tensor_at
from bitladder.walk.transforms import offset_of, stored
from bitladder.walk.weights import LevelWeights

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Rows = slice | NDArray[np.int64] | None


class Tunable(LevelWeights, Protocol):
    """A level with numbers that move, and the weights that they make."""

    numbers: dict[str, F32]
    """Present ones, by the name under which they move together: f32[rows, blocks, numbers], or a vector's values."""

    def start(self, name: str) -> F32:
        """What the level holds: as ``numbers``, empty of a name that has none."""

    def layer(self, model: LayeredModel, layer: int) -> nn.Module:
        """A layer filled with the present weights."""

    def asked(self, model: LayeredModel, layer: int, block: nn.Module, names: Collection[str]) -> list[str]:
        """Paths of the parameters in ``block`` whose gradients tell the slopes of the numbers under ``names``."""

    def slopes(
        self, model: LayeredModel, layer: int, block: nn.Module, names: Collection[str]
    ) -> Iterator[tuple[str, F32]]:
        """The slopes of those numbers, shaped as these, from the gradients in ``block``."""


class LevelBytes(Protocol):
    """A level as it is stored, while it is being made or afterwards."""

    def qtype(self, name: str) -> str:
        """The type in which a tensor is stored."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""

    def raw(self, name: str, rows: Rows = None) -> U8:
        """A tensor's bytes, or those of some of its (flattened) rows: uint8[rows, row_bytes]."""


class FileBytes:
    """``LevelBytes`` of a finished file."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def qtype(self, name: str) -> str:
        """As ``LevelBytes``."""
        return self._file.info(name).qtype

    def shape(self, name: str) -> tuple[int, ...]:
        """As ``LevelBytes``."""
        return self._file.info(name).shape

    def raw(self, name: str, rows: Rows = None) -> U8:
        """As ``LevelBytes``."""
        return self._file.raw(name, rows)


class TunedWeights:
    """``LevelWeights`` of a level whose free numbers are other ones: what the file will decode to, float16 and all."""

    def __init__(self, level: LevelBytes, *, threads: int = 1) -> None:
        self.level, self._threads = level, threads
        self.numbers: dict[str, F32] = {}
        """By tensor: f32[rows, blocks, numbers] of a quantized one, its values of one of 32-bit floats."""

    def start(self, name: str) -> F32:
        """What the level holds: as ``numbers``, empty of a tensor that has none."""
        qtype = self.level.qtype(name)
        if qtype == "F32":
            return self.level.raw(name).view(np.float32).reshape(self.level.shape(name)).copy()
        return numbers_of(self.level.raw(name), qtype) if free_fields(qtype) else np.zeros(0, np.float32)

    def packed(self, name: str, rows: Rows = None) -> U8:
        """A tensor's bytes with its present numbers."""
        own = self.numbers.get(name)
        if own is None:
            return self.level.raw(name, rows)
        if self.level.qtype(name) == "F32":
            flat = np.ascontiguousarray(own.reshape(-1, own.shape[-1]), np.float32)
            return (flat if rows is None else np.ascontiguousarray(flat[rows])).view(np.uint8)
        return with_numbers(self.level.raw(name, rows), self.level.qtype(name), own if rows is None else own[rows])

    def __call__(self, name: str, rows: Rows = None) -> F32:
        """As ``LevelWeights``."""
        values = dequantize(self.packed(name, rows), self.level.qtype(name), threads=self._threads)
        return values if rows is not None else values.reshape(self.level.shape(name))

    def basis(self, name: str, rows: Rows = None) -> F32:
        """What each number is multiplied by: f32[numbers, rows, columns]."""
        return basis_of(self.level.raw(name, rows), self.level.qtype(name), threads=self._threads)

    def identity(self, name: str) -> object:
        """As ``LevelWeights``: never that of others."""
        return id(self), name

    def qtype(self, name: str) -> str:
        """As ``LevelWeights``."""
        return self.level.qtype(name)

    def forget(self, name: str) -> None:
        """As ``LevelWeights``: nothing is kept."""

    def layer(self, model: LayeredModel, layer: int) -> nn.Module:
        """As ``Tunable``."""
        return model.layer(layer, self)

    def asked(self, model: LayeredModel, layer: int, block: nn.Module, names: Collection[str]) -> list[str]:
        """As ``Tunable``."""
        return [
            parameter.path
            for parameter in model.kind(layer).parameters
            if any(layer_tensor(layer, role) in names for role in parameter.roles)
            and tensor_at(block, parameter.path).dtype.is_floating_point
        ]

    def slopes(
        self, model: LayeredModel, layer: int, block: nn.Module, names: Collection[str]
    ) -> Iterator[tuple[str, F32]]:
        """As ``Tunable``."""
        asked = set(self.asked(model, layer, block, names))
        for parameter in model.kind(layer).parameters:
            gradient = tensor_at(block, parameter.path).grad if parameter.path in asked else None
            if gradient is None:
                continue
            for name, own in _by_tensor(model, layer, parameter, gradient.cpu().numpy()):
                if name in names:
                    yield name, self._slope(name, own)

    def _slope(self, name: str, gradient: F32) -> F32:
        numbers = self.numbers[name]
        if self.level.qtype(name) == "F32":
            return gradient.reshape(numbers.shape).copy()
        return slopes(self.basis(name), gradient.reshape(-1, gradient.shape[-1]), numbers.shape[1])


def _by_tensor(model: LayeredModel, layer: int, parameter: Parameter, gradient: F32) -> Iterator[tuple[str, F32]]:
    """Of a parameter's gradient the share of each of the file's tensors, in the file's order."""
    roles, transform = parameter.roles, parameter.transform
    heads = model.model.dims.n_head if "q_proj" in parameter.path else model.model.dims.n_head_kv
    if transform == "stack":
        for role, part in zip(roles, np.split(gradient, len(roles), axis=-2), strict=True):
            yield layer_tensor(layer, role), part
        return
    for number, role in enumerate(roles):
        yield layer_tensor(layer, role), stored(transform, number, gradient, heads) - offset_of(transform)
