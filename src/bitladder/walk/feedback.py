"""GGUF levels with error feedback, layer by layer: each layer is fitted to the inputs that the level so far gives.

Like ``gptq.GptqLevel``, but tensors keep llama.cpp's names, row order and blocks, so what comes out is an
ordinary GGUF file. The order within a layer is that of its shared inputs; every Hessian is gathered after the linear
layers before it have been quantized.

The source's own states pass through its layers beside the level's (``source_inputs.py``): codes are chosen for weights
that make up by half for what the layers before them lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.errors import BadWeights
from bitladder.formats.roles import Parameter, SharedInput, layer_tensor
from bitladder.kernels import Effort, dequantize, gptq, quantize
from bitladder.kernels.feedback import chunk_of, quantize_heads, quantize_with_feedback, takes_feedback
from bitladder.levels.held import require_held
from bitladder.walk.coding import Bench, Share
from bitladder.walk.driver import Builder, Stream
from bitladder.walk.inputs import InputStatistics
from bitladder.walk.layer_pass import passing
from bitladder.walk.layers import LayeredModel, tensor_at
from bitladder.walk.made import FEW_TOKENS
from bitladder.walk.products import wants_half_products
from bitladder.walk.source_inputs import SourceInputs
from bitladder.walk.states import Batch, States
from bitladder.walk.transforms import apply
from bitladder.walk.weights import LevelWeights

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


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
    tokens: int = 0


def factor_of(name: str, seen: InputStatistics, settings: FeedbackSettings) -> tuple[F32, gptq.Factor]:
    """The Hessian and its factor, shrunk towards its diagonal by as much as it was learnt from few tokens
    (``gptq.shrink``).

    Raises:
        BadWeights: it is not finite, or not positive semidefinite whatever the damping.
    """
    shrunk = seen.gram.copy()
    gptq.shrink(shrunk, seen.tokens)
    try:
        return shrunk, gptq.prepare(shrunk, damp=settings.damp, together=chunk_of(len(shrunk)))
    except ValueError as error:
        raise BadWeights(
            f"{name}: {error}.",
            means="The weights or the activations of this layer overflow; the model is damaged or scaled oddly.",
            do="Check the source's own answers first; levels without feedback may still work.",
        ) from error


def fit_matrix(
    qtype: str,
    weights: F32,
    seen: InputStatistics,
    factored: tuple[F32, gptq.Factor],
    settings: FeedbackSettings,
    heads: F32 | None = None,
) -> Fitted:
    """Blocks for f32[rows, columns] that meet inputs with the statistics ``seen``; ``heads``: what errors of their rows
    cost together, by head (``kernels.feedback.quantize_heads``)."""
    hessian, factor = factored
    if len(seen.drift):
        weights = gptq.making_up(factor, weights, seen.drift)
    fit = partial(
        quantize_with_feedback, qtype=qtype, factor=factor, hessian=hessian,
        importance=seen.squares.astype(np.float32), effort=settings.effort, threads=settings.threads,
        device=settings.device,
    )  # fmt: skip
    blocks = fit(weights) if heads is None else quantize_heads(weights, qtype, heads, fit, threads=settings.threads)
    energy = float(np.vdot(weights @ seen.gram, weights))
    note = f"Hessian not positive definite: damping raised to {factor.damp:g}" if factor.rescued else ""
    return Fitted(blocks.data, blocks.cost, energy, factor.damp, note, seen.tokens)


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
        heads: Mapping[str, F32] | None = None,
    ) -> None:
        """``qtypes``: what each tensor is stored as; those that keep the source's type are not touched. ``put`` takes a
        finished tensor, ``has`` says whether it did, in this run or an earlier one. ``budget_bytes``, ``spill``: as
        ``SourceInputs``. ``heads``: by tensor, as ``fit_matrix`` takes it."""
        super().__init__(weights)
        self.model, self._weights, self._qtypes, self._settings = model, weights, qtypes, settings
        self.source_inputs = SourceInputs(
            model, lambda layer, shared: bool(self._changed(layer, shared.roles)), batches,
            budget_bytes=budget_bytes, spill=spill,
        )  # fmt: skip
        self._put, self._has, self._heads = put, has, heads or {}

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
        block = self.model.outline(layer) if stream.spread is not None else self.load(self.model, layer)
        through = passing(stream, layer, block, states, self._weights)
        for shared in self.model.inputs(layer, block):
            names = self._changed(layer, shared.roles)
            if not names:
                continue
            heads = {name: self._heads[name] for name in names if name in self._heads}
            coder = FedCoder(layer, shared, tuple((name, self._qtypes[name]) for name in names), self._settings, heads)
            found: dict[str, list[Fitted]] = {name: [] for name in names}
            for answer in through.code(coder, self.source_inputs.pop(shared)):
                for name, fitted in answer.items():
                    found[name] += fitted
            for name in names:
                self._put(_whole_of(name, self._qtypes[name], found.pop(name)))
        through.finish()


def _whole_of(name: str, qtype: str, fitted: Sequence[Fitted]) -> FittedTensor:
    """One tensor of its matrices."""
    whole_energy = sum(one.energy for one in fitted)
    share = 1 / whole_energy if whole_energy > 0 else float("nan")
    notes = [one.note for one in fitted if one.note]
    note = f"{len(notes)} of {len(fitted)} matrices: {notes[0]}" if notes and len(fitted) > 1 else "".join(notes)
    return FittedTensor(
        name,
        qtype,
        np.concatenate([one.data for one in fitted]),
        share * sum(one.cost for one in fitted),
        min(one.tokens for one in fitted),
        max(one.damp for one in fitted),
        note,
    )


_Change = dict[str, U8]


@dataclass(frozen=True)
class FedCoder:
    """Of one input of a layer, as ``coding.Coder``. A change is the blocks of tensors, or of some experts of each."""

    layer: int
    shared: SharedInput
    tensors: tuple[tuple[str, str], ...]
    """Names and types."""
    settings: FeedbackSettings
    heads: Mapping[str, F32] = field(default_factory=dict)
    """By tensor, as ``fit_matrix`` takes it."""
    reads_peak: ClassVar[bool] = False
    piecewise: ClassVar[bool] = False

    @property
    def readers(self) -> int:
        """As ``Coder``."""
        return len(self.tensors)

    def code(
        self,
        bench: Bench,
        share: Share,
        gathered: Iterator[InputStatistics],
        peak: float | None,  # noqa: ARG002
    ) -> tuple[dict[str, list[Fitted]], _Change]:
        """As ``Coder``: tensors by name, each as the matrices of this share."""
        own = self.tensors[share.readers.start : share.readers.stop]
        settings = replace(
            self.settings, threads=bench.threads or self.settings.threads, device=str(bench.model.device)
        )
        found: dict[str, list[Fitted]] = {name: [] for name, _ in own}
        for expert in [None] if share.experts is None else share.experts:
            seen = next(gathered)
            fitting = _Fitting(seen, settings)
            for name, qtype in own:
                columns = bench.model.columns(self.layer, name.split(".", 2)[2])
                for weights in _matrices(bench, name, expert):
                    found[name].append(fitting.fit(name, qtype, weights, columns, self.heads.get(name)))
        return found, {name: np.concatenate([one.data for one in fitted]) for name, fitted in found.items()}

    def paths(self, model: LayeredModel) -> list[str]:
        """As ``Coder``."""
        return [parameter.path for parameter in self._parameters(model)]

    def fill(self, bench: Bench, changes: Sequence[_Change]) -> None:
        """As ``Coder``: decoded weights, where the layer's next inputs come from."""
        names = dict(self.tensors)
        for parameter in self._parameters(bench.model):
            self._fill(bench, parameter, names, changes)

    def _parameters(self, model: LayeredModel) -> list[Parameter]:
        return [one for one in model.kind(self.layer).parameters if set(one.roles) & set(self.shared.roles)]

    def _fill(self, bench: Bench, parameter: Parameter, qtypes: Mapping[str, str], changes: Sequence[_Change]) -> None:
        model = bench.model
        parts = []
        held = model.layer_names(self.layer)
        for name in (layer_tensor(self.layer, role) for role in parameter.roles):
            if name in qtypes:
                blocks = np.concatenate([change[name] for change in changes if name in change])
                shape = next(tensor.shape for tensor in model.model.tensors if tensor.name == name)
                threads = bench.threads or self.settings.threads
                parts.append(dequantize(blocks, qtypes[name], threads=threads).reshape(shape))
            elif name in held:
                parts.append(bench.weights(name))
        heads = model.model.dims.n_head if "q_proj" in parameter.path else model.model.dims.n_head_kv
        value = np.ascontiguousarray(apply(parameter.transform, parts, heads))
        with torch.no_grad():
            tensor_at(bench.block, parameter.path).copy_(torch.from_numpy(value))


def _matrices(bench: Bench, name: str, expert: int | None) -> F32:
    """All of a tensor, or the one of an expert, f32[count, rows, columns]."""
    *_, rows, columns = next(tensor.shape for tensor in bench.model.model.tensors if tensor.name == name)
    some = None if expert is None else slice(expert * rows, (expert + 1) * rows)
    return bench.weights(name, some).reshape(-1, rows, columns)


class _Fitting:
    """Fits matrices that read the same input: those whose columns lie alike share its factor."""

    def __init__(self, seen: InputStatistics, settings: FeedbackSettings) -> None:
        self._seen, self._settings = seen, settings
        self._factored: tuple[F32, gptq.Factor] | None = None

    def fit(self, name: str, qtype: str, weights: F32, columns: NDArray[np.int64] | None, heads: F32 | None) -> Fitted:
        """Blocks of f32[rows, columns]; ``columns``: where the tensor has each channel, if elsewhere; ``heads``: as
        ``fit_matrix``."""
        require_held(weights, [qtype], name)
        seen, settings = self._seen, self._settings
        if seen.tokens < FEW_TOKENS or not takes_feedback(qtype):
            data = quantize(weights, qtype, effort=settings.effort, threads=settings.threads)
            note = f"only {seen.tokens} calibration tokens: rounded plainly" if takes_feedback(qtype) else ""
            return Fitted(data, note=note, tokens=seen.tokens)
        if columns is not None:
            seen = seen.moved(columns)
            return fit_matrix(qtype, weights, seen, factor_of(name, seen, settings), settings, heads)
        if self._factored is None:
            self._factored = factor_of(name, seen, settings)
        return fit_matrix(qtype, weights, seen, self._factored, settings, heads)
