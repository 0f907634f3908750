"""The importance matrix: sums of squares of what every tensor of the layers reads, and over how many tokens.

The numbers of llama.cpp's llama-imatrix on the same tokens: for stacked experts one row and one count each, over the
tokens that were routed to them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bitladder.formats.roles import SharedInput, layer_tensor
from bitladder.levels.products import COUNT, SQUARES
from bitladder.walk.driver import Observer, Seen, Stages
from bitladder.walk.keep import Arrays

Vectors = dict[str, NDArray[np.floating]]
"""By tensor and kind: ``blk.0.attn_q.weight.squares`` f64[matrices, columns], ``.count`` f64[matrices]."""


class Importance(Observer):
    """Gathers ``vectors`` layer by layer."""

    reads_weights = False

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self.vectors: Vectors = {}

    def reads(self, shared: SharedInput) -> bool:  # noqa: ARG002
        """Squares of every input, those of routers, too."""
        return True

    def take(self, layer: int, block: nn.Module, seen: Seen) -> None:  # noqa: ARG002
        """As ``Observer``."""
        self.vectors |= vectors_of(self._stages, layer, seen)

    def resume(self, layers: int, arrays: Arrays) -> None:  # noqa: ARG002
        """As ``Observer``."""
        self.vectors = dict(arrays)

    def arrays(self) -> Arrays:
        """As ``Observer``."""
        return self.vectors


def vectors_of(stages: Stages, layer: int, seen: Seen) -> Vectors:
    """Sums of squares and counts of a layer, under the names of the tensors that read each input."""
    vectors: Vectors = {}
    held = set(stages.layer_names(layer))
    for shared, statistics in seen.items():
        for name in (layer_tensor(layer, role) for role in shared.roles):
            if name in held and statistics:
                columns = stages.columns(layer, name.split(".", 2)[2])
                ordered = statistics if columns is None else [one.moved(columns) for one in statistics]
                vectors[f"{name}.{SQUARES}"] = np.stack([one.squares for one in ordered])
                vectors[f"{name}.{COUNT}"] = np.array([one.tokens for one in statistics], np.float64)
    return vectors
