"""A checkpoint level in the making whose scales can be moved: its layers lie in a store, and what moves lies beside
them until it is written.

Scales (MLX: biases, too) are the arrays that a format calls ``tunable``: with codes and zero points fixed, weights are
linear in them. What a scale is multiplied by is therefore what the arrays decode to with ones in its place, and no
format is unpacked here.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.files.layer_store import LayerStore
from bitladder.formats.disk_names import DiskLinear, disk_linears, disk_name, quantized_parameters
from bitladder.formats.roles import Parameter
from bitladder.kernels.free_numbers import slopes
from bitladder.levels.checkpoints import CheckpointFormat, FolderFormat, digest
from bitladder.walk.ends import ends_of
from bitladder.walk.layers import LayeredModel, tensor_at
from bitladder.walk.made import format_of
from bitladder.walk.matrices import as_linears, set_matrix
from bitladder.walk.weights import LevelWeights, Rows

F32 = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Linear:
    """A linear layer, and where it is: in a parameter, and in the store's file of its layer."""

    name: str
    form: CheckpointFormat
    parameter: Parameter
    expert: int | None
    on_disk: DiskLinear

    @property
    def place(self) -> tuple[str, int | None]:
        """What its arrays are called, and which of a stack they are."""
        return self.form.stacked(self.name) or (self.name, None)

    def key(self, suffix: str) -> str:
        """The name of one of its arrays in the file."""
        return f"{self.place[0]}.{suffix}"


@dataclass
class _Layer:
    """A layer as it lies in the store."""

    tensors: dict[str, torch.Tensor]
    linears: list[_Linear] = field(default_factory=list)

    def arrays(self, linear: _Linear) -> Arrays:
        """Of a linear layer, by suffix."""
        at = linear.place[1]
        found = {suffix: self.tensors.get(linear.key(suffix)) for suffix in linear.form.suffixes}
        return {suffix: _numpy(own, at) for suffix, own in found.items() if own is not None}


class StoredLevel:
    """``walk.tuned.Tunable`` of a level that a store holds all layers of; numbers go by the names of linear layers."""

    def __init__(self, model: LayeredModel, source: LevelWeights, form: FolderFormat, store: LayerStore) -> None:
        """``source``: what the level does not hold differently, embedding and head of most formats."""
        self.model, self._source, self._form, self._store = model, source, form, store
        self.numbers: dict[str, F32] = {}
        self._ends = ends_of(model) if form.everywhere else {}
        self._read = lru_cache(maxsize=2)(self._layer)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all numbers that can move: rows, groups, numbers of each."""
        return {
            linear.name: numbers_of(linear.form, layer.arrays(linear)).shape
            for layer in map(self._read, range(self.model.n_layer))
            for linear in layer.linears
            if linear.form.tunable
        }

    def start(self, name: str) -> F32:
        """As ``Tunable``."""
        layer, linear = self._found(name)
        return numbers_of(linear.form, layer.arrays(linear))

    def layer(self, model: LayeredModel, layer: int) -> nn.Module:
        """As ``Tunable``."""
        block, own = model.layer(layer, self._source), self._read(layer)
        prefix = f"{model.family.disk.layers}{layer}."
        floats = dict(block.named_parameters())
        matrices: dict[tuple[str, int | None], list[tuple[_Linear, F32]]] = {}
        for linear in own.linears:
            decoded = linear.form.decode(self._present(own, linear))
            matrices.setdefault((linear.parameter.path, linear.expert), []).append((linear, decoded))
        for (path, expert), parts in matrices.items():
            parts.sort(key=lambda part: part[0].on_disk.part)
            set_matrix(model.family, block, parts[0][0].parameter, expert, np.concatenate([one for _, one in parts]))
            floats.pop(path, None)
        with torch.no_grad():
            for path, value in floats.items():  # norms that took up AWQ's scales, say
                if (held := own.tensors.get(prefix + disk_name(model.family, path))) is not None:
                    value.copy_(held)
        return block

    def asked(self, model: LayeredModel, layer: int, block: nn.Module, names: Collection[str]) -> list[str]:  # noqa: ARG002
        """As ``Tunable``."""
        return list(dict.fromkeys(one.parameter.path for one in self._read(layer).linears if one.name in names))

    def slopes(
        self, model: LayeredModel, layer: int, block: nn.Module, names: Collection[str]
    ) -> Iterator[tuple[str, F32]]:
        """As ``Tunable``."""
        own = self._read(layer)
        for linear in own.linears:
            gradient = tensor_at(block, linear.parameter.path).grad if linear.name in names else None
            if gradient is None:
                continue
            whole = (gradient if linear.expert is None else gradient[linear.expert]).cpu().numpy()
            rows = as_linears(model.family, linear.parameter, whole)
            share = np.ascontiguousarray(rows[linear.on_disk.rows(len(rows))])
            basis, groups = basis_of(linear.form, own.arrays(linear)), self.numbers[linear.name].shape[1]
            yield linear.name, slopes(basis, share, groups)

    def write(self) -> None:
        """Put the present numbers into the store.

        Raises:
            OutputError: no room.
        """
        digests: dict[str, str] = {}

        def layers() -> Iterator[tuple[int, Mapping[str, torch.Tensor]]]:
            for number in range(self.model.n_layer):
                own = self._layer(number)
                for linear in own.linears:
                    if linear.name not in self.numbers:
                        continue
                    for suffix, held in self._stored(own, linear).items():
                        stack, at = own.tensors[linear.key(suffix)], linear.place[1]
                        if at is None:
                            own.tensors[linear.key(suffix)] = held
                        else:
                            stack[at] = held
                    digests[linear.name] = digest(linear.form.decode(own.arrays(linear)))
                yield number, own.tensors

        self._store.replace_layers(layers(), digests)
        self._read.cache_clear()

    def __call__(self, name: str, rows: Rows = None) -> F32:
        """As ``LevelWeights``: embedding, head and what else lies outside the layers."""
        if name not in self._ends:
            return self._source(name, rows)
        linear = self._ends[name].removesuffix(".weight")
        form = self._form.of(linear)
        assert form is not None
        held = self._read(self.model.n_layer).tensors
        arrays = {suffix: held[f"{linear}.{suffix}"] for suffix in form.suffixes if f"{linear}.{suffix}" in held}
        some = slice(None) if rows is None else rows
        return form.decode({suffix: _numpy(own, None)[some] for suffix, own in arrays.items()})

    def qtype(self, name: str) -> str:  # noqa: ARG002
        """As ``LevelWeights``: inputs are not rounded."""
        return "F32"

    def identity(self, name: str) -> Hashable:
        """As ``LevelWeights``: never that of others."""
        return id(self), name

    def forget(self, name: str) -> None:
        """As ``LevelWeights``."""
        self._source.forget(name)

    def _layer(self, layer: int) -> _Layer:
        from safetensors.torch import load_file

        found = _Layer(load_file(self._store.layer_file(layer)))
        if layer < self.model.n_layer:
            found.linears = [one for one in self._linears(layer) if one.key(one.form.suffixes[0]) in found.tensors]
        return found

    def _linears(self, layer: int) -> Iterator[_Linear]:
        family, prefix = self.model.family, f"{self.model.family.disk.layers}{layer}."
        for shared in self.model.inputs(layer, self.model.outline(layer)):
            for parameter in quantized_parameters(family, shared):
                form = format_of(self.model, self._form, layer, parameter.path)
                if form is None:
                    continue
                stacked = parameter.path in family.experts
                for expert in range(self.model.model.dims.n_expert) if stacked else [None]:
                    for linear in disk_linears(family, parameter.path, expert):
                        yield _Linear(prefix + linear.name, form, parameter, expert, linear)

    def _found(self, name: str) -> tuple[_Layer, _Linear]:
        number = int(name.removeprefix(self.model.family.disk.layers).split(".", 1)[0])
        layer = self._read(number)
        return layer, next(one for one in layer.linears if one.name == name)

    def _present(self, layer: _Layer, linear: _Linear) -> Arrays:
        """A linear layer's arrays with its present numbers, as they will be stored."""
        arrays = layer.arrays(linear)
        return arrays | {suffix: _numpy(own, None) for suffix, own in self._stored(layer, linear).items()}

    def _stored(self, layer: _Layer, linear: _Linear) -> dict[str, torch.Tensor]:
        """The present numbers of a linear layer as arrays of their types; none where it has its own."""
        numbers = self.numbers.get(linear.name)
        if numbers is None:
            return {}
        found = {}
        for at, suffix in enumerate(linear.form.tunable):
            kind = layer.tensors[linear.key(suffix)].dtype
            own = numbers[:, :, at].T if linear.form.groups_first else numbers[:, :, at]
            largest = torch.finfo(kind).max
            found[suffix] = torch.from_numpy(np.ascontiguousarray(own)).clamp(-largest, largest).to(kind)
        return found


def numbers_of(form: CheckpointFormat, arrays: Mapping[str, NDArray[Any]]) -> F32:
    """What can be tuned of a linear layer: f32[outputs, groups, numbers], in the order of ``form.tunable``."""
    found = [np.asarray(arrays[suffix], np.float32) for suffix in form.tunable]
    return np.ascontiguousarray(np.stack([own.T if form.groups_first else own for own in found], axis=-1))


def basis_of(form: CheckpointFormat, arrays: Mapping[str, NDArray[Any]]) -> F32:
    """What each of these numbers is multiplied by in each weight: f32[numbers, outputs, inputs]."""
    each = []
    for own in form.tunable:
        ones = {suffix: np.full_like(arrays[suffix], float(suffix == own)) for suffix in form.tunable}
        each.append(form.decode({**arrays, **ones}))
    return np.stack(each)


def _numpy(tensor: torch.Tensor, at: int | None) -> NDArray[Any]:
    """An array, or one of a stack; bfloat16, which numpy has not, as f32."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    whole: NDArray[Any] = tensor.numpy()
    return whole if at is None else whole[at]
