"""A level whose codes are chosen with feedback, built layer by layer: its states pass through the layers as quantized
so far, so each layer sees, and corrects for, what happened before it."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

import torch
from torch import nn

from bitladder.files.layer_store import LayerStore
from bitladder.formats.disk_names import quantized_parameters
from bitladder.formats.roles import Parameter, SharedInput
from bitladder.levels import CheckpointLevel
from bitladder.levels.checkpoints import CheckpointFormat
from bitladder.levels.methods import Prepared
from bitladder.walk.driver import Builder, Stream
from bitladder.walk.inputs import InputStatistics, peak_of
from bitladder.walk.layer_pass import passing
from bitladder.walk.layers import LayeredModel
from bitladder.walk.made import SCALE_DTYPES, InStore, LayerOutput, floats_of, format_of, naming, too_few
from bitladder.walk.matrices import matrix, set_matrix
from bitladder.walk.states import States
from bitladder.walk.weights import LevelWeights


class GptqLevel(InStore, Builder):
    """One level with its own propagated error."""

    def __init__(
        self,
        model: LayeredModel,
        weights: LevelWeights,
        level: CheckpointLevel,
        store: LayerStore,
        dtype: torch.dtype,
        *,
        damp: float = 0.05,
        act_order: bool = True,
    ) -> None:
        """``dtype``: of what stays float. ``damp``, ``act_order``: as ``kernels.gptq.prepare``."""
        InStore.__init__(self, level.name, store, dtype, model.family.disk.layers)
        Builder.__init__(self, weights)
        self._model, self._level = model, level
        self._damp, self._act_order, self._scale_dtype = damp, act_order, SCALE_DTYPES[dtype]

    def build(self, stream: Stream, layer: int, states: States) -> None:
        """Quantize a layer, input by input in the order they are computed, and push the states through the
        result.

        Raises:
            BadWeights: activations are not finite.
        """
        started = monotonic()
        block = self.load(self._model, layer)
        for tensor in self._model.layer_names(layer):  # the file's own pages need not stay beside the weights
            self.weights.forget(tensor)
        through = passing(stream, layer, block, states)
        output = LayerOutput()
        for shared in self._model.inputs(layer, block):
            parameters = quantized_parameters(self._model.family, shared)
            if not parameters:
                continue
            form = format_of(self._model, self._level.format, layer, parameters[0].path)
            if form is None:
                self._keep(block, shared, parameters, output)
                continue
            gathered = through.gather(shared, largest=form.reads_peaks)
            peak = peak_of(gathered)
            alone = len(gathered) == 1
            for expert in range(len(gathered)):
                self._quantize(layer, block, form, parameters, None if alone else expert, gathered, peak, output)
            for parameter in parameters:
                through.changed(parameter.path)
        through.finish()
        output.floats |= floats_of(self._model, block)
        self.put(layer, output, monotonic() - started)

    def _keep(
        self, block: nn.Module, shared: SharedInput, parameters: Sequence[Parameter], output: LayerOutput
    ) -> None:
        """Take over what stays float."""
        alone = shared.kind == "linear"
        for expert in [None] if alone else range(self._model.model.dims.n_expert):
            for parameter in parameters:
                output.keep(self._model, parameter, expert, matrix(self._model.family, block, parameter, expert))

    def _quantize(
        self,
        layer: int,
        block: nn.Module,
        form: CheckpointFormat,
        parameters: Sequence[Parameter],
        expert: int | None,
        gathered: list[InputStatistics],
        peak: float | None,
        output: LayerOutput,
    ) -> None:
        """Quantize, as ``form`` stores it, what reads the first of ``gathered``, which is taken out: its Gram matrix
        may be as large as the layer, and its factor takes its place. ``peak``: the largest magnitude of all."""
        method, statistics, family = self._level.method, gathered.pop(0), self._model.family
        tokens, few = statistics.tokens, too_few(expert, statistics)
        with naming(layer, parameters[0].path):
            seen = method.prepare(statistics.gram, damp=self._damp, act_order=self._act_order, overwrite=True)
        del statistics
        known = Prepared() if few else seen
        with naming(layer, parameters[0].path):
            matrices = (matrix(family, block, parameter, expert) for parameter in parameters)
            form = form.joined(matrices, method.importance(known), peak)
        for parameter in parameters:
            weights = matrix(family, block, parameter, expert)
            with naming(layer, parameter.path):
                found = method.apply(
                    form, known, weights, scale_dtype=self._scale_dtype, device=str(self._model.device)
                )
            set_matrix(family, block, parameter, expert, found.decoded)
            note = few or seen.note
            output.add(self._model, form, parameter, expert, found, tokens=tokens, note=note, damp=seen.damp)
