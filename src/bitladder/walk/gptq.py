"""A level whose codes are chosen with feedback, built layer by layer: its states pass through the layers as quantized
so far, so each layer sees, and corrects for, what happened before it. The source's own states pass beside them
(``source_inputs.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.files.layer_store import LayerStore
from bitladder.formats.disk_names import quantized_parameters
from bitladder.formats.roles import Parameter, SharedInput
from bitladder.levels import CheckpointLevel
from bitladder.levels.checkpoints import CheckpointFormat
from bitladder.levels.methods import Method, Prepared
from bitladder.walk.coding import Bench, Share
from bitladder.walk.driver import Builder, Stream
from bitladder.walk.inputs import InputStatistics
from bitladder.walk.layer_pass import passing
from bitladder.walk.layers import LayeredModel
from bitladder.walk.made import SCALE_DTYPES, InStore, LayerOutput, floats_of, format_of, naming, too_few
from bitladder.walk.matrices import matrix, set_matrix
from bitladder.walk.source_inputs import SourceInputs
from bitladder.walk.states import Batch, States
from bitladder.walk.weights import LevelWeights

_Change = dict[tuple[int, int | None], NDArray[np.float32]]


@dataclass(frozen=True)
class GptqCoder:
    """Of one input of a layer, as ``coding.Coder``. A change is decoded weights f32[outputs, inputs] by parameter and
    expert."""

    layer: int
    shared: SharedInput
    readers: int
    form: CheckpointFormat
    method: Method
    scale_dtype: str
    damp: float
    act_order: bool
    piecewise: ClassVar[bool] = True

    @property
    def reads_peak(self) -> bool:
        """As ``Coder``."""
        return self.form.reads_peaks

    def code(
        self, bench: Bench, share: Share, gathered: Iterator[InputStatistics], peak: float | None
    ) -> tuple[LayerOutput, _Change]:
        """As ``Coder``: what goes into the level's store."""
        output, change = LayerOutput(), _Change()
        for expert in [None] if share.experts is None else share.experts:
            self._quantize(bench, share, expert, next(gathered), peak, output, change)
        return output, change

    def paths(self, model: LayeredModel) -> list[str]:
        """As ``Coder``."""
        return [parameter.path for parameter in quantized_parameters(model.family, self.shared)]

    def fill(self, bench: Bench, changes: Sequence[_Change]) -> None:
        """As ``Coder``."""
        parameters = self._parameters(bench)
        for change in changes:
            for (number, expert), decoded in change.items():
                set_matrix(bench.model.family, bench.block, parameters[number], expert, decoded)

    def _parameters(self, bench: Bench) -> tuple[Parameter, ...]:
        return quantized_parameters(bench.model.family, self.shared)

    def _quantize(
        self,
        bench: Bench,
        share: Share,
        expert: int | None,
        statistics: InputStatistics,
        peak: float | None,
        output: LayerOutput,
        change: _Change,
    ) -> None:
        """Quantize what reads one input; the Gram matrix may be as large as the layer, and its factor takes its
        place."""
        method, family, parameters = self.method, bench.model.family, self._parameters(bench)
        tokens, few = statistics.tokens, too_few(expert, statistics)
        with naming(self.layer, parameters[0].path):
            seen = method.prepare(
                statistics.gram, tokens=tokens, drift=statistics.drift if len(statistics.drift) else None,
                damp=self.damp, act_order=self.act_order, overwrite=True,
            )  # fmt: skip
        del statistics
        known = Prepared() if few else seen
        with naming(self.layer, parameters[0].path):
            matrices = (matrix(family, bench.block, parameter, expert) for parameter in parameters)
            form = self.form.joined(matrices, method.importance(known), peak)
        for number in share.readers:
            parameter = parameters[number]
            weights = matrix(family, bench.block, parameter, expert)
            with naming(self.layer, parameter.path):
                found = method.apply(form, known, weights, scale_dtype=self.scale_dtype, device=str(bench.model.device))
            change[number, expert] = found.decoded
            note = few or seen.note
            output.add(bench.model, form, parameter, expert, found, tokens=tokens, note=note, damp=seen.damp)


class GptqLevel(InStore, Builder):
    """One level with its own propagated error."""

    def __init__(
        self,
        model: LayeredModel,
        weights: LevelWeights,
        level: CheckpointLevel,
        store: LayerStore,
        dtype: torch.dtype,
        batches: Sequence[Batch],
        *,
        damp: float = 0.05,
        act_order: bool = True,
        budget_bytes: int,
    ) -> None:
        """``dtype``: of what stays float. ``batches``: the text. ``damp``, ``act_order``: as ``kernels.gptq.prepare``.
        ``budget_bytes``: of what the source reads in a layer; more goes to files beside the level's."""
        InStore.__init__(self, level.name, store, dtype, model.family.disk.layers)
        Builder.__init__(self, weights)
        self._model, self._level = model, level
        self._damp, self._act_order, self._scale_dtype = damp, act_order, SCALE_DTYPES[dtype]
        self.source_inputs = SourceInputs(
            model, self._makes_up, batches,
            budget_bytes=budget_bytes, spill=store.partial,
        )  # fmt: skip

    def _form(self, layer: int, shared: SharedInput) -> CheckpointFormat | None:
        """Of what reads an input; None where it stays float, or nothing reads it."""
        parameters = quantized_parameters(self._model.family, shared)
        return format_of(self._model, self._level.format, layer, parameters[0].path) if parameters else None

    def _makes_up(self, layer: int, shared: SharedInput) -> bool:
        """Whether what reads an input is quantized, and the input not too wide to be compared with the source's."""
        if self._form(layer, shared) is None:
            return False
        parameter = quantized_parameters(self._model.family, shared)[0]
        *_, rows, columns = (int(size) for size in self._model.shape(parameter.path, layer))
        return (rows if parameter.turned else columns) <= self._level.method.widest_drift

    def build(self, stream: Stream, layer: int, states: States) -> None:
        """Quantize a layer, input by input in the order they are computed, and push the states through the
        result.

        Raises:
            BadWeights: activations are not finite.
        """
        started = monotonic()
        block = self.load(self._model, layer) if stream.spread is None else self._floats_alone(layer)
        for tensor in self._model.layer_names(layer):  # the file's own pages need not stay beside the weights
            self.weights.forget(tensor)
        through = passing(stream, layer, block, states, self.weights)
        output = LayerOutput()
        for shared in self._model.inputs(layer, block):
            parameters = quantized_parameters(self._model.family, shared)
            if not parameters:
                continue
            form = self._form(layer, shared)
            if form is None:
                self._keep(block, shared, parameters, output)
                continue
            coder = GptqCoder(
                layer, shared, len(parameters), form, self._level.method, self._scale_dtype, self._damp,
                self._act_order,
            )  # fmt: skip
            for made in through.code(coder, self.source_inputs.pop(shared)):
                output.join(made)
        through.finish()
        output.floats |= floats_of(self._model, block)
        self.put(layer, output, monotonic() - started)

    def _floats_alone(self, layer: int) -> nn.Module:
        """The layer without what workers quantize."""
        quantized = {
            parameter.path
            for shared in self._model.inputs(layer, self._model.outline(layer))
            for parameter in quantized_parameters(self._model.family, shared)
            if format_of(self._model, self._level.format, layer, parameter.path) is not None
        }
        block = self._model.empty(layer)
        floats = [path for path, _ in block.named_parameters() if path not in quantized]
        self._model.fill(block, layer, self.weights, floats)
        return block

    def _keep(
        self, block: nn.Module, shared: SharedInput, parameters: Sequence[Parameter], output: LayerOutput
    ) -> None:
        """Take over what stays float."""
        alone = shared.kind == "linear"
        for expert in [None] if alone else range(self._model.model.dims.n_expert):
            for parameter in parameters:
                output.keep(self._model, parameter, expert, matrix(self._model.family, block, parameter, expert))
