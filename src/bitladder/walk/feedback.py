"""GGUF levels with error feedback, layer by layer: each layer is fitted to the inputs that the level so far gives.

Like ``gptq.GptqLevel``, but tensors keep llama.cpp's names, row order and blocks, so what comes out is an
ordinary GGUF file. The order within a layer is that of its shared inputs; every Hessian is gathered after the linear
layers before it have been quantized.

The source's own states pass through its layers beside the level's. A matrix W that reads X in the level and R in the
source would make up for all that the layers before it lost, as far as its inputs tell of it, if it were
``W + W (R - X)^T X (X^T X)^-1`` (GPTAQ, arXiv:2504.02692, has the same term in the feedback). Codes are chosen for
weights half way there: the whole of it fits the calibration text more than other text (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.errors import BadWeights
from bitladder.formats.roles import Parameter, SharedInput, layer_tensor
from bitladder.kernels import Effort, dequantize, gptq, quantize
from bitladder.kernels.feedback import chunk_of, quantize_with_feedback, takes_feedback
from bitladder.levels.held import require_held
from bitladder.walk.driver import Builder, HeldInputs, Observer, Stream
from bitladder.walk.inputs import InputStatistics, keeping
from bitladder.walk.layer_pass import Original, passing
from bitladder.walk.layers import LayeredModel, tensor_at
from bitladder.walk.made import FEW_TOKENS
from bitladder.walk.products import wants_half_products
from bitladder.walk.states import Batch, StatePool, States
from bitladder.walk.transforms import apply
from bitladder.walk.weights import LevelWeights

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

_SHARE = 0.5
"""Of what a matrix could make up for of the errors before it."""


@dataclass(frozen=True)
class FittedTensor:
    """A quantized tensor of a layer, uint8[rows, row_bytes] over all its matrices.

    ``loss`` is the squared error of its outputs as a share of their energy on the calibration text, against those of
    the weights that its codes were chosen for; NaN without statistics. ``note`` says what was done differently, and
    why.
    """

    name: str
    qtype: str
    data: U8
    loss: float
    tokens: int
    damp: float
    note: str = ""


@dataclass(frozen=True)
class FeedbackSettings:
    """How codes are fitted."""

    damp: float = 0.01
    """Share of the Hessian's mean diagonal that is added to it, for channels that were hardly ever active."""
    effort: Effort = "good"
    threads: int = 1
    device: str = "cpu"
    """Where codes are chosen, as torch names it; the same as the model's."""
    half: bool | None = None
    """Whether passes multiply in bfloat16 (``walk/products.py``); None: where the processor can."""

    @property
    def half_products(self) -> bool:
        """``half``, decided."""
        return wants_half_products(self.half, self.device)


@dataclass(frozen=True)
class Fitted:
    """One matrix: its blocks, their cost, the outputs' energy, what was unusual."""

    data: U8
    cost: float = 0.0
    energy: float = 0.0
    damp: float = 0.0
    note: str = ""


def factor_of(name: str, seen: InputStatistics, settings: FeedbackSettings) -> tuple[F32, gptq.Factor]:
    """The Hessian and its factor, shrunk towards its diagonal by as much as it was learnt from few tokens.

    Correlations of n channels over T tokens are noise of the order sqrt(n / T), and feedback that follows noise fits
    the calibration text. Each diagonal entry grows by the share n / T, as if n tokens of unrelated channels had been
    seen too; fixed shares from 0.05 to 0.5, and damping alone, did no better (docs/log.md).

    Raises:
        BadWeights: it is not finite, or not positive semidefinite whatever the damping.
    """
    shrunk = seen.gram.copy()
    shrunk[np.diag_indices_from(shrunk)] *= 1 + len(shrunk) / max(1, seen.tokens)
    try:
        return shrunk, gptq.prepare(shrunk, damp=settings.damp, together=chunk_of(len(shrunk)))
    except ValueError as error:
        raise BadWeights(
            f"{name}: {error}.",
            means="The weights or the activations of this layer overflow; the model is damaged or scaled oddly.",
            do="Check the source's own answers first; levels without feedback may still work.",
        ) from error


def fit_matrix(
    qtype: str, weights: F32, seen: InputStatistics, factored: tuple[F32, gptq.Factor], settings: FeedbackSettings
) -> Fitted:
    """Blocks for f32[rows, columns] that meet inputs with the statistics ``seen``."""
    hessian, factor = factored
    if len(seen.drift):
        weights = weights + np.float32(_SHARE) * gptq.solve(factor, weights @ seen.drift)
    energies = seen.squares.astype(np.float32)
    blocks = quantize_with_feedback(
        weights,
        qtype,
        factor,
        hessian=hessian,
        importance=energies,
        effort=settings.effort,
        threads=settings.threads,
        device=settings.device,
    )
    energy = float(np.vdot(weights @ seen.gram, weights))
    note = f"Hessian not positive definite: damping raised to {factor.damp:g}" if factor.rescued else ""
    return Fitted(blocks.data, blocks.cost, energy, factor.damp, note)


Changed = Callable[[int, Sequence[str]], list[str]]


class SourceInputs(Observer):
    """Keeps what the source's linear modules read in a layer, of those that a level changes, until its builder takes
    it."""

    def __init__(
        self, model: LayeredModel, changed: Changed, batches: Sequence[Batch], *, budget_bytes: int, spill: Path | None
    ) -> None:
        """``changed``: which tensors of some roles in a layer the level changes. ``budget_bytes``: what is more of a
        layer goes to files in ``spill``."""
        self._model, self._changed, self._batches = model, changed, batches
        self._budget, self._spill = budget_bytes, spill
        self._room = StatePool(0, spill)
        self._layer, self._modules = -1, list[str]()
        self._kept: dict[str, States] = {}
        self._held: dict[str, HeldInputs] = {}

    def pop(self, shared: SharedInput) -> Original | None:
        """What was read of an input in the layer that went by last; its room is free afterwards."""
        return self._held.pop(shared.module, None) or self._kept.pop(shared.module, None)

    def keeps(self, layer: int, block: nn.Module) -> list[str]:
        """As ``Observer``."""
        linear = [shared for shared in self._model.inputs(layer, block) if shared.kind == "linear"]
        return [shared.module for shared in linear if self._changed(layer, shared.roles)]

    def kept(self, inputs: Mapping[str, HeldInputs]) -> None:
        """As ``Observer``."""
        self._held = dict(inputs)

    def on(self, layer: int, block: nn.Module, batch: Batch) -> ExitStack:
        """As ``Observer``."""
        if layer != self._layer:
            self._modules = self.keeps(layer, block)
            self._layer, self._kept, self._room = layer, {}, StatePool(self._budget, self._spill)
        return keeping(block, self._modules, batch, self._put)

    def _put(self, module: str, batch: Batch, x: torch.Tensor) -> None:
        if module not in self._kept:
            self._kept[module] = self._room.states(self._batches, x.shape[-1])
        self._kept[module].put(batch, x)


class FedLevel(Builder):
    """One level whose codes are fitted. The source goes through each layer before it, watched by ``source_inputs``."""

    def __init__(
        self,
        model: LayeredModel,
        weights: LevelWeights,
        qtypes: Mapping[str, str],
        settings: FeedbackSettings,
        batches: Sequence[Batch],
        put: Callable[[FittedTensor], None],
        has: Callable[[str], bool] = lambda _: True,
        *,
        budget_bytes: int,
        spill: Path | None = None,
    ) -> None:
        """``qtypes``: what each tensor is stored as; those that keep the source's type are not touched. ``put`` takes a
        finished tensor, ``has`` says whether it did, in this run or an earlier one. ``budget_bytes``, ``spill``: as
        ``SourceInputs``."""
        super().__init__(weights)
        self.model, self._weights, self._qtypes, self._settings = model, weights, qtypes, settings
        self.source_inputs = SourceInputs(model, self._changed, batches, budget_bytes=budget_bytes, spill=spill)
        self._put, self._has = put, has
        self._last: tuple[InputStatistics, tuple[F32, gptq.Factor]] | None = None

    def holds(self, layers: int) -> bool:
        """As ``Resumable``."""
        roles = [role for parameter in self.model.family.parameters for role in parameter.roles]
        return all(self._has(name) for layer in range(layers) for name in self._changed(layer, roles))

    def _changed(self, layer: int, roles: Sequence[str]) -> list[str]:
        held = set(self.model.layer_names(layer))
        names = [name for role in roles if (name := layer_tensor(layer, role)) in held]
        return [name for name in names if self._qtypes.get(name, "") not in ("", self._weights.qtype(name))]

    def build(self, stream: Stream, layer: int, states: States) -> None:
        """Quantize a layer and push the states through the result.

        Raises:
            BadWeights: weights or activations are not finite.
        """
        block = self.load(self.model, layer)
        through = passing(stream, layer, block, states)
        for shared in self.model.inputs(layer, block):
            names = self._changed(layer, shared.roles)
            if not names:
                continue
            gathered = through.gather(shared, self.source_inputs.pop(shared))
            found = {name: self._fit(name, self._for_columns(layer, name, gathered)) for name in names}
            for tensor in found.values():
                self._put(tensor)
            for parameter in self._readers(layer, shared):
                self._fill(block, layer, parameter, found)
                through.changed(parameter.path)
        through.finish()

    def _readers(self, layer: int, shared: SharedInput) -> Iterator[Parameter]:
        return (p for p in self.model.kind(layer).parameters if set(p.roles) & set(shared.roles))

    def _for_columns(self, layer: int, name: str, seen: list[InputStatistics]) -> list[InputStatistics]:
        """Statistics in the order of a tensor's columns."""
        columns = self.model.columns(layer, name.split(".", 2)[2])
        return seen if columns is None else [one.moved(columns) for one in seen]

    def _fit(self, name: str, gathered: Sequence[InputStatistics]) -> FittedTensor:
        """One tensor: a matrix, or a stack of experts with statistics each."""
        whole = self._weights(name)
        matrices = whole.reshape(-1, *whole.shape[-2:])
        statistics = list(gathered) if len(gathered) == len(matrices) else list(gathered) * len(matrices)
        fitted = [
            self._fit_matrix(name, self._qtypes[name], own, seen)
            for own, seen in zip(matrices, statistics, strict=True)
        ]
        whole_energy = sum(one.energy for one in fitted)
        share = 1 / whole_energy if whole_energy > 0 else float("nan")
        notes = [one.note for one in fitted if one.note]
        note = f"{len(notes)} of {len(fitted)} matrices: {notes[0]}" if notes and len(fitted) > 1 else "".join(notes)
        return FittedTensor(
            name,
            self._qtypes[name],
            np.concatenate([one.data for one in fitted]),
            share * sum(one.cost for one in fitted),
            min(seen.tokens for seen in statistics),
            max(one.damp for one in fitted),
            note,
        )

    def _fit_matrix(self, name: str, qtype: str, weights: F32, seen: InputStatistics) -> Fitted:
        require_held(weights, [qtype], name)
        if seen.tokens < FEW_TOKENS or not takes_feedback(qtype):
            data = quantize(weights, qtype, effort=self._settings.effort, threads=self._settings.threads)
            note = f"only {seen.tokens} calibration tokens: rounded plainly" if takes_feedback(qtype) else ""
            return Fitted(data, note=note)
        if self._last is None or self._last[0] is not seen:  # tensors that share an input share its factor
            self._last = (seen, factor_of(name, seen, self._settings))
        return fit_matrix(qtype, weights, seen, self._last[1], self._settings)

    def _fill(self, block: nn.Module, layer: int, parameter: Parameter, found: Mapping[str, FittedTensor]) -> None:
        """Put the decoded weights where the layer's next inputs come from."""
        parts = []
        held = self.model.layer_names(layer)
        for name in (layer_tensor(layer, role) for role in parameter.roles):
            if name in held:
                parts.append(self._decoded(found[name]) if name in found else self._weights(name))
        heads = self.model.model.dims.n_head if "q_proj" in parameter.path else self.model.model.dims.n_head_kv
        value = np.ascontiguousarray(apply(parameter.transform, parts, heads))
        with torch.no_grad():
            tensor_at(block, parameter.path).copy_(torch.from_numpy(value))

    def _decoded(self, tensor: FittedTensor) -> F32:
        shape = next(t.shape for t in self.model.model.tensors if t.name == tensor.name)
        return dequantize(tensor.data, tensor.qtype, threads=self._settings.threads).reshape(shape)
