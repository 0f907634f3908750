"""A reference and its levels on the same tokens: one stream through the layers, compared at the head.

Each level has its own hidden states; levels whose tensors have been equal so far share theirs. At the end the
next-token distributions of all meet (``head.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.describe.windows import Window
from bitladder.errors import BadWeights, OutputError
from bitladder.files.folders import cache_key
from bitladder.files.kept_array import KeptArray
from bitladder.progress import Part, Progress
from bitladder.units import MiB
from bitladder.walk.driver import Member, MemberGroup, Stream, forward, split
from bitladder.walk.head import HeadInput, TokenScores, compare
from bitladder.walk.keep import Keep
from bitladder.walk.layers import LayeredModel, inference
from bitladder.walk.rounding import rounded_input
from bitladder.walk.states import CALIBRATION_TOKENS, Batch, States, batches_of
from bitladder.walk.weights import LevelWeights

SoFar = Callable[[int, float], None]
_HEAD_BYTES = 512 * MiB
"""Normed states at the head at once, all models together."""
_REMEMBERED_BYTES = 128 * MiB
"""Of a reference's normed states: more are not kept for later walks."""


def walk_key(weights: Sequence[LevelWeights], tensors: Sequence[str], tokens: Sequence[bytes]) -> str:
    """A hash over every model's tensors (by identity), and over the windows."""
    return cache_key(*(repr((name, own.identity(name))) for own in weights for name in tensors), *tokens)


class Ladder:
    """The pass over the layers and the head. ``weights[0]`` is the reference's."""

    def __init__(
        self,
        model: LayeredModel,
        weights: Sequence[LevelWeights],
        windows: Sequence[Window],
        *,
        state_bytes: int,
        spill: Path | None = None,
        keep: Path | None = None,
        remember: KeptArray | None = None,
        engine_rounding: bool = False,
        half: bool = False,
    ) -> None:
        """``state_bytes``: hidden states beyond this go to a file in ``spill``. ``keep``: a folder in which a
        killed pass leaves its states, and finds them. ``remember``: where what the reference has at the head
        is left, f32[scored, n_embd], under a name of that reference, text and arithmetic; a pass that finds it takes
        the levels alone. ``engine_rounding``: round inputs as llama.cpp does. ``half``: multiply in bfloat16."""
        self.model, self.weights, self.windows = model, weights, windows
        self.batches = batches_of(windows, batch_tokens=CALIBRATION_TOKENS)
        self._rounding = engine_rounding
        self._kept = remember
        self._reference = self._remembered()
        self._first = 0 if self._reference is None else 1
        """The number of the first model that goes through the layers."""
        key = ""
        if keep:
            tokens = [window.tokens.tobytes() for window in windows]
            names = [tensor.name for tensor in model.model.tensors]
            key = walk_key(weights, names, [*tokens, f"{engine_rounding} {half} {self._first}".encode()])
        self._stream = Stream(
            model,
            [Member(own, rounding=engine_rounding) for own in weights[self._first :]],
            self.batches,
            state_bytes=state_bytes,
            spill=spill,
            keep=Keep(keep, key) if keep else None,
            half=half,
        )

    def run(self, progress: Progress, so_far: SoFar = lambda _member, _mean: None) -> list[TokenScores]:
        """Scores of every scored token of every model, windows in the caller's order.

        ``so_far(member, mean)`` is told each model's mean KL over the text that has been compared.

        Raises:
            BadFile, BadWeights: a tensor is missing, misshapen or not finite.
            OutputError: no room for hidden states.
        """
        n_layer = self.model.n_layer
        total = n_layer + 2.0  # the head costs about two layers
        forward([self._stream], Part(progress, 0, n_layer, total), "walk: ")
        progress("walk: comparing predictions", n_layer, total)
        scores = self._at_the_head(self._stream.groups, so_far)
        self._stream.finished()
        progress("walk: comparing predictions", total, total)
        return scores

    def _head_identity(self, weights: LevelWeights) -> Hashable:
        norm = tuple(weights.identity(name) for name in self.model.norm_names)
        return norm, weights.identity(self.model.output)

    def _at_the_head(self, groups: Sequence[MemberGroup], so_far: SoFar) -> list[TokenScores]:
        """Scores of every model; models with the same states and the same head are scored once."""
        numbered = [([self._first + one for one in group.members], group.states) for group in groups]
        distinct: list[tuple[list[int], States | None]] = [
            (members, states)
            for group, states in numbered
            for members in split(group, lambda one: self._head_identity(self.weights[one]))
        ]
        if self._reference is not None:
            distinct.append(([0], None))
        distinct.sort(key=lambda pair: pair[0][0])  # the reference is member 0: all others are compared with it
        found: list[dict[int, TokenScores]] = [{} for _ in distinct]
        limit = max(1, _HEAD_BYTES // (len(distinct) * self.model.model.dims.n_embd * 4))
        for chunk in self._chunks(limit):
            order = [at for batch in chunk for at in batch.windows]
            normed = [self._normed(self.weights[members[0]], states, chunk) for members, states in distinct]
            self._remember(chunk, normed[0])
            inputs = [
                self._head_input(self.weights[members[0]], own)
                for (members, _), own in zip(distinct, normed, strict=True)
            ]
            targets = np.concatenate([self.windows[at].tokens[self.windows[at].first + 1 :] for at in order])
            n_vocab = self.model.model.dims.n_vocab
            cap, bias = self.model.logit_softcap, self.model.head_bias
            compared = compare(inputs, targets, n_vocab, softcap=cap, bias=bias)
            self._check_reference(compared[0])
            for number, scores in enumerate(compared):
                ends = np.cumsum([self.windows[at].scored for at in order])
                found[number].update(zip(order, scores.split(ends), strict=True))
                mean = float(np.concatenate([one.kl for one in found[number].values()]).mean())
                for member in distinct[number][0]:
                    so_far(member, mean)
        self._leave()
        scored = [TokenScores.joined([one[at] for at in range(len(self.windows))]) for one in found]
        place = {member: number for number, (members, _) in enumerate(distinct) for member in members}
        return [scored[place[member]] for member in range(len(self.weights))]

    def _check_reference(self, scores: TokenScores) -> None:
        if not np.isfinite(scores.nll).all():
            raise BadWeights(
                f"The predictions of {self.model.model.name} are not finite.",
                means="Its weights overflow on this text; the model is damaged, and nothing can be compared with it.",
                do="Fetch or convert it again; a source in another precision may be sound.",
            )

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

    def _remembered(self) -> NDArray[np.float32] | None:
        """What the reference has at the head, f32[scored, n_embd] window after window, if an earlier pass left it."""
        whole = (sum(one.scored for one in self.windows), self.model.model.dims.n_embd)
        found = self._kept.load() if self._kept else None
        self._collected: dict[int, NDArray[np.float32]] = {}
        self._collects = self._kept is not None and 4 * whole[0] * whole[1] <= _REMEMBERED_BYTES
        return found if found is not None and found.shape == whole and bool(np.isfinite(found).all()) else None

    def _remember(self, chunk: Sequence[Batch], normed: torch.Tensor) -> None:
        """Take note of what the reference has at some windows' positions."""
        if self._reference is None and self._collects:
            order = [at for batch in chunk for at in batch.windows]
            ends = np.cumsum([self.windows[at].scored for at in order])
            self._collected |= zip(order, np.split(normed.cpu().numpy(), ends[:-1]), strict=True)

    def _leave(self) -> None:
        """Leave it to later passes, if it is not theirs already."""
        if self._kept and self._collected:
            with suppress(OutputError):  # nothing is lost but time
                self._kept.save(np.concatenate([self._collected[at] for at in range(len(self.windows))]))
        self._collected.clear()

    def _normed(self, weights: LevelWeights, states: States | None, chunk: Sequence[Batch]) -> torch.Tensor:
        """The normed states of scored positions; without ``states`` those of the reference that are remembered."""
        if states is None:
            assert self._reference is not None
            ends = np.cumsum([window.scored for window in self.windows])
            each = np.split(self._reference, ends[:-1])
            own = [each[at] for batch in chunk for at in batch.windows]
            return torch.from_numpy(np.concatenate(own)).to(self.model.device)
        norm = self.model.norm(weights)
        kept = []
        with inference():
            for batch in chunk:
                held = states.get(batch)
                for row, at in enumerate(batch.windows):
                    window = self.windows[at]
                    kept.append(norm(held[row, window.first : len(window.tokens) - 1].to(self.model.device)))
        return torch.cat(kept)

    def _head_input(self, weights: LevelWeights, states_at_head: torch.Tensor) -> HeadInput:
        """Normed states of scored positions, and the rows of the output matrix."""
        output = self.model.output

        def rows(wanted: slice) -> NDArray[np.float32]:
            slice_of_output = weights(output, wanted)
            weights.forget(output)
            return slice_of_output

        if self._rounding:
            states_at_head = rounded_input(states_at_head, weights.qtype(output))
        return HeadInput(states_at_head, weights.identity(output), rows)
