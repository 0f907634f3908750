"""The free numbers of a level tuned against its own predictions: what a file holds beside codes, moved so that the
KL divergence of the level's predictions from the source's falls. Codes, whole-number scales and bytes stay.

A step takes some windows of the text forward through the level, layer by layer, with the states that entered each layer
kept, and the gradient of the divergence back, recomputing a layer where it is reached. What a block's float16 numbers
and a norm's weights should move by is summed on the way (``Slopes``), and Adam (arXiv:1412.6980) moves each by a share
of itself, so that numbers of all sizes go at one rate. Distillation of scales is known from MLX's DWQ; here the text is
short, so what decides is held-out text: documents that no step sees say which step is the best, and whether any is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.describe.windows import Window
from bitladder.kernels.free_numbers import Grain, shape_of
from bitladder.progress import Progress, silent
from bitladder.stats.bootstrap import SEED
from bitladder.units import MiB
from bitladder.walk.driver import Builder, Member, MemberGroup, Stages, Stream, backward, forward
from bitladder.walk.gradients import send_back
from bitladder.walk.head import softcapped
from bitladder.walk.keep import Arrays
from bitladder.walk.layers import LayeredModel, inference, tensor_at
from bitladder.walk.products import products
from bitladder.walk.states import CALIBRATION_TOKENS, Batch, StatePool, States, batches_of
from bitladder.walk.tuned import Tunable
from bitladder.walk.weights import LevelWeights

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

REVISION = "2"
"""Raised whenever tuned numbers change for another reason than settings."""
_MEAN, _SQUARE = 0.9, 0.95
"""How slowly Adam forgets slopes and their squares: few steps are made."""
_SHORTER = 0.3
"""What a step becomes of itself where held-out text lost more after some of them."""
_MUCH = 0.1
"""A divergence (nats per token) from which on steps have their full size. What loses less is nearer to where it is
best, and steps that help a level of two bits lead it away."""
_SLICE = 8192
_LOGIT_BYTES = 512 * MiB
"""Logits of both models at once, at the head."""


class Slopes(Builder):
    """What goes back: gradients at a layer's output become those at its input, and those of the layer's free numbers
    are summed in ``found``."""

    def __init__(
        self, model: LayeredModel, tuned: Tunable, there: Stream, names: frozenset[str], found: dict[str, F32]
    ) -> None:
        """``there``: the stream that went forward, with the states that entered each layer. ``names``: of the numbers
        that are asked for."""
        super().__init__(tuned)
        self.model, self._tuned, self._there, self._names, self._found = model, tuned, there, names, found

    def build(self, stream: Stream, layer: int, states: States) -> None:
        """As ``Builder``."""
        block = self._tuned.layer(self.model, layer)
        entered = self._there.entered.pop()
        with torch.inference_mode(False):
            for path in self._tuned.asked(self.model, layer, block, self._names):
                tensor_at(block, path).requires_grad_()
        for batch in stream.batches:
            send_back(self.model, block, layer, batch, entered, states, half=stream.half)
        self._there.shelf.give_back(entered)
        for name, own in self._tuned.slopes(self.model, layer, block, self._names):
            self._found[name] = self._found[name] + own if name in self._found else own


class TunedMember(Member):
    """A level that passes with its present numbers."""

    def __init__(self, tuned: Tunable, model: LayeredModel) -> None:
        super().__init__(tuned)
        self._tuned, self._model = tuned, model

    def load(self, stages: Stages, layer: int) -> nn.Module:  # noqa: ARG002
        """As ``Member``."""
        return self._tuned.layer(self._model, layer)


@dataclass(frozen=True)
class Found:
    """The divergence of some windows: its sum over tokens of each, how many tokens; and the slopes of its mean."""

    kl: F64
    tokens: F64
    slopes: Mapping[str, F32]


class TuningPass:
    """Divergences of a level from its source on windows of one text, and their slopes."""

    def __init__(
        self,
        model: LayeredModel,
        source: LevelWeights,
        tuned: Tunable,
        windows: Sequence[Window],
        *,
        state_bytes: int,
        spill: Path | None = None,
        half: bool = False,
    ) -> None:
        """``state_bytes``: hidden states beyond this go to files in ``spill``. ``half``: multiply in bfloat16."""
        self.model, self.tuned, self.windows, self._half = model, tuned, windows, half
        self._source, self._state_bytes, self._spill = source, state_bytes, spill
        self._taught: States | None = None
        self._layout = batches_of(windows, batch_tokens=CALIBRATION_TOKENS)
        self._place = {at: (batch, row) for batch in self._layout for row, at in enumerate(batch.windows)}

    def learn(self, progress: Progress = silent) -> None:
        """The source's own pass: what its head reads, of all windows, is kept."""
        stream = self._stream(Member(self._source), self._layout)
        forward([stream], progress, "the source's predictions: ")
        states = stream.states_of(0)
        norm = self.model.norm(self._source)
        kept = StatePool(self._state_bytes, self._spill).states(self._layout, self.model.model.dims.n_embd)
        for batch in self._layout:
            with inference():
                kept.put(batch, norm(states.get(batch).to(self.model.device)))
        self._taught = kept

    def lost(self, which: Sequence[int], progress: Progress = silent, title: str = "") -> Found:
        """The divergence of some of the windows, by their places, without slopes."""
        return self._run(which, frozenset(), progress, title)

    def slopes(
        self, which: Sequence[int], names: frozenset[str], progress: Progress = silent, title: str = ""
    ) -> Found:
        """The divergence of some of the windows and the slopes of its mean, of the numbers of some tensors."""
        return self._run(which, names, progress, title)

    def _run(self, which: Sequence[int], names: frozenset[str], progress: Progress, title: str) -> Found:
        batches = batches_of([self.windows[at] for at in which], batch_tokens=CALIBRATION_TOKENS)
        there = self._stream(TunedMember(self.tuned, self.model), batches, remember=bool(names))
        forward([there], progress, title)
        states = there.states_of(0)
        tokens = np.array([len(self.windows[at].tokens) - 1 for at in which], np.float64)
        kl, found = np.zeros(len(which)), dict[str, F32]()
        norm = self.model.norm(self.tuned)
        moved = [name for name in self.model.norm_names if name in names]
        for parameter in norm.parameters() if moved else ():
            parameter.requires_grad_()
        for batch in batches:
            with torch.set_grad_enabled(bool(names)):
                x = states.get(batch).to(self.model.device).clone().requires_grad_(bool(names))
                normed = norm(x)
            gradient = self._at_the_head(batch, which, normed.detach(), kl, float(tokens.sum()), back=bool(names))
            if names:
                torch.autograd.backward(normed, gradient)
                states.put(batch, cast(torch.Tensor, x.grad))
        if names:
            if len(moved) == 1 and (own := next(norm.parameters()).grad) is not None:
                found[moved[0]] = own.cpu().numpy().reshape(self.tuned.numbers[moved[0]].shape)
            back = self._stream_back(Slopes(self.model, self.tuned, there, names, found), batches, states)
            backward(back, progress, f"{title}back through ")
        return Found(kl, tokens, found)

    def _at_the_head(
        self,
        batch: Batch,
        which: Sequence[int],
        normed: torch.Tensor,
        kl: F64,
        tokens: float,
        *,
        back: bool,
    ) -> torch.Tensor:
        """Adds to ``kl`` of each window; returns the gradient of the mean divergence at the normed states (zeros
        without ``back``)."""
        gradient = torch.zeros_like(normed)
        n_vocab = self.model.model.dims.n_vocab
        at_once = max(1, _LOGIT_BYTES // (8 * n_vocab))
        for row, place in enumerate(batch.windows):
            taught = self._of_source(which[place])
            for start in range(0, batch.lengths[row] - 1, at_once):
                some = slice(start, min(start + at_once, batch.lengths[row] - 1))
                own = normed[row, some]
                with inference(), products(half=self._half):
                    lost, slope = self._compared(taught[some].to(own.device), own, tokens, back=back)
                kl[place] += lost
                gradient[row, some] = slope
        return gradient

    def _of_source(self, at: int) -> torch.Tensor:
        if self._taught is None:
            raise ValueError("the source's predictions are not known: learn() comes first")
        batch, row = self._place[at]
        return self._taught.get(batch)[row, : batch.lengths[row]]

    def _compared(
        self, taught: torch.Tensor, own: torch.Tensor, tokens: float, *, back: bool
    ) -> tuple[float, torch.Tensor]:
        """The summed divergence of predictions from states f32[tokens, n_embd] of both, and its gradient over
        ``tokens`` at the level's. The vocabulary is read in slices, twice."""
        output, n_vocab = self.model.output, self.model.model.dims.n_vocab
        theirs, ours = [], []
        for first in range(0, n_vocab, _SLICE):
            some = slice(first, min(first + _SLICE, n_vocab))
            theirs.append(self._logits(taught, self._source, some))
            ours.append(self._logits(own, self.tuned, some))
        log_p = torch.log_softmax(torch.cat(theirs, 1), 1)
        theirs.clear()
        log_q = torch.log_softmax(torch.cat(ours, 1), 1)
        ours.clear()
        p = log_p.exp()
        lost = float((p * (log_p - log_q)).sum(dtype=torch.float64))
        if not back:
            return lost, torch.zeros_like(own)
        slope = log_q.exp_().sub_(p).div_(tokens)
        gradient = torch.zeros_like(own)
        cap = self.model.logit_softcap
        for first in range(0, n_vocab, _SLICE):
            some = slice(first, min(first + _SLICE, n_vocab))
            weight = torch.from_numpy(self.tuned(output, some)).to(own.device)
            part = slope[:, some]
            if cap:
                bent = self._logits(own, self.tuned, some) / cap
                part = part * (1 - bent * bent)
            gradient += nn.functional.linear(part, weight.T)
        return lost, gradient

    def _logits(self, states: torch.Tensor, weights: LevelWeights, rows: slice) -> torch.Tensor:
        weight = torch.from_numpy(weights(self.model.output, rows)).to(states.device)
        bias = None if self.model.head_bias is None else torch.from_numpy(self.model.head_bias[rows]).to(weight)
        return softcapped(nn.functional.linear(states, weight, bias), self.model.logit_softcap)

    def _stream(self, member: Member, batches: Sequence[Batch], *, remember: bool = False) -> Stream:
        return Stream(
            self.model, [member], batches,
            state_bytes=self._state_bytes, spill=self._spill, half=self._half, remember=remember,
        )  # fmt: skip

    def _stream_back(self, member: Builder, batches: Sequence[Batch], gradients: States) -> Stream:
        back = Stream(
            self.model, [member], batches,
            state_bytes=self._state_bytes, spill=self._spill, half=self._half, back=True,
        )  # fmt: skip
        back.groups = [MemberGroup([0], gradients)]
        return back


@dataclass(frozen=True)
class TuneSettings:
    """How numbers are moved."""

    steps: int = 40
    windows: int = 2
    """Of each step."""
    rate: float = 0.0006
    """Share of itself that a number moves by in a step, about."""
    look: int = 8
    """Steps between looks at the held-out windows."""
    patience: int = 3
    """Looks without improvement after which it ends. After each of them it goes on from the best, in shorter steps."""

    @property
    def key(self) -> str:
        """What tells results of other settings apart."""
        return f"{self.steps} steps of {self.windows} windows at {self.rate:g}, revision {REVISION}"

    @classmethod
    def for_windows(cls, count: int) -> TuneSettings:
        """For a text of so many windows: as many steps as see what does not decide once, 40 to 120."""
        steps = min(120, max(40, count * 2 // 5))
        return cls(steps=steps, look=max(cls.look, steps // 8))


@dataclass(frozen=True)
class Tuned:
    """What came of it: numbers by tensor (none where it did not help), the summed divergence of each held-out window
    before and after, its tokens, how many steps were made, and after which of them the numbers are."""

    numbers: Mapping[str, F32]
    before: F64
    after: F64
    tokens: F64
    steps: int
    best: int


class Adam:
    """Moves numbers by shares of themselves, each by its own or several by one share.

    The running mean of slopes begins at 0 and is not made up for that: one step's slopes are mostly chance, and
    all numbers moved along them at once lose more than they gain.
    """

    def __init__(self, start: Mapping[str, F32], grains: Mapping[str, Grain], settings: TuneSettings) -> None:
        self.start, self._settings = start, settings
        self._shapes = {name: shape_of(grains[name], own.shape) for name, own in start.items()}
        self.moved = {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}
        self._mean = {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}
        self._square = {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}
        self.share = 1.0
        """Of the settings' rate."""
        self.step = 0

    def __call__(self, found: Mapping[str, F32]) -> None:
        """Make a step along these slopes; the last steps are short."""
        self.step += 1
        steps = self._settings.steps
        rate = self.share * self._settings.rate * min(1.0, max(0.05, (steps - self.step + 1) / (0.4 * steps)))
        for name, slope in found.items():
            axes = tuple(at for at, size in enumerate(self._shapes[name]) if size == 1)
            own = (slope * self.start[name]).sum(axis=axes, keepdims=True)
            mean, square = self._mean[name], self._square[name]
            mean += (1 - _MEAN) * (own - mean)
            square += (1 - _SQUARE) * (own * own - square)
            size = np.sqrt(square / (1 - _SQUARE**self.step)) + np.float32(1e-20)
            self.moved[name] = self.moved[name] - np.float32(rate) * mean / size  # others may hold the old ones

    def numbers(self) -> dict[str, F32]:
        """As they are now."""
        return {name: own * (1 + self.moved[name]) for name, own in self.start.items()}

    def back_to(self, moved: Mapping[str, F32]) -> None:
        """Go on from there, where these steps led nowhere, in shorter ones."""
        self.moved.update(moved)
        for own in self._mean.values():
            own[:] = 0
        self.share *= _SHORTER

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What ``resume`` takes back."""
        parts = (("moved", self.moved), ("mean", self._mean), ("square", self._square))
        held = {f"{part}.{name}": own for part, values in parts for name, own in values.items()}
        return {**held, "share": np.array(self.share)}

    def resume(self, step: int, arrays: Arrays) -> None:
        """Go on after so many steps."""
        self.step, self.share = step, float(arrays["share"])
        for part, values in (("moved", self.moved), ("mean", self._mean), ("square", self._square)):
            for name in values:
                values[name] = np.array(arrays[f"{part}.{name}"], np.float32)


class Notes(Protocol):
    """Keeps what a killed call goes on from."""

    def load(self) -> Arrays | None:
        """What was kept, or None."""

    def due(self) -> bool:
        """Whether the last time was long enough ago."""

    def save(self, arrays: Arrays) -> None:
        """Keep this instead."""


Told = Callable[[str, int], None]
"""What was just found, and after which step."""


def tune(
    passes: TuningPass,
    grains: Mapping[str, Grain],
    held: Sequence[int],
    settings: TuneSettings,
    *,
    notes: Notes | None = None,
    told: Told = lambda _what, _step: None,
) -> Tuned:
    """Move the numbers of some tensors to where the divergence of windows that no step sees is least.

    Args:
        passes: over all windows, ``learn``ed; its weights hold the result afterwards.
        grains: tensors whose numbers may move, and which of them move by one share.
        held: places of the windows that decide.
        settings: steps and their size.
        notes: keeps what a killed call goes on from.
        told: how it goes.

    Numbers are kept where the held-out windows' divergence falls by more than twice the standard error of that fall
    over windows; else the level's own stay.
    """
    tuned = passes.tuned
    start = {name: own for name in grains if (own := tuned.start(name)).size}
    adam, order = Adam(start, grains, settings), _order(passes, held, settings)
    tuned.numbers = dict(start)
    kept = notes.load() if notes else None
    if kept is None:
        before = passes.lost(held)
        adam.share = min(1.0, float(before.kl.sum() / before.tokens.sum()) / _MUCH)
        best, after, best_moved = 0, before.kl, dict(adam.moved)
    else:
        adam.resume(int(kept["step"]), kept)
        before = Found(kept["before"], kept["tokens"], {})
        best, after = int(kept["best"]), kept["after"]
        best_moved = {name: kept[f"best.{name}"] for name in start}
    told(f"held-out KL {before.kl.sum() / before.tokens.sum():.3g}", adam.step)
    while adam.step < settings.steps and adam.step < best + settings.patience * settings.look:
        tuned.numbers = adam.numbers()
        found = passes.slopes(order[adam.step], frozenset(start))
        adam(found.slopes)
        news = f"KL {found.kl.sum() / found.tokens.sum():.3g}"
        if adam.step % settings.look == 0 or adam.step == settings.steps:
            tuned.numbers = adam.numbers()
            seen = passes.lost(held)
            news = f"held-out KL {seen.kl.sum() / seen.tokens.sum():.3g}"
            if seen.kl.sum() < after.sum():
                best, after, best_moved = adam.step, seen.kl, dict(adam.moved)
            else:
                adam.back_to(best_moved)
        told(news, adam.step)
        if notes and notes.due():
            results = {"step": np.array(adam.step), "best": np.array(best), "before": before.kl, "after": after}
            best_of = {f"best.{name}": values for name, values in best_moved.items()}
            notes.save({**adam.arrays(), **best_of, **results, "tokens": before.tokens})
    if not helps(before.kl, after):
        best, best_moved = 0, {}
    tuned.numbers = {name: start[name] * (1 + own) for name, own in best_moved.items()}
    return Tuned(dict(tuned.numbers), before.kl, after, before.tokens, adam.step, best)


def helps(before: F64, after: F64) -> bool:
    """Whether divergences of the same windows, f64[windows] each, fell by more than chance: by more than twice the
    standard error of the sum of their differences."""
    fall = before - after
    return len(fall) > 1 and bool(fall.sum() > 2 * np.sqrt(len(fall)) * fall.std(ddof=1))


def _order(passes: TuningPass, held: Sequence[int], settings: TuneSettings) -> list[list[int]]:
    """The windows of each step: each is seen once before any is seen again."""
    used = [at for at in range(len(passes.windows)) if at not in set(held)]
    rng, queue = np.random.default_rng(SEED), list[int]()
    while len(queue) < settings.steps * settings.windows:
        queue += [used[at] for at in rng.permutation(len(used))]
    return [queue[step * settings.windows : (step + 1) * settings.windows] for step in range(settings.steps)]
