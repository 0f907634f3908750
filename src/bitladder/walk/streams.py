"""Checkpoint levels made layer by layer: one stream of hidden states for each way errors travel.

A ``SequentialStream`` builds one GPTQ level; its states pass through the layers as quantized so far, so each
layer sees, and corrects for, what happened before it. A ``ReferenceStream`` builds any number of AWQ and INT8
levels, and gathers the vectors that GGUF levels are made with, from the source's own activations.
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

from bitladder.errors import BadWeights
from bitladder.formats.disk_names import disk_linears, disk_name, quantized_parameters
from bitladder.formats.roles import Parameter, SharedInput, layer_tensor
from bitladder.levels import CheckpointLevel, FoldedLevel
from bitladder.levels.checkpoints import Arrays, digest
from bitladder.levels.methods import Prepared, Quantized, Statistics
from bitladder.levels.products import COUNT, SQUARES, ImportanceVectors, Product, statistics_of
from bitladder.records.calibration import LinearLoss
from bitladder.walk import folding
from bitladder.walk.calibration import InputStatistics, LayerPass
from bitladder.walk.folding import matrix, set_matrix
from bitladder.walk.layers import LayeredModel
from bitladder.walk.states import Batch, States
from bitladder.walk.weights import LevelWeights

F32 = NDArray[np.float32]
_T = TypeVar("_T")

FEW_TOKENS = 64
"""An expert that saw fewer tokens than this is rounded plainly: its statistics would fit those few tokens
only."""


@dataclass
class LayerOutput:
    """One layer of one level: arrays of its quantized linears by disk name, and its float parameters, f32."""

    linears: dict[str, Arrays] = field(default_factory=dict)
    model_dtype: frozenset[str] = frozenset()
    """Suffixes of arrays of ``linears`` that are stored in the float type of the model."""
    floats: dict[str, F32] = field(default_factory=dict)
    losses: list[LinearLoss] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    """Hash of each linear layer's decoded weights, to compare with what is read back from the file."""
    vectors: dict[str, NDArray[np.floating]] = field(default_factory=dict)
    """What is gathered for GGUF levels, by tensor and kind: ``blk.0.attn_q.weight.columns``."""


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
        half: bool = False,
    ) -> None:
        """``states`` hold the embeddings. ``spill``: a folder for what a layer keeps meanwhile; None:
        memory. ``half``: as ``LayerPass``."""
        self.model, self.levels, self.states = model, (level,), states
        self._weights, self._batches = weights, batches
        self._damp, self._act_order, self._scale_dtype, self._spill = damp, act_order, scale_dtype, spill
        self._half = half

    def layer(self, layer: int) -> dict[str, LayerOutput]:
        """Quantize a layer, input by input in the order they are computed, and push the states through the
        result.

        Raises:
            BadWeights: activations are not finite.
        """
        block = self.model.layer(layer, self._weights)
        for tensor in self.model.layer_names(layer):  # the file's own pages need not stay beside the weights
            self._weights.forget(tensor)
        through = LayerPass(self.model, layer, block, self.states, self._batches, spill=self._spill, half=self._half)
        output = LayerOutput()
        for shared in self.model.family.inputs:
            parameters = quantized_parameters(self.model.family, shared)
            if not parameters:
                continue
            gathered = through.gather(shared)
            alone = len(gathered) == 1
            for expert in range(len(gathered)):
                self._quantize(layer, block, parameters, None if alone else expert, gathered, output)
        through.finish()
        output.floats = _floats(self.model, block)
        return {self.levels[0].name: output}

    def _quantize(
        self,
        layer: int,
        block: nn.Module,
        parameters: Sequence[Parameter],
        expert: int | None,
        gathered: list[InputStatistics],
        output: LayerOutput,
    ) -> None:
        """Quantize what reads the first of ``gathered``, which is taken out: its Gram matrix may be as large as the
        layer, and its factor takes its place."""
        level, statistics = self.levels[0], gathered.pop(0)
        tokens, too_few = statistics.tokens, _too_few(expert, statistics)
        with _naming(layer, parameters[0].path):
            seen = level.method.prepare(statistics.gram, damp=self._damp, act_order=self._act_order, overwrite=True)
        del statistics
        for parameter in parameters:
            weights = matrix(block, parameter, expert)
            with _naming(layer, parameter.path):
                own = Prepared() if too_few else seen
                found = level.method.apply(level.format, own, weights, scale_dtype=self._scale_dtype)
            set_matrix(block, parameter, expert, found.decoded)
            _emit(self.model, output, level, parameter, expert, found, tokens, too_few or seen.note, seen.damp)


@contextmanager
def _naming(layer: int, place: str) -> Iterator[None]:
    """What a kernel cannot take, in the user's terms."""
    try:
        yield
    except ValueError as error:
        raise BadWeights(
            f"layer {layer}, {place}: {error}.",
            means="The weights or the activations of this layer overflow; the model is damaged or was scaled oddly.",
            do="Check the source's own answers first; GGUF levels may still work.",
        ) from error


class ReferenceStream:
    """AWQ and INT8 levels, folds and importance vectors, all from one pass of the source's own states."""

    def __init__(
        self,
        model: LayeredModel,
        weights: LevelWeights,
        levels: Sequence[Product],
        states: States | None,
        batches: Sequence[Batch],
        *,
        scale_dtype: str = "float16",
        threads: int = 1,
        held_out: frozenset[int] = frozenset(),
        half: bool = False,
    ) -> None:
        """``states`` hold the embeddings, or are None where no level needs activations. ``threads``: for
        packing K-quants. ``held_out``: windows that folds are judged on, not searched; without any none is made.
        ``half``: as ``LayerPass``."""
        self.model, self.levels, self.states = model, tuple(levels), states
        self._weights, self._batches, self._scale_dtype = weights, batches, scale_dtype
        self._gram = any(statistics_of(level) is Statistics.GRAM for level in levels)
        self._threads, self._held_out, self._half = threads, held_out, half
        self._qtypes = {
            level: folding.recipe_types(level, model.model) for level in levels if isinstance(level, FoldedLevel)
        }

    def layer(self, layer: int) -> dict[str, LayerOutput]:
        """Gather a layer's statistics once and build every level's version of it.

        Raises:
            BadWeights: activations are not finite.
        """
        block = self.model.layer(layer, self._weights)
        modules = {name for name, _ in block.named_modules()}
        inputs = [shared for shared in self.model.family.inputs if shared.module in modules]
        if not any(isinstance(level, ImportanceVectors) for level in self.levels):  # which routers have, too
            inputs = [shared for shared in inputs if quantized_parameters(self.model.family, shared)]
        gathered: list[list[InputStatistics] | None] = [None] * len(inputs)
        if self.states is not None:
            through = LayerPass(self.model, layer, block, self.states, self._batches, half=self._half)
            gathered = [*through.gather_all(inputs, gram=self._gram, held_out=self._held_out)]
        original = {name: value.detach().clone() for name, value in block.named_parameters()}
        outputs = {}
        for level in self.levels:
            _restore(block, original)
            if isinstance(level, ImportanceVectors):
                outputs[level.name] = self._importance(layer, inputs, gathered)
            elif isinstance(level, FoldedLevel):
                outputs[level.name] = self._folds(layer, level, block, inputs, gathered)
            else:
                outputs[level.name] = self._build(layer, level, block, inputs, gathered)
        return outputs

    def _importance(
        self, layer: int, inputs: Sequence[SharedInput], gathered: Sequence[list[InputStatistics] | None]
    ) -> LayerOutput:
        """Sums of squares and counts, under the names of the tensors that read each input."""
        output = LayerOutput()
        held = set(self.model.layer_names(layer))
        for shared, statistics in zip(inputs, gathered, strict=True):
            for name in (layer_tensor(layer, role) for role in shared.roles):
                if name in held and statistics:
                    output.vectors[f"{name}.{SQUARES}"] = np.stack([one.squares for one in statistics])
                    output.vectors[f"{name}.{COUNT}"] = np.array([one.tokens for one in statistics], np.float64)
        return output

    def _folds(
        self,
        layer: int,
        level: FoldedLevel,
        block: nn.Module,
        inputs: Sequence[SharedInput],
        gathered: Sequence[list[InputStatistics] | None],
    ) -> LayerOutput:
        output = LayerOutput()
        pairs = zip(inputs, gathered, strict=True)
        seen = [(shared, found[0]) for shared, found in pairs if found and len(found[0].held_out)]
        folder = folding.KQuantFolder(self.model, layer, block, self._qtypes[level], self._threads)
        for shared, statistics in reversed(seen):  # what is folded into a matrix's rows comes before its columns
            with _naming(layer, shared.module):
                losses = folder.fold(shared, statistics.gram - statistics.held_out, statistics.held_out)
            output.losses[:0] = [LinearLoss(name, loss, statistics.tokens) for name, loss in losses.items()]
        output.vectors = {
            f"{name}.{kind}": vector for name, fold in folder.folds.items() for kind, vector in fold.vectors().items()
        }
        return output

    def _build(
        self,
        layer: int,
        level: CheckpointLevel,
        block: nn.Module,
        inputs: Sequence[SharedInput],
        gathered: Sequence[list[InputStatistics] | None],
    ) -> LayerOutput:
        output = LayerOutput()
        weighed = level.method.statistics.needs_text  # else made without text, whatever is made beside it
        factors = [
            self._fold(level, block, shared, statistics[0]) if statistics and weighed else None
            for shared, statistics in zip(inputs, gathered, strict=True)
        ]
        for shared, statistics, scale in zip(inputs, gathered, factors, strict=True):
            parameters = quantized_parameters(self.model.family, shared)
            for expert, own in _experts(statistics or [None] * self._matrices(shared)):
                note = _too_few(expert, own) if own is not None and weighed else ""
                gram = own.gram if own is not None and self._gram and not note else None
                if gram is not None and scale is not None:
                    gram = gram / np.outer(scale, scale)
                seen = level.method.prepare(gram)
                for parameter in parameters:
                    weights = matrix(block, parameter, expert)
                    with _naming(layer, parameter.path):
                        found = level.method.apply(level.format, seen, weights, scale_dtype=self._scale_dtype)
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
        place = folding.place_of(self.model, block, shared)
        if place is None or not level.method.scales(into_norm=place.is_norm):
            return None
        weights = [matrix(block, parameter) for parameter in place.parameters]
        factors = level.method.factors(level.format, statistics.gram, statistics.largest, weights, tied=place.tied)
        folding.fold(block, place, factors)
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
    for linear in linears:
        count = len(found.codes) // linear.parts
        rows = slice(linear.part * count, (linear.part + 1) * count)
        own = found.parameters.rows(rows)
        output.linears[linear.name] = level.format.encode(found.codes[rows], own)
        output.model_dtype = level.format.model_dtype
        output.digests[linear.name] = digest(found.decoded[rows])
        output.losses.append(LinearLoss(linear.name, found.loss, tokens, damp, note))


def _floats(model: LayeredModel, block: nn.Module) -> dict[str, F32]:
    """Every parameter of the layer that is not quantized, f32, by disk name."""
    quantized = {p.path for shared in model.family.inputs for p in quantized_parameters(model.family, shared)}
    return {
        disk_name(model.family, path): value.detach().cpu().numpy().copy()
        for path, value in block.named_parameters()
        if path not in quantized
    }
