"""One forward pass as every implementation can show it: hidden states after each layer and the last logits. And layers
done again on another's states.

A layer that is given what another implementation had before it, and is compared with what that one had after it,
shows its own difference alone: nothing that came before adds to it, and every layer that differs is found, not just the
first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.progress import Progress
from bitladder.records.selfcheck import HEAD, Implementation
from bitladder.walk.head import softcapped
from bitladder.walk.layers import LayeredModel, inference
from bitladder.walk.rounding import rounded_input
from bitladder.walk.weights import FileWeights

_HEAD_ROWS = 16384
"""Rows of the output matrix in memory at once."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """What one implementation computes for windows of equal length."""

    states: Mapping[int, torch.Tensor]
    """f32[windows, n, width] after each layer; layers that cannot be seen are left out."""
    logits: torch.Tensor
    """f32[windows, last, n_vocab] of the last tokens of each window."""

    def shows(self, layer: int) -> bool:
        """Whether the states before and after a layer are known; those before the first are everybody's."""
        return layer in self.states and (layer == 0 or layer - 1 in self.states)


@dataclass(frozen=True)
class Step:
    """A layer done again on another implementation's states. All f64[tokens]: lengths of vectors."""

    layer: int
    """Or ``HEAD``."""
    gap: Numbers
    """Of what differs: from the result with rounded inputs where there is one."""
    rounding: Numbers
    """Of what rounding inputs as the engine does changes in the result; zero where nothing rounds."""
    change: Numbers
    """Of what the layer adds to what it is given; of logits, about their mean."""
    size: Numbers
    """Of what it is given; of logits, their own."""


def step(
    layer: int, before: torch.Tensor, after: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor | None = None
) -> Step:
    """Compare a layer's results, ``exact`` and with ``rounded`` inputs, with the states ``after`` it that another
    implementation has; ``before``: what it was given. All f32[..., width]."""
    other = exact if rounded is None else rounded
    rounding = torch.zeros_like(exact) if rounded is None else rounded - exact
    return Step(layer, _lengths(after - other), _lengths(rounding), _lengths(exact - before), _lengths(before))


def head_step(wanted: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor | None = None) -> Step:
    """The same of logits f32[..., n_vocab]."""
    return step(HEAD, exact.mean(-1, keepdim=True).expand_as(exact), wanted, exact, rounded)


def _lengths(x: torch.Tensor) -> Numbers:
    return np.asarray(x.double().norm(dim=-1).reshape(-1).cpu().numpy(), np.float64)


def walked(
    model: LayeredModel,
    weights: FileWeights,
    tokens: NDArray[np.int64],
    given: Mapping[Implementation, Trace],
    progress: Progress,
    *,
    rounding: Collection[Implementation],
    last: int,
) -> tuple[Trace, torch.Tensor, dict[Implementation, list[Step]]]:
    """The walk's own pass; the logits of one that rounds what matrices read; its layers done again on others' states.

    Args:
        model: the layers.
        weights: of the file.
        tokens: ids, int64[windows, n].
        given: what others computed.
        progress: shown each layer.
        rounding: those of ``given`` that round what matrices read, as llama.cpp does.
        last: tokens of each window whose logits are computed.

    Raises:
        BadFile, BadInput, BadWeights, UnknownArchitecture: the model cannot be walked.
    """
    own = loose = model.embed(tokens, weights)
    before = dict.fromkeys(given, own)
    states: dict[int, torch.Tensor] = {}
    steps: dict[Implementation, list[Step]] = {name: [] for name in given}
    for layer in range(model.n_layer):
        progress("walk: layer by layer", layer, model.n_layer)
        block = model.layer(layer, weights)
        seen = {name: trace.states[layer] for name, trace in given.items() if trace.shows(layer)}
        own = states[layer] = model.run(block, layer, own)
        exact = {name: model.run(block, layer, before[name]) for name in seen}
        rounded: dict[Implementation, torch.Tensor] = {}
        if rounding:
            model.round_inputs(block, layer, weights.qtype)
            loose = model.run(block, layer, loose)
            rounded = {name: model.run(block, layer, before[name]) for name in seen if name in rounding}
        for name, after in seen.items():
            steps[name].append(step(layer, before[name], after, exact[name], rounded.get(name)))
            before[name] = after
        for name_of_tensor in model.layer_names(layer):
            weights.forget(name_of_tensor)
    for name, trace in given.items():
        if model.n_layer - 1 in trace.states:
            at_end = before[name][:, -last:]
            exact_logits = _logits(model, weights, at_end, rounded=False)
            rounded_logits = _logits(model, weights, at_end, rounded=True) if name in rounding else None
            steps[name].append(head_step(trace.logits, exact_logits, rounded_logits))
    progress("walk: layer by layer", model.n_layer, model.n_layer)
    plain = _logits(model, weights, own[:, -last:], rounded=False)
    return Trace(states, plain), _logits(model, weights, loose[:, -last:], rounded=True) if rounding else plain, steps


def _logits(model: LayeredModel, weights: FileWeights, states: torch.Tensor, *, rounded: bool) -> torch.Tensor:
    rows = weights.file.info(model.output).shape[0]
    with inference():
        read = model.norm(weights)(states)
        read = rounded_input(read, weights.qtype(model.output)) if rounded else read
        parts = [
            read @ torch.from_numpy(weights(model.output, slice(start, min(start + _HEAD_ROWS, rows)))).to(read).T
            for start in range(0, rows, _HEAD_ROWS)
        ]
        logits = torch.cat(parts, dim=-1)
        if model.head_bias is not None:
            logits = logits + torch.from_numpy(model.head_bias).to(logits)
        return softcapped(logits, model.logit_softcap)


def divergence(reference: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Mean KL(reference || other) in nats per token of logits f32[..., n_vocab], and the share of tokens with the same
    most likely next token."""
    one, two = (torch.log_softmax(logits.double().cpu(), -1) for logits in (reference, other))
    kl = (one.exp() * (one - two)).sum(-1)
    return float(kl.mean().clamp_min(0)), float((one.argmax(-1) == two.argmax(-1)).double().mean())
