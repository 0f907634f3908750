"""Scales folded into a decoder layer: which norm or linear layer takes up their inverse, and what AWQ finds when
the result is packed as K-quants.

    columns of the matrices that read an input  x s         the norm, or the rows of the matrix, before it  / s

For K-quants the round trip through the very types of llama.cpp's recipe, under the importance that folding leaves
(mean squares / s^2), is what candidates are compared by, on half of the calibration text. Scales stay only where
they lower the error of the outputs on the other half, with all rows and the final search: chosen and judged on the
same text, they nearly always seemed to pay, and on other text often did not (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import from_numpy as tensor_of
from torch import nn, no_grad

from bitladder.describe.model import Model
from bitladder.files.layer_store import LayerStore
from bitladder.formats.blocks import QTYPES, TRAINED
from bitladder.formats.disk_names import absorbing_parameters, quantized_parameters
from bitladder.formats.recipes import assign
from bitladder.formats.roles import Parameter, SharedInput, layer_tensor
from bitladder.kernels import Effort, awq, dequantize, quantize
from bitladder.kernels.awq import Fold
from bitladder.levels import FoldedLevel
from bitladder.levels.methods import relative_error
from bitladder.records.calibration import LinearLoss
from bitladder.walk.driver import Seen
from bitladder.walk.inputs import Wants
from bitladder.walk.layers import LayeredModel, tensor_at
from bitladder.walk.made import LayerOutput, Made, naming, unchanged
from bitladder.walk.matrices import matrix, set_matrix
from bitladder.walk.transforms import offset_of

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class FoldPlace:
    """Where a scale on a shared input can go: the matrices that read it, and what comes before."""

    parameters: tuple[Parameter, ...]
    absorbers: tuple[Parameter, ...]
    tied: NDArray[np.intp] | None
    """Which row of the layer before each channel comes from, where several come from one: query heads share
    value heads."""

    @property
    def is_norm(self) -> bool:
        """Whether a norm takes up the inverse."""
        return "norm" in self.absorbers[0].path

    def divisors(self, factors: F32) -> F32:
        """The inverse's place: one factor per row of the layer before, f32[rows]."""
        if self.tied is None:
            return factors
        own = np.empty(int(self.tied.max()) + 1, np.float32)
        own[self.tied] = factors
        return own


def place_of(model: LayeredModel, block: nn.Module, shared: SharedInput) -> FoldPlace | None:
    """Where scales of a shared input can be folded, or None where nothing before it can take them up."""
    present = {name for name, _ in block.named_parameters()}
    absorbers = tuple(p for p in absorbing_parameters(model.family, shared) if p.path in present)
    if not absorbers:
        return None
    from_values = "v_proj" in absorbers[0].path
    if from_values and getattr(model.config, "clip_qkv", None):
        return None  # a clamp between the two would act on other values
    tied = _value_channels(model) if from_values else None
    return FoldPlace(quantized_parameters(model.family, shared), absorbers, tied)


def fold(model: LayeredModel, block: nn.Module, place: FoldPlace, factors: F32) -> None:
    """Multiply the columns that read an input by ``factors`` f32[columns], and divide what comes before."""
    for parameter in place.parameters:
        set_matrix(model.family, block, parameter, None, matrix(model.family, block, parameter) * factors)
    own = place.divisors(factors)
    for parameter in place.absorbers:
        target = tensor_at(block, parameter.path)
        one = np.float32(offset_of(parameter.transform))
        value = target.detach().cpu().numpy()
        turned = value.ndim > 1 and parameter.turned
        scaled = awq.absorb(own, (value.T if turned else value) + one) - one
        with no_grad():
            target.copy_(tensor_of(np.ascontiguousarray(scaled.T if turned else scaled)))


def recipe_types(level: FoldedLevel, model: Model) -> dict[str, str]:
    """The qtype of every tensor, as llama.cpp's recipe gives it where there is an importance matrix."""
    return assign(level.recipe, model.tensors, model.dims, has_importance=True)


class FoldingScales(Made):
    """The scales of one folded level, judged on windows that they were not found on."""

    def __init__(
        self, model: LayeredModel, level: FoldedLevel, store: LayerStore, dtype: torch.dtype, *,
        held_out: frozenset[int], threads: int = 1,
    ) -> None:  # fmt: skip
        """``held_out``: windows that folds are judged on, not searched; without any none is made."""
        super().__init__(model, level.name, store, dtype)
        self.wants = Wants(gram=True, held_out=held_out)
        self._qtypes, self._threads = recipe_types(level, model.model), threads

    def make(self, layer: int, block: nn.Module, seen: Seen) -> LayerOutput:
        """As ``Made``."""
        output = LayerOutput()
        judged = [(shared, found[0]) for shared, found in seen.items() if found and len(found[0].held_out)]
        with unchanged(block):
            folder = KQuantFolder(self.model, layer, block, self._qtypes, self._threads)
            for shared, statistics in reversed(judged):  # what is folded into a matrix's rows comes before its columns
                with naming(layer, shared.module):
                    losses = folder.fold(shared, statistics.gram - statistics.held_out, statistics.held_out)
                output.losses[:0] = [LinearLoss(name, loss, statistics.tokens) for name, loss in losses.items()]
        output.vectors = {
            f"{name}.{kind}": vector for name, fold in folder.folds.items() for kind, vector in fold.vectors().items()
        }
        return output


class KQuantFolder:
    """Finds and folds the scales of one layer, input by input; ``folds`` has them by tensor name.

    Rows must be folded before columns: ask for the inputs in the reverse of their order in the layer.
    """

    def __init__(
        self, model: LayeredModel, layer: int, block: nn.Module, qtypes: Mapping[str, str], threads: int
    ) -> None:
        """``qtypes``: of every tensor of the level, by name. ``block`` is changed as inputs are folded."""
        self._model, self._layer, self._block, self._qtypes = model, layer, block, qtypes
        self._threads = threads
        self.folds: dict[str, Fold] = {}

    def fold(self, shared: SharedInput, gram: F32, held_out: F32) -> dict[str, float]:
        """Fold one input where that pays; returns the error of each tensor's outputs as a share of their energy.

        Args:
            shared: The input.
            gram: ``X^T X`` of the text that scales are searched on, f32[columns, columns].
            held_out: The same of the text that they are judged on, and errors told of.

        Raises:
            ValueError: the Gram matrix is not finite.
        """
        place = place_of(self._model, self._block, shared)
        if place is None:
            return {}
        names = [layer_tensor(self._layer, parameter.roles[0]) for parameter in place.parameters]
        before = [layer_tensor(self._layer, parameter.roles[0]) for parameter in place.absorbers]
        if any(self._qtypes.get(name) in TRAINED for name in (*names, *before)):
            return {}  # scales would move such weights off their grid
        weights = [matrix(self._model.family, self._block, parameter) for parameter in place.parameters]
        qtypes = [self._qtypes[name] for name in names]
        group = max(QTYPES[qtype].block_size for qtype in qtypes)
        trips = [self._round_trip(qtype, "fast") for qtype in qtypes]
        factors = awq.prepare(gram, weights, trips, group_size=group, tied=place.tied).factors
        plain = self._losses(weights, qtypes, gram, held_out, np.ones_like(factors))
        folded = self._losses(weights, qtypes, gram, held_out, factors)
        if not _energy(folded, weights, held_out) < _energy(plain, weights, held_out):  # nor where nothing was held out
            return dict(zip(names, plain, strict=True))
        fold(self._model, self._block, place, factors)
        for name in names:
            self.folds[name] = Fold(factors, self.folds[name].rows if name in self.folds else None)
        for parameter in place.absorbers:
            self.folds[layer_tensor(self._layer, parameter.roles[0])] = Fold(None, place.divisors(factors))
        return dict(zip(names, folded, strict=True))

    def _losses(
        self, weights: Sequence[F32], qtypes: Sequence[str], gram: F32, held_out: F32, factors: F32
    ) -> list[float]:
        importance = np.asarray(np.diagonal(gram) / factors**2, np.float32)
        found = []
        for weight, qtype in zip(weights, qtypes, strict=True):
            stored = self._round_trip(qtype, "good")(weight * factors, importance)
            found.append(relative_error(stored / factors - weight, weight, held_out))
        return found

    def _round_trip(self, qtype: str, effort: Effort) -> awq.RoundTrip:
        def stored(weights: F32, importance: F32) -> F32:
            packed = quantize(weights, qtype, importance=importance, effort=effort, threads=self._threads)
            return dequantize(packed, qtype, threads=self._threads)

        return stored


def _energy(losses: Sequence[float], weights: Sequence[F32], gram: F32) -> float:
    """The error of all outputs of an input together, from each matrix's share of its own energy."""
    energies = [float(np.einsum("rk,rk->", weight @ gram, weight, dtype=np.float64)) for weight in weights]
    return float(np.nansum(np.multiply(losses, energies)))


def _value_channels(model: LayeredModel) -> NDArray[np.intp]:
    """Which value row each input channel of the output projection comes from: query heads share value
    heads."""
    dims = model.model.dims
    channel = np.arange(dims.n_head * dims.head_dim_v)
    head, within = np.divmod(channel, dims.head_dim_v)
    return np.asarray(head // dims.n_gqa * dims.head_dim_v + within, np.intp)
