"""How much of a calibration text reached each layer, and each expert of a mixture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bitladder.records.calibration import LayerCoverage, LinearLoss

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"(?:layers|blk)\.(\d+)\.")


def coverage(linears: Sequence[LinearLoss]) -> tuple[LayerCoverage, ...]:
    """Per layer how many tokens its linear layers and experts were calibrated on, from what was noted of each."""
    layers: dict[int, list[LinearLoss]] = {}
    for linear in linears:
        if found := _LAYER.search(linear.name):
            layers.setdefault(int(found[1]), []).append(linear)
    return tuple(_of_layer(layer, layers[layer]) for layer in sorted(layers))


def _of_layer(layer: int, linears: Sequence[LinearLoss]) -> LayerCoverage:
    experts: dict[int, int] = {}
    plain = set()
    for linear in linears:
        if found := _EXPERT.search(linear.name):
            number = int(found[1])
            experts[number] = min(linear.tokens, experts.get(number, linear.tokens))
            if linear.note:
                plain.add(number)
    tokens = [linear.tokens for linear in linears if not _EXPERT.search(linear.name)]
    return LayerCoverage(
        layer, min(tokens, default=0), tuple(experts[one] for one in sorted(experts)), tuple(sorted(plain))
    )


def coverage_of_counts(counts: Mapping[str, NDArray[np.float32]]) -> tuple[LayerCoverage, ...]:
    """The same, from an importance matrix's counts: per tensor how many tokens each of its matrices saw. An expert
    that none reached has no importance of its own."""
    layers: dict[int, list[NDArray[np.float32]]] = {}
    for name, seen in counts.items():
        if found := _LAYER.search(name):
            layers.setdefault(int(found[1]), []).append(seen)
    found_layers = []
    for layer in sorted(layers):
        plain = [int(seen[0]) for seen in layers[layer] if len(seen) == 1]
        stacks = [seen for seen in layers[layer] if len(seen) > 1]
        experts = tuple(int(count) for count in np.min(stacks, axis=0)) if stacks else ()
        unseen = tuple(number for number, count in enumerate(experts) if not count)
        found_layers.append(LayerCoverage(layer, min(plain, default=0), experts, unseen))
    return tuple(found_layers)
