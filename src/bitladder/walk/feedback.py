"""GGUF levels with error feedback, layer by layer: each layer is fitted to the inputs that the level so far gives.

Like ``streams.SequentialStream``, but tensors keep llama.cpp's names, row order and blocks, so what comes out is an
ordinary GGUF file. The order within a layer is that of its shared inputs; every Hessian is gathered after the linear
layers before it have been quantized.

The source's own states pass through its layers beside the level's. A matrix W that reads X in the level and R in the
source would make up for all that the layers before it lost, as far as its inputs tell of it, if it were
``W + W (R - X)^T X (X^T X)^-1`` (GPTAQ, arXiv:2504.02692, has the same term in the feedback). Codes are chosen for
weights half way there: the whole of it fits the calibration text more than other text (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.errors import BadWeights
from bitladder.formats.roles import Parameter, SharedInput, layer_tensor
from bitladder.kernels import Effort, dequantize, gptq, quantize
from bitladder.kernels.feedback import chunk_of, quantize_with_feedback, takes_feedback
from bitladder.walk.calibration import InputStatistics, LayerPass
from bitladder.walk.layers import LayeredModel, inference
from bitladder.walk.products import products, wants_half_products
from bitladder.walk.states import Batch, States
from bitladder.walk.streams import FEW_TOKENS
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


class FeedbackStream:
    """One level; ``states`` hold what enters its next layer."""

    def __init__(
        self,
        model: LayeredModel,
        weights: LevelWeights,
        qtypes: Mapping[str, str],
        states: States,
        originals: States,
        batches: Sequence[Batch],
        settings: FeedbackSettings,
        *,
        spill: Path | None = None,
    ) -> None:
        """``qtypes``: what each tensor is stored as; those that keep the source's type are not touched.
        ``originals``: what enters the next layer of the source."""
        self.model, self._weights, self._qtypes = model, weights, qtypes
        self.states, self.originals = states, originals
        self._batches, self._settings, self._spill = batches, settings, spill
        self._last: tuple[InputStatistics | None, Any] = (None, None)

    def layer(self, layer: int) -> list[FittedTensor]:
        """Quantize a layer and push the states through the result.

        Raises:
            BadWeights: weights or activations are not finite.
        """
        block = self.model.layer(layer, self._weights)
        exact = self.inputs_of_the_source(layer, block)
        half = self._settings.half_products
        through = LayerPass(self.model, layer, block, self.states, self._batches, spill=self._spill, half=half)
        made: list[FittedTensor] = []
        for shared in self.model.kind(layer).inputs:
            names = [name for name in self._names(layer, shared.roles) if self._changes(name)]
            if not names:
                continue
            gathered = through.gather(shared, exact.pop(shared.module, None))
            found = {name: self._fit(name, gathered) for name in names}
            made += found.values()
            for parameter in self._readers(layer, shared):
                self._fill(block, layer, parameter, found)
        through.finish()
        return made

    def inputs_of_the_source(self, layer: int, block: nn.Module) -> dict[str, States]:
        """What the source's linear layers read, by module, while its states pass through the layer as it is yet."""
        wanted = [
            shared.module
            for shared in self.model.kind(layer).inputs
            if shared.kind == "linear" and any(self._changes(name) for name in self._names(layer, shared.roles))
        ]
        kept: dict[str, States] = {}
        for batch in self._batches:
            with inference(), products(half=self._settings.half_products), ExitStack() as watching:
                for module in wanted:
                    watching.enter_context(self._keeping(block, module, batch, kept))
                entering = self.originals.get(batch).to(self.model.device)
                self.originals.put(batch, self.model.run(block, layer, entering))
        return kept

    @contextmanager
    def _keeping(self, block: nn.Module, module: str, batch: Batch, kept: dict[str, States]) -> Iterator[None]:
        def seen(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].reshape(*batch.tokens.shape, -1)
            if module not in kept:
                kept[module] = States(self._batches, x.shape[-1], spill=self._spill)
            kept[module].put(batch, x)

        handle = block.get_submodule(module).register_forward_pre_hook(seen)
        try:
            yield
        finally:
            handle.remove()

    def _names(self, layer: int, roles: Sequence[str]) -> list[str]:
        held = set(self.model.layer_names(layer))
        return [name for role in roles if (name := layer_tensor(layer, role)) in held]

    def _changes(self, name: str) -> bool:
        return self._qtypes.get(name, self._weights.qtype(name)) != self._weights.qtype(name)

    def _readers(self, layer: int, shared: SharedInput) -> Iterator[Parameter]:
        return (p for p in self.model.kind(layer).parameters if set(p.roles) & set(shared.roles))

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
        if seen.tokens < FEW_TOKENS or not takes_feedback(qtype):
            data = quantize(weights, qtype, effort=self._settings.effort, threads=self._settings.threads)
            note = f"only {seen.tokens} calibration tokens: rounded plainly" if takes_feedback(qtype) else ""
            return Fitted(data, note=note)
        if self._last[0] is not seen:  # tensors that share an input share its factor
            self._last = (seen, factor_of(name, seen, self._settings))
        return fit_matrix(qtype, weights, seen, self._last[1], self._settings)

    def _fill(self, block: nn.Module, layer: int, parameter: Parameter, found: Mapping[str, FittedTensor]) -> None:
        """Put the decoded weights where the layer's next inputs come from."""
        parts = []
        for name in self._names(layer, parameter.roles):
            own = found.get(name)
            value = self._weights(name) if own is None else self._decoded(own)
            parts.append(value)
        heads = self.model.model.dims.n_head if "q_proj" in parameter.path else self.model.model.dims.n_head_kv
        value = np.ascontiguousarray(apply(parameter.transform, parts, heads))
        with torch.no_grad():
            block.get_parameter(parameter.path).copy_(torch.from_numpy(value))

    def _decoded(self, tensor: FittedTensor) -> F32:
        shape = next(t.shape for t in self.model.model.tensors if t.name == tensor.name)
        return dequantize(tensor.data, tensor.qtype, threads=self._settings.threads).reshape(shape)
