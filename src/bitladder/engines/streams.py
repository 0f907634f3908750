"""Checkpoint levels made layer by layer: one stream of hidden states for each way errors travel.

A ``SequentialStream`` builds one GPTQ level; its states pass through the layers as quantized so far, so each
layer sees, and corrects for, what happened before it. A ``ReferenceStream`` builds any number of AWQ and INT8
levels from the source's own activations, gathered once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.engines.calibration import InputStatistics, LayerPass
from bitladder.engines.layers import LayeredModel
from bitladder.engines.states import Batch, States
from bitladder.engines.weights import LevelWeights
from bitladder.errors import BadWeights
from bitladder.formats.checkpoint import CheckpointLevel
from bitladder.formats.disk_names import absorbing_parameters, disk_linears, disk_name, quantized_parameters
from bitladder.formats.roles import Parameter, SharedInput
from bitladder.kernels import awq, gptq
from bitladder.kernels.encode import Arrays, digest, encode
from bitladder.kernels.methods import Quantized, awq_scales, feedback, rounded
from bitladder.records.calibration import LinearLoss

F32 = NDArray[np.float32]
_T = TypeVar("_T")

FEW_TOKENS = 64
"""An expert that saw fewer tokens than this is rounded plainly: its statistics would fit those few tokens
only."""


@dataclass
class LayerOutput:
    """One layer of one level: arrays of its quantized linears by disk name, and its float parameters, f32."""

    linears: dict[str, Arrays] = field(default_factory=dict)
    floats: dict[str, F32] = field(default_factory=dict)
    losses: list[LinearLoss] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    """Hash of each linear layer's decoded weights, to compare with what is read back from the file."""


class SequentialStream:
    """One GPTQ level with its own propagated error."""

    def __init__(
        self,
        model: LayeredModel,
        weights: LevelWeights,
        level: CheckpointLevel,
        states: States,
        batches: Sequence[Batch],
        *,
        damp: float = 0.05,
        act_order: bool = True,
        scale_dtype: str = "float16",
        spill: Path | None = None,
    ) -> None:
        """``states`` hold the embeddings. ``spill``: a folder for what a layer keeps meanwhile; None:
        memory."""
        self.model, self.levels, self.states = model, (level,), states
        self._weights, self._batches = weights, batches
        self._damp, self._act_order, self._scale_dtype, self._spill = damp, act_order, scale_dtype, spill

    def layer(self, layer: int) -> dict[str, LayerOutput]:
        """Quantize a layer, input by input in the order they are computed, and push the states through the
        result.

        Raises:
            BadWeights: activations are not finite.
        """
        block = self.model.layer(layer, self._weights)
        through = LayerPass(self.model, layer, block, self.states, self._batches, spill=self._spill)
        output = LayerOutput()
        for shared in self.model.family.inputs:
            parameters = quantized_parameters(self.model.family, shared)
            if not parameters:
                continue
            for expert, statistics in _experts(through.gather(shared)):
                self._quantize(layer, block, parameters, expert, statistics, output)
        through.finish()
        output.floats = _floats(self.model, block)
        return {self.levels[0].name: output}

    def _quantize(
        self,
        layer: int,
        block: nn.Module,
        parameters: Sequence[Parameter],
        expert: int | None,
        statistics: InputStatistics,
        output: LayerOutput,
    ) -> None:
        level = self.levels[0]
        with _naming(layer, parameters[0]):
            factor = gptq.prepare(statistics.gram, damp=self._damp, act_order=self._act_order)
        for parameter in parameters:
            weights = _matrix(block, parameter, expert)
            if note := _too_few(expert, statistics):
                found = rounded(level, None, weights, scale_dtype=self._scale_dtype)
            else:
                with _naming(layer, parameter):
                    found = feedback(level, factor, statistics.gram, weights, scale_dtype=self._scale_dtype)
                note = f"Hessian not positive definite: damping raised to {factor.damp:g}" if factor.rescued else ""
            _set_matrix(block, parameter, expert, found.decoded)
            _emit(self.model, output, level, parameter, expert, found, statistics.tokens, note, factor.damp)


@contextmanager
def _naming(layer: int, parameter: Parameter) -> Iterator[None]:
    """What a kernel cannot take, in the user's terms."""
    try:
        yield
    except ValueError as error:
        raise BadWeights(
            f"layer {layer}, {parameter.path}: {error}.",
            means="The weights or the activations of this layer overflow; the model is damaged or was scaled oddly.",
            do="Check the source's own answers first; GGUF levels may still work.",
        ) from error


class ReferenceStream:
    """AWQ and INT8 levels, all from one pass of the source's own states."""

    def __init__(
        self,
        model: LayeredModel,
        weights: LevelWeights,
        levels: Sequence[CheckpointLevel],
        states: States | None,
        batches: Sequence[Batch],
        *,
        scale_dtype: str = "float16",
    ) -> None:
        """``states`` hold the embeddings, or are None where no level needs activations."""
        self.model, self.levels, self.states = model, tuple(levels), states
        self._weights, self._batches, self._scale_dtype = weights, batches, scale_dtype

    def layer(self, layer: int) -> dict[str, LayerOutput]:
        """Gather a layer's statistics once and build every level's version of it.

        Raises:
            BadWeights: activations are not finite.
        """
        block = self.model.layer(layer, self._weights)
        inputs = [s for s in self.model.family.inputs if quantized_parameters(self.model.family, s)]
        gathered: list[list[InputStatistics] | None] = [None] * len(inputs)
        if self.states is not None:
            through = LayerPass(self.model, layer, block, self.states, self._batches)
            gathered = [*through.gather_all(inputs)]
        original = {name: value.detach().clone() for name, value in block.named_parameters()}
        outputs = {}
        for level in self.levels:
            _restore(block, original)
            outputs[level.name] = self._build(layer, level, block, inputs, gathered)
        return outputs

    def _build(
        self,
        layer: int,
        level: CheckpointLevel,
        block: nn.Module,
        inputs: Sequence[SharedInput],
        gathered: Sequence[list[InputStatistics] | None],
    ) -> LayerOutput:
        output = LayerOutput()
        factors = [
            self._fold(level, block, shared, statistics[0]) if statistics else None
            for shared, statistics in zip(inputs, gathered, strict=True)
        ]
        for shared, statistics, scale in zip(inputs, gathered, factors, strict=True):
            parameters = quantized_parameters(self.model.family, shared)
            for expert, own in _experts(statistics or [None] * self._matrices(shared)):
                note = _too_few(expert, own) if own is not None else ""
                gram = None if own is None or note else own.gram
                if gram is not None and scale is not None:
                    gram = gram / np.outer(scale, scale)
                for parameter in parameters:
                    weights = _matrix(block, parameter, expert)
                    with _naming(layer, parameter):
                        found = rounded(level, gram, weights, scale_dtype=self._scale_dtype)
                    tokens = own.tokens if own is not None else 0
                    _emit(self.model, output, level, parameter, expert, found, tokens, note, 0.0)
        output.floats = _floats(self.model, block)
        return output

    def _matrices(self, shared: SharedInput) -> int:
        return 1 if shared.kind == "linear" else self.model.model.dims.n_expert

    def _fold(
        self, level: CheckpointLevel, block: nn.Module, shared: SharedInput, statistics: InputStatistics
    ) -> F32 | None:
        """Find this input's scales, multiply them into its columns and divide them out of what comes
        before."""
        present = {name for name, _ in block.named_parameters()}
        absorbers = [p for p in absorbing_parameters(self.model.family, shared) if p.path in present]
        if not absorbers or not (level.method == "AWQ" or (level.smooth and "norm" in absorbers[0].path)):
            return None
        if getattr(self.model.config, "clip_qkv", None) and "v_proj" in absorbers[0].path:
            return None  # a clamp between the two would act on other values
        parameters = quantized_parameters(self.model.family, shared)
        weights = [_matrix(block, parameter, None) for parameter in parameters]
        tied = _value_channels(self.model) if "v_proj" in absorbers[0].path else None
        if level.method == "AWQ":
            factors = awq_scales(level, statistics.gram, weights, tied=tied).factors
        else:
            factors = awq.smooth_factors(statistics.largest, weights, tied=tied)
        for parameter, weight in zip(parameters, weights, strict=True):
            _set_matrix(block, parameter, None, weight * factors)
        own = factors
        if tied is not None:
            own = np.empty(int(tied.max()) + 1, np.float32)
            own[tied] = factors
        for parameter in absorbers:
            value = block.get_parameter(parameter.path).detach().cpu().numpy()
            one = np.float32(1 if parameter.transform == "minus_one" else 0)
            _set_matrix(block, parameter, None, awq.absorb(own, value + one) - one)
        return factors


def _experts(items: Sequence[_T]) -> Iterator[tuple[int | None, _T]]:
    """``(None, item)`` for a plain linear, ``(expert, item)`` for each of several."""
    if len(items) == 1:
        yield None, items[0]
    else:
        yield from enumerate(items)


def _too_few(expert: int | None, statistics: InputStatistics) -> str:
    if expert is None or statistics.tokens >= FEW_TOKENS:
        return ""
    return f"only {statistics.tokens} calibration tokens reached this expert: rounded plainly"


def _value_channels(model: LayeredModel) -> NDArray[np.intp]:
    """Which value row each input channel of the output projection comes from: query heads share value
    heads."""
    dims = model.model.dims
    channel = np.arange(dims.n_head * dims.head_dim_v)
    head, within = np.divmod(channel, dims.head_dim_v)
    return np.asarray(head // dims.n_gqa * dims.head_dim_v + within, np.intp)


def _matrix(block: nn.Module, parameter: Parameter, expert: int | None) -> F32:
    value = block.get_parameter(parameter.path).detach()
    return np.asarray((value if expert is None else value[expert]).cpu().numpy(), np.float32)


def _set_matrix(block: nn.Module, parameter: Parameter, expert: int | None, value: F32) -> None:
    target = block.get_parameter(parameter.path)
    with torch.no_grad():
        (target if expert is None else target[expert]).copy_(torch.from_numpy(np.ascontiguousarray(value)))


def _restore(block: nn.Module, original: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in original.items():
            block.get_parameter(name).copy_(value)


def _emit(
    model: LayeredModel,
    output: LayerOutput,
    level: CheckpointLevel,
    parameter: Parameter,
    expert: int | None,
    found: Quantized,
    tokens: int,
    note: str,
    damp: float,
) -> None:
    """Put a quantized parameter into the output as the linear layers that it is on disk."""
    linears = disk_linears(model.family, parameter.path, expert)
    decoded = found.decoded
    for linear in linears:
        count = len(found.codes) // linear.parts
        rows = slice(linear.part * count, (linear.part + 1) * count)
        own = found.parameters.rows(rows)
        output.linears[linear.name] = encode(level, found.codes[rows], own)
        output.digests[linear.name] = digest(decoded[rows])
        output.losses.append(LinearLoss(linear.name, found.loss, tokens, damp, note))


def _floats(model: LayeredModel, block: nn.Module) -> dict[str, F32]:
    """Every parameter of the layer that is not quantized, f32, by disk name."""
    quantized = {p.path for shared in model.family.inputs for p in quantized_parameters(model.family, shared)}
    return {
        disk_name(model.family, path): value.detach().cpu().numpy().copy()
        for path, value in block.named_parameters()
        if path not in quantized
    }
