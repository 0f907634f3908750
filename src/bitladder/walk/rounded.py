"""Levels without feedback, AWQ and INT8 among them: codes to nearest, with what is known of the source's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.files.layer_store import LayerStore
from bitladder.formats.disk_names import quantized_parameters
from bitladder.formats.roles import SharedInput
from bitladder.levels import CheckpointLevel
from bitladder.walk import folding
from bitladder.walk.driver import Seen
from bitladder.walk.inputs import InputStatistics, Wants, peak_of
from bitladder.walk.layers import LayeredModel
from bitladder.walk.made import SCALE_DTYPES, LayerOutput, Made, floats_of, format_of, naming, too_few, unchanged
from bitladder.walk.matrices import matrix

F32 = NDArray[np.float32]
_T = TypeVar("_T")


class RoundedLevel(Made):
    """One such level."""

    def __init__(self, model: LayeredModel, level: CheckpointLevel, store: LayerStore, dtype: torch.dtype) -> None:
        super().__init__(model, level.name, store, dtype)
        self._level, self._scale_dtype = level, SCALE_DTYPES[dtype]
        self._folds = level.method.statistics.needs_text
        self.wants = Wants(gram=self._folds, largest=level.method.largest or level.format.reads_peaks)

    def make(self, layer: int, block: nn.Module, seen: Seen) -> LayerOutput:
        """As ``Made``. A level made without folding owes nothing to the text, and knows its losses only where a Gram
        matrix was summed for another."""
        output, level, family = LayerOutput(), self._level, self.model.family
        with unchanged(block) if self._folds else nullcontext():
            factors = {
                shared: self._fold(layer, block, shared, statistics[0]) if statistics and self._folds else None
                for shared, statistics in seen.items()
            }
            for shared, statistics in seen.items():
                peak = peak_of(statistics or ())
                parameters, scale = quantized_parameters(family, shared), factors[shared]
                stored = format_of(self.model, level.format, layer, parameters[0].path)
                assert stored is not None  # what mixes formats, and floats, is made with feedback
                for expert, own in _experts(statistics or [None] * self._matrices(shared)):
                    note = too_few(expert, own) if own is not None and self._folds else ""
                    gram = own.gram if own is not None and len(own.gram) and not note else None
                    if gram is not None and scale is not None:
                        gram = gram / np.outer(scale, scale)
                    known = level.method.prepare(gram)
                    with naming(layer, shared.module):
                        matrices = (matrix(family, block, parameter, expert) for parameter in parameters)
                        form = stored.joined(matrices, level.method.importance(known), peak)
                    for parameter in parameters:
                        weights = matrix(family, block, parameter, expert)
                        with naming(layer, parameter.path):
                            found = level.method.apply(form, known, weights, scale_dtype=self._scale_dtype)
                        tokens = own.tokens if own is not None else 0
                        output.add(self.model, form, parameter, expert, found, tokens=tokens, note=note)
            output.floats |= floats_of(self.model, block)
        return output

    def _matrices(self, shared: SharedInput) -> int:
        return 1 if shared.kind == "linear" else self.model.model.dims.n_expert

    def _fold(self, layer: int, block: nn.Module, shared: SharedInput, statistics: InputStatistics) -> F32 | None:
        """Find this input's scales, multiply them into its columns and divide them out of what comes
        before."""
        level = self._level
        place = folding.place_of(self.model, block, shared)
        if place is None or not level.method.scales(into_norm=place.is_norm):
            return None
        weights = [matrix(self.model.family, block, parameter) for parameter in place.parameters]
        form = format_of(self.model, level.format, layer, place.parameters[0].path)
        assert form is not None
        factors = level.method.factors(form, statistics.gram, statistics.largest, weights, tied=place.tied)
        folding.fold(self.model, block, place, factors)
        return factors


def _experts(items: Sequence[_T]) -> Iterator[tuple[int | None, _T]]:
    """``(None, item)`` for a plain linear, ``(expert, item)`` for each of several."""
    if len(items) == 1:
        yield None, items[0]
    else:
        yield from enumerate(items)
