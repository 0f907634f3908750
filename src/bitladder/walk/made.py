"""What a calibrating walk makes of a layer, and where it goes: arrays of checkpoint levels, vectors of GGUF levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.errors import BadWeights
from bitladder.files.layer_store import LayerStore
from bitladder.formats.disk_names import LAYERS, disk_linears, disk_name, quantized_parameters
from bitladder.formats.families.family import Layers
from bitladder.formats.roles import Parameter, SharedInput
from bitladder.levels.checkpoints import Arrays as Encoded
from bitladder.levels.checkpoints import CheckpointFormat, FolderFormat, digest
from bitladder.levels.methods import Rounded
from bitladder.records.calibration import LinearLoss
from bitladder.walk.driver import Observer, Resumable, Seen
from bitladder.walk.importance import vectors_of
from bitladder.walk.inputs import InputStatistics, readable
from bitladder.walk.keep import Arrays
from bitladder.walk.layers import LayeredModel
from bitladder.walk.matrices import as_linears, in_runs

F32 = NDArray[np.float32]

SCALE_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}
"""Float types of a checkpoint, as kernels call them."""
FEW_TOKENS = 64
"""An expert that saw fewer tokens than this is rounded plainly: its statistics would fit those few tokens
only."""
_TOLD = 8
"""Losses that fit a line of progress; experts of a mixture do not, and are in the log."""


@dataclass
class LayerOutput:
    """One layer of one level: its quantized linears by disk name, each with its format, and its float parameters,
    f32."""

    linears: dict[str, tuple[CheckpointFormat, Encoded]] = field(default_factory=dict)
    floats: dict[str, F32] = field(default_factory=dict)
    losses: list[LinearLoss] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    """Hash of each linear layer's decoded weights, to compare with what is read back from the file."""
    vectors: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    """What is gathered for GGUF levels, by tensor and kind: ``blk.0.attn_q.weight.columns``."""

    def add(
        self, model: LayeredModel, form: CheckpointFormat, parameter: Parameter, expert: int | None, found: Rounded,
        *, tokens: int, note: str, damp: float = 0.0,
    ) -> None:  # fmt: skip
        """Take in a quantized parameter as the linear layers that it is on disk."""
        for linear in disk_linears(model.family, parameter.path, expert):
            rows = linear.rows(len(found.codes))
            self.linears[linear.name] = form, form.encode(found.codes[rows], found.parameters.rows(rows))
            self.digests[linear.name] = digest(found.decoded[rows])
            self.losses.append(LinearLoss(linear.name, found.loss, tokens, damp, note))

    def join(self, other: LayerOutput) -> None:
        """Take in what was made elsewhere of the same layer."""
        self.linears |= other.linears
        self.floats |= other.floats
        self.digests |= other.digests
        self.losses += other.losses

    def keep(self, model: LayeredModel, parameter: Parameter, expert: int | None, weights: F32) -> None:
        """Take in a parameter f32[rows, columns] that stays float among others that do not."""
        for linear in disk_linears(model.family, parameter.path, expert):
            self.floats[f"{linear.name}.weight"] = weights[linear.rows(len(weights))].copy()


class InStore(Resumable):
    """Of a level whose layers go to a store, in the float type of the checkpoint; the store says which are there."""

    def __init__(self, name: str, store: LayerStore, dtype: torch.dtype, layers: str = LAYERS) -> None:
        """``layers``: what names of decoder layers begin with."""
        self._name, self._store, self._dtype, self._layers = name, store, dtype, layers
        self._losses = ""

    @property
    def news(self) -> str:
        """The level's name and the losses of its last layer."""
        return self._name + self._losses

    def put(self, layer: int, output: LayerOutput, seconds: float) -> None:
        """Write a layer."""
        notes = _notes(f"{self._layers}{layer}.", output)
        self._store.put_layer(layer, self._tensors(layer, output), notes, seconds=seconds)
        self._losses = losses_in_words(output)

    def holds(self, layers: int) -> bool:
        """As ``Resumable``."""
        return len(self._store.finished()) >= layers

    def resume(self, layers: int, arrays: Arrays) -> None:  # noqa: ARG002
        """As ``Resumable``."""
        self._store.truncate(layers)

    def _tensors(self, layer: int, output: LayerOutput) -> dict[str, torch.Tensor]:
        prefix = f"{self._layers}{layer}."
        tensors = {f"{prefix}{name}": cast(value, self._dtype) for name, value in output.floats.items()}
        stacks: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for linear, (form, arrays) in output.linears.items():
            for suffix, array in arrays.items():
                own = stored_array(form, suffix, array, self._dtype)
                if (together := form.stacked(linear)) is not None:
                    name, place = together
                    stacks.setdefault(f"{prefix}{name}.{suffix}", []).append((place, own))
                else:
                    tensors[f"{prefix}{linear}.{suffix}"] = own
        for name, parts in stacks.items():
            tensors[name] = _together([part for _, part in sorted(parts, key=lambda one: one[0])])
        return tensors | {name: torch.from_numpy(vector.copy()) for name, vector in output.vectors.items()}


def stored_array(form: CheckpointFormat, suffix: str, array: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """An array of a quantized layer as it is stored; ``dtype``: the float type of the model."""
    value = readable(np.ascontiguousarray(array))
    if suffix in form.byte_types:
        return value.view(getattr(torch, form.byte_types[suffix]))
    return value.to(dtype) if suffix in form.model_dtype else value


def _together(parts: list[torch.Tensor]) -> torch.Tensor:
    """One above the other in a new first dimension; torch knows few operations on unsigned integers."""
    if parts[0].dtype != torch.uint32:
        return torch.stack(parts)
    return torch.stack([part.view(torch.int32) for part in parts]).view(torch.uint32)


class Made(InStore, Observer, ABC):
    """A level that is made of the reference's activations, layer by layer."""

    def __init__(self, model: LayeredModel, name: str, store: LayerStore, dtype: torch.dtype) -> None:
        super().__init__(name, store, dtype, model.family.disk.layers)
        self.model = model

    def reads(self, shared: SharedInput) -> bool:
        """Inputs of what is quantized: all but routers."""
        return bool(quantized_parameters(self.model.family, shared))

    @abstractmethod
    def make(self, layer: int, block: nn.Module, seen: Seen) -> LayerOutput:
        """Its version of a layer. ``block`` is left as it is found."""

    def take(self, layer: int, block: nn.Module, seen: Seen) -> None:
        """As ``Observer``."""
        started = monotonic()
        output = self.make(layer, block, seen)
        self.put(layer, output, monotonic() - started)


class MadeImportance(Made):
    """An importance matrix beside other levels."""

    reads_weights = False

    def reads(self, shared: SharedInput) -> bool:  # noqa: ARG002
        """Routers are quantized in GGUF levels."""
        return True

    def make(self, layer: int, block: nn.Module, seen: Seen) -> LayerOutput:  # noqa: ARG002
        """As ``Made``."""
        return LayerOutput(vectors=vectors_of(self.model, layer, seen))


def floats_of(model: LayeredModel, block: nn.Module) -> dict[str, F32]:
    """Every parameter and stored buffer of a layer that is not quantized, f32, by disk name."""
    family = model.family
    quantized = {p.path for shared in family.inputs for p in quantized_parameters(family, shared)}
    rows = {parameter.path: parameter for parameter in family.parameters}
    found: dict[str, F32] = {}
    for path, value in block.state_dict().items():
        if path not in quantized and path in family.experts:
            found |= _one_by_one(family, rows.get(path, Parameter(path, ())), value.detach().cpu().numpy())
        elif path not in quantized:
            found[disk_name(family, path)] = value.detach().cpu().numpy().copy()
    return found


def _one_by_one(family: Layers, parameter: Parameter, stack: F32) -> dict[str, F32]:
    """A stack of matrices or of biases as the experts' own, by disk name."""
    found = {}
    for expert, own in enumerate(stack):
        lines = as_linears(family, parameter, own) if own.ndim > 1 else in_runs(family, parameter.path, own[:, None])
        for linear in disk_linears(family, parameter.path, expert):
            share = lines[linear.rows(len(lines))]
            found[linear.tensor] = (share if own.ndim > 1 else share[:, 0]).copy()
    return found


def format_of(model: LayeredModel, form: FolderFormat, layer: int, path: str) -> CheckpointFormat | None:
    """The format of a parameter's matrices, by what the first of them is called on disk; None: they stay float."""
    first = disk_linears(model.family, path, 0 if path in model.family.experts else None)[0]
    return form.of(f"{model.family.disk.layers}{layer}.{first.name}")


@contextmanager
def naming(layer: int | None, place: str) -> Iterator[None]:
    """What a kernel cannot take, in the user's terms; ``layer`` is None outside the layers."""
    try:
        yield
    except ValueError as error:
        raise BadWeights(
            f"{place if layer is None else f'layer {layer}, {place}'}: {error}.",
            means="The weights or the activations of this layer overflow; the model is damaged or was scaled oddly.",
            do="Check the source's own answers first; GGUF levels may still work.",
        ) from error


@contextmanager
def unchanged(block: nn.Module) -> Iterator[None]:
    """Afterwards the parameters are what they were."""
    original = {name: value.detach().clone() for name, value in block.named_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in original.items():
                block.get_parameter(name).copy_(value)


def too_few(expert: int | None, statistics: InputStatistics) -> str:
    """A note where an expert was reached by too few tokens for its statistics to mean anything."""
    if expert is None or statistics.tokens >= FEW_TOKENS:
        return ""
    return f"only {statistics.tokens} calibration tokens reached this expert: rounded plainly"


def cast(value: F32, dtype: torch.dtype) -> torch.Tensor:
    """f32 weights in a checkpoint's float type."""
    return torch.from_numpy(np.ascontiguousarray(value)).to(dtype)


def _notes(prefix: str, output: LayerOutput) -> list[dict[str, Any]]:
    """The log's lines of a layer's tensors."""
    return [
        {
            "tensor": loss.name if loss.name.startswith("blk.") else f"{prefix}{loss.name}",
            "loss": None if loss.loss != loss.loss else loss.loss,  # JSON has no NaN
            "tokens": loss.tokens,
            "damp": loss.damp,
            "note": loss.note,
            "digest": output.digests.get(loss.name, ""),
        }
        for loss in output.losses
    ]


def losses_in_words(output: LayerOutput) -> str:
    """The losses of a layer's tensors in a few words: each where there are few, else the largest."""
    known = [(loss.loss, _short(loss.name)) for loss in output.losses if loss.loss == loss.loss]
    if not known:
        return ""
    if len(output.losses) > _TOLD:
        worst, name = max(known)
        return f" (error up to {worst:.2%}, {name})"
    each = ", ".join(f"{name} {loss:.2%}" for loss, name in known)
    return f" (error: {each})"


def _short(name: str) -> str:
    """``self_attn.q_proj`` as ``q``, ``blk.0.attn_q.weight`` as ``attn_q``."""
    return name.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj")
