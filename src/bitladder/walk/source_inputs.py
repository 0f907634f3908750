"""What the source's linear modules read in a layer, kept while the source passes for a level that is built behind it.

A matrix W that reads X in the level and R in the source would make up for all that the layers before it lost, as far as
its inputs tell of it, if it were ``W + W (R - X)^T X (X^T X)^-1`` (GPTAQ, arXiv:2504.02692, has the same term in the
feedback); ``kernels.gptq.making_up`` goes half of that way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from bitladder.formats.roles import SharedInput
from bitladder.walk.driver import HeldInputs, Observer
from bitladder.walk.inputs import keeping
from bitladder.walk.layer_pass import Original
from bitladder.walk.layers import LayeredModel
from bitladder.walk.states import Batch, StatePool, States

Changed = Callable[[int, SharedInput], bool]


class SourceInputs(Observer):
    """Keeps what the source's linear modules read in a layer, of those that a level changes, until its builder takes
    it."""

    reads_weights = False

    def __init__(
        self, model: LayeredModel, changed: Changed, batches: Sequence[Batch], *, budget_bytes: int, spill: Path | None
    ) -> None:
        """``changed``: whether the level changes what reads an input of a layer. ``budget_bytes``: what is more of a
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
        return [shared.module for shared in linear if self._changed(layer, shared)]

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
