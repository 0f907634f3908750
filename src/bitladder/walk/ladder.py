"""Several models of one shape through their layers together: a reference and its levels, on the same tokens.

One layer of weights is in memory at a time. Each level has its own hidden states; levels whose tensors have
been equal so far share theirs. At the end the next-token distributions of all meet (``walk/head.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.describe.windows import Window
from bitladder.formats.roles import OUTPUT_NORM
from bitladder.progress import Progress
from bitladder.units import MiB
from bitladder.walk.head import HeadInput, TokenScores, compare
from bitladder.walk.layers import LayeredModel, inference
from bitladder.walk.products import products
from bitladder.walk.resume import Checkpoint, walk_key
from bitladder.walk.rounding import round_inputs, rounded_input
from bitladder.walk.states import Batch, Shelf, States, batches_of
from bitladder.walk.weights import LevelWeights

SoFar = Callable[[int, float], None]
_HEAD_BYTES = 512 * MiB
"""Normed states at the head at once, all models together."""


@dataclass
class _Group:
    """Models that have shared all weights so far, and their states."""

    members: list[int]
    states: States


def _split(members: Sequence[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Members with equal keys together, in order."""
    parts: dict[Hashable, list[int]] = {}
    for member in members:
        parts.setdefault(key(member), []).append(member)
    return list(parts.values())


class Ladder:
    """The pass over the layers. ``weights[0]`` is the reference's."""

    def __init__(
        self,
        model: LayeredModel,
        weights: Sequence[LevelWeights],
        windows: Sequence[Window],
        *,
        state_bytes: int,
        spill: Path | None = None,
        keep: Path | None = None,
        engine_rounding: bool = False,
        half: bool = False,
    ) -> None:
        """``state_bytes``: hidden states beyond this go to a file in ``spill``. ``keep``: a folder in which a
        killed pass leaves its states, and finds them. ``engine_rounding``: round inputs as llama.cpp does. ``half``:
        multiply in bfloat16."""
        self._rounding, self._half = engine_rounding, half
        self.model, self.weights, self.windows = model, weights, windows
        self.batches = batches_of(windows)
        self._shelf = Shelf(self.batches, model.model.dims.n_embd, budget_bytes=state_bytes, folder=spill)
        self._kept = Checkpoint(keep, self._key()) if keep else None

    def run(self, progress: Progress, so_far: SoFar = lambda _member, _mean: None) -> list[TokenScores]:
        """Scores of every scored token of every model, windows in the caller's order.

        ``so_far(member, mean)`` is told each model's mean KL over the text that has been compared.

        Raises:
            BadFile, BadWeights: a tensor is missing, misshapen or not finite.
            OutputError: no room for hidden states.
        """
        n_layer = self.model.n_layer
        total = n_layer + 2.0  # the head costs about two layers
        first, groups = self._resumed() or (0, self._embedded())
        for layer in range(first, n_layer):
            progress(f"walk: layer {layer + 1} of {n_layer}", layer, total)
            groups = [part for group in groups for part in self._through(group, layer)]
            for name in self.model.layer_names(layer):
                for own in self.weights:
                    own.forget(name)
            if self._kept:
                self._kept.save(layer, [(group.members, group.states) for group in groups])
        progress("walk: comparing predictions", n_layer, total)
        scores = self._at_the_head(groups, so_far)
        if self._kept:
            self._kept.done()
        progress("walk: comparing predictions", total, total)
        return scores

    def _key(self) -> str:
        tensors = [tensor.name for tensor in self.model.model.tensors]
        windows = [window.tokens.tobytes() for window in self.windows]
        return walk_key(self.weights, tensors, [*windows, f"{self._rounding} {self._half}".encode()])

    def _resumed(self) -> tuple[int, list[_Group]] | None:
        """Where a killed pass over the same models and windows was: the layer to go on with, and its
        groups."""
        found = self._kept.load() if self._kept else None
        if self._kept is None or found is None:
            return None
        layer, members, files = found
        groups = []
        for own, file in zip(members, files, strict=True):
            states = self._shelf.take()
            self._kept.restore(file, states)
            groups.append(_Group(own, states))
        return layer, groups

    def _embedded(self) -> list[_Group]:
        groups = []
        everyone = range(len(self.weights))
        for members in _split(everyone, lambda one: self.weights[one].identity(self.model.embedding)):
            states = self._shelf.take()
            for batch in self.batches:
                states.put(batch, self.model.embed(batch.tokens, self.weights[members[0]]))
            self.weights[members[0]].forget(self.model.embedding)
            groups.append(_Group(members, states))
        return groups

    def _through(self, group: _Group, layer: int) -> list[_Group]:
        """Push a group through a layer; it falls apart into groups that still share everything."""
        names = self.model.layer_names(layer)
        parts = _split(group.members, lambda one: tuple(self.weights[one].identity(name) for name in names))
        result = []
        for number, members in enumerate(parts):
            # The last part to go may overwrite the states that all parts start from.
            states = group.states if number == len(parts) - 1 else self._shelf.take()
            block = self.model.layer(layer, self.weights[members[0]])
            if self._rounding:
                round_inputs(block, self.model.kind(layer), layer, self.weights[members[0]].qtype)
            for batch in self.batches:
                with products(half=self._half):
                    out = self.model.run(block, layer, group.states.get(batch).to(self.model.device))
                states.put(batch, out)
            del block  # before the next is built: one layer of weights at a time
            result.append(_Group(members, states))
        return result

    def _head_identity(self, weights: LevelWeights) -> Hashable:
        norm = weights.identity(OUTPUT_NORM) if self.model.family.has_output_norm else None
        return norm, weights.identity(self.model.output)

    def _at_the_head(self, groups: Sequence[_Group], so_far: SoFar) -> list[TokenScores]:
        """Scores of every model; models with the same states and the same head are scored once."""
        distinct = [
            (members, group.states)
            for group in groups
            for members in _split(group.members, lambda one: self._head_identity(self.weights[one]))
        ]
        distinct.sort(key=lambda pair: pair[0][0])  # the reference is member 0: all others are compared with it
        found: list[dict[int, TokenScores]] = [{} for _ in distinct]
        limit = max(1, _HEAD_BYTES // (len(distinct) * self.model.model.dims.n_embd * 4))
        for chunk in self._chunks(limit):
            order = [at for batch in chunk for at in batch.windows]
            inputs = [self._head_input(self.weights[members[0]], states, chunk) for members, states in distinct]
            targets = np.concatenate([self.windows[at].tokens[self.windows[at].first + 1 :] for at in order])
            n_vocab = self.model.model.dims.n_vocab
            for number, scores in enumerate(compare(inputs, targets, n_vocab, softcap=self.model.logit_softcap)):
                ends = np.cumsum([self.windows[at].scored for at in order])
                found[number].update(zip(order, scores.split(ends), strict=True))
                mean = float(np.concatenate([one.kl for one in found[number].values()]).mean())
                for member in distinct[number][0]:
                    so_far(member, mean)
        scored = [TokenScores.joined([one[at] for at in range(len(self.windows))]) for one in found]
        place = {member: number for number, (members, _) in enumerate(distinct) for member in members}
        return [scored[place[member]] for member in range(len(self.weights))]

    def _chunks(self, limit: int) -> list[list[Batch]]:
        """Batches together as long as their scored tokens stay within the limit."""
        chunks: list[list[Batch]] = []
        held = 0
        for batch in self.batches:
            scored = sum(self.windows[at].scored for at in batch.windows)
            if chunks and held + scored <= limit:
                chunks[-1].append(batch)
                held += scored
            else:
                chunks.append([batch])
                held = scored
        return chunks

    def _head_input(self, weights: LevelWeights, states: States, chunk: Sequence[Batch]) -> HeadInput:
        """The normed states of scored positions, and the rows of the output matrix."""
        norm = self.model.norm(weights)
        kept = []
        with inference():
            for batch in chunk:
                held = states.get(batch)
                for row, at in enumerate(batch.windows):
                    window = self.windows[at]
                    kept.append(norm(held[row, window.first : len(window.tokens) - 1].to(self.model.device)))
        output = self.model.output

        def rows(wanted: slice) -> NDArray[np.float32]:
            slice_of_output = weights(output, wanted)
            weights.forget(output)
            return slice_of_output

        states_at_head = torch.cat(kept)
        if self._rounding:
            states_at_head = rounded_input(states_at_head, weights.qtype(output))
        return HeadInput(states_at_head, weights.identity(output), rows)
