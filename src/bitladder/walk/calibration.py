"""What the linear layers of a decoder layer read, gathered while hidden states pass through it.

Quantizing a layer one shared input after another, each with the inputs that the already quantized part gives
("true sequential"), would take a forward pass per input. Here a pass goes only as far as the input it is
after, and starts from what is kept of the last one: the attention's result before its output projection (and
once that is quantized, after it), the MLP's before its down projection. The whole layer then costs one forward
pass.

    q, k, v  <- norm                                      stop: nothing but the norm has run
    o        <- attention with quantized q, k, v          kept: its input
    gate, up <- quantized o on what was kept, norm        stop, kept: what o gave, in its input's place
    down     <- quantized gate and up                     kept: its input
    output   <- quantized down on what was kept
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.errors import BadWeights
from bitladder.formats.disk_names import absorbing_parameters
from bitladder.formats.roles import SharedInput, Stop
from bitladder.walk.layers import LayeredModel, inference
from bitladder.walk.products import products
from bitladder.walk.states import Batch, States

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_STRIP = 128
"""Narrow enough that little below the diagonal is computed, wide enough for products at full speed."""
_LOUD = 64
"""Channels whose products are made in f32 beside bfloat16: they hold most of the energy, and a bfloat16 product is
rounded in proportion to itself, which must stay below the quietest directions' damping."""


@dataclass(frozen=True)
class InputStatistics:
    """What one input (of one expert) looked like over the calibration set."""

    gram: F32
    """``X^T X`` f32[columns, columns], a sum over tokens; f32[0, 0] where only squares were asked for."""
    largest: F32
    """Largest magnitude of each channel, f32[columns]; f32[0] from passes that stop."""
    squares: F64
    """Sum of squares of each channel, f64[columns]: llama.cpp's importance matrix."""
    tokens: int
    held_out: F32
    """The part of ``gram`` that comes from windows held out, of a linear layer's input; else f32[0, 0]."""
    drift: F32
    """``(R - X)^T X`` f32[columns, columns] with R the input that the source itself has there; f32[0, 0] where that
    was not asked for."""


class Sums:
    """Running sums of one input. Only the blocks of the Gram matrix on and above the diagonal are computed."""

    def __init__(
        self,
        columns: int,
        device: torch.device,
        *,
        gram: bool,
        largest: bool = True,
        half: bool = False,
        apart: bool = False,
    ) -> None:
        """``gram``, ``largest``: what is asked for besides squares. ``half``: multiply in bfloat16. ``apart``: a Gram
        matrix more, of the tokens that are held out."""
        nothing = torch.zeros(0, 0)
        self.gram = torch.zeros(columns, columns, device=device) if gram else nothing
        self._held_out = torch.zeros_like(self.gram) if apart else nothing
        self._drift = nothing
        self.largest = torch.zeros(columns if largest else 0, device=device)
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.tokens = 0
        self._half = half and columns > 4 * _LOUD

    def add(self, x: torch.Tensor, held_out: torch.Tensor | None = None) -> None:
        """Take in f32[tokens, columns]; ``held_out`` bool[tokens]."""
        if not len(x):
            return
        squares = torch.linalg.vecdot(x, x, dim=0)
        if held_out is None:
            self._multiply(x, self.gram, squares)
        else:
            self._multiply(x[~held_out], self.gram, squares)
            self._multiply(x[held_out], self._held_out, squares)
        if len(self.largest):
            torch.maximum(self.largest, x.abs().amax(dim=0), out=self.largest)
        self.squares += squares
        self.tokens += len(x)

    def add_drift(self, x: torch.Tensor, original: torch.Tensor) -> None:
        """Take in how far f32[tokens, columns] are from what the source has there."""
        if not len(self._drift):
            self._drift = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        if not self._half:
            self._drift.addmm_((original - x).T, x)
            return
        loud, short = self.squares.topk(_LOUD).indices, (original - x).T
        self._drift += short.bfloat16() @ x.bfloat16().index_fill_(1, loud, 0)
        self._drift.index_add_(1, loud, short @ x.index_select(1, loud))

    def _multiply(self, x: torch.Tensor, gram: torch.Tensor, squares: torch.Tensor) -> None:
        if self._half and len(gram):
            _add_half(gram, x, squares.topk(_LOUD).indices)
            return
        for start in range(0, len(gram), _STRIP):
            strip = x[:, start : start + _STRIP]
            gram[start : start + _STRIP, start:].addmm_(strip.T, x[:, start:])

    def result(self) -> InputStatistics:
        """The sums so far, the Gram matrices whole."""
        with inference():
            if len(self._held_out):
                self.gram += self._held_out
            _complete(self.gram)
            _complete(self._held_out)
        return InputStatistics(
            self.gram.cpu().numpy(),
            self.largest.cpu().numpy(),
            self.squares.cpu().numpy(),
            self.tokens,
            self._held_out.cpu().numpy(),
            self._drift.cpu().numpy(),
        )


def _add_half(gram: torch.Tensor, x: torch.Tensor, loud: torch.Tensor) -> None:
    """Products in bfloat16, but those of the ``loud`` channels. What lands below the diagonal is never read."""
    half = x.bfloat16().index_fill_(1, loud, 0)
    for start in range(0, len(gram), _STRIP):
        gram[start : start + _STRIP, start:] += half[:, start : start + _STRIP].T @ half[:, start:]
    products = x.index_select(1, loud).T @ x  # indexing with brackets takes six times as long
    gram.index_add_(0, loud, products)
    gram.index_add_(1, loud, products.index_fill_(1, loud, 0).T)


def _complete(gram: torch.Tensor) -> None:
    """Mirror the upper half, in place: the matrix may be as large as the layer."""
    for start in range(0, len(gram), _STRIP):
        strip = slice(start, start + _STRIP)
        corner = torch.triu(gram[strip, strip])
        gram[strip, strip] = corner + torch.triu(corner, 1).T
        gram[start + _STRIP :, strip] = gram[strip, start + _STRIP :].T


class _Reached(Exception):
    """The input that a pass was after has been seen; the rest of the layer need not run."""


class LayerPass:
    """One decoder layer of one level. ``states`` are what enters it; ``finish`` replaces them by what leaves
    it."""

    def __init__(
        self,
        model: LayeredModel,
        layer: int,
        block: nn.Module,
        states: States,
        batches: Sequence[Batch],
        *,
        spill: Path | None = None,
        half: bool = False,
    ) -> None:
        """``spill``: a folder for what is kept between passes, or None to keep it in memory. ``half``: multiply in
        bfloat16."""
        self.model, self.layer, self.block = model, layer, block
        self._states, self._batches, self._spill = states, batches, spill
        self._half = half
        self._norms = {
            shared.module.partition(".")[0]: block.get_submodule(parameter.path.removesuffix(".weight"))
            for shared in model.kind(layer).inputs
            for parameter in absorbing_parameters(model.family, shared)
            if parameter.path.count(".") == 1 and parameter.path.endswith("norm.weight")
        }
        """The norm that only the attention, or only the MLP, reads."""
        self._stops = {stop.module: stop for stop in model.kind(layer).stops}
        self._kept: dict[str, States] = {}
        self._passed: set[tuple[str, int]] = set()
        """Where a kept input, of a module and of the batch that begins there, has been replaced by the output."""

    def gather(self, shared: SharedInput, original: States | None = None) -> list[InputStatistics]:
        """Statistics of one shared input (one per expert for stacked experts); the pass ends where it is
        seen. Inputs are gathered in the order they are computed; what reads them must not change after the next
        one was gathered. ``original``: what the source itself has there, of a linear layer's input.

        Raises:
            BadWeights: the inputs are not finite.
        """
        sums: list[Sums] = []
        new = partial(Sums, gram=True, largest=False, half=self._half)
        whole = frozenset(self._kept)  # what this very pass begins to keep is there for the batches before, not after
        for batch in self._batches:
            exact = None if original is None else original.get(batch).to(self.model.device)
            watched = self._watched(shared, batch, sums, new, stop=True, original=exact)
            with inference(), products(half=self._half), self._resumed(batch, whole), watched:
                try:
                    self.model.run(self.block, self.layer, self._entering(batch))
                except _Reached:
                    continue
        return [self._checked(shared, one) for one in sums]

    def gather_all(
        self, inputs: Sequence[SharedInput], *, gram: bool = True, held_out: frozenset[int] = frozenset()
    ) -> list[list[InputStatistics]]:
        """Statistics of all inputs in one forward pass with the weights as they are, which also finishes the
        layer. Without ``gram`` only squares are summed, which costs little beside the pass. ``held_out``:
        windows that have a Gram matrix of their own, too, by their place in the list that batches were made of.

        Raises:
            BadWeights: an input is not finite.
        """
        sums: list[list[Sums]] = [[] for _ in inputs]
        for batch in self._batches:
            with inference(), products(half=self._half), ExitStack() as watching:
                for shared, own in zip(inputs, sums, strict=True):
                    apart = held_out if gram and shared.kind == "linear" else frozenset()
                    new = partial(Sums, gram=gram, half=self._half, apart=bool(apart))
                    watching.enter_context(self._watched(shared, batch, own, new, stop=False, held_out=apart))
                self._states.put(batch, self.model.run(self.block, self.layer, self._entering(batch)))
        return [[self._checked(shared, one) for one in own] for shared, own in zip(inputs, sums, strict=True)]

    def finish(self) -> None:
        """Replace the states by what leaves the layer with its present weights."""
        for batch in self._batches:
            with inference(), products(half=self._half), self._resumed(batch, frozenset(self._kept)):
                self._states.put(batch, self.model.run(self.block, self.layer, self._entering(batch)))

    def _entering(self, batch: Batch) -> torch.Tensor:
        return self._states.get(batch).to(self.model.device)

    def _checked(self, shared: SharedInput, sums: Sums) -> InputStatistics:
        result = sums.result()
        if not all(np.isfinite(found).all() for found in (result.gram, result.largest, result.squares)):
            raise BadWeights(
                f"The inputs of {shared.module} in layer {self.layer} are not finite.",
                means="Weights of this or an earlier layer overflow on the calibration text; the model is damaged.",
                do="Check the source's own answers first; a checkpoint in another precision may be sound.",
            )
        return result

    @contextmanager
    def _watched(
        self,
        shared: SharedInput,
        batch: Batch,
        sums: list[Sums],
        new: Callable[[int, torch.device], Sums],
        *,
        stop: bool,
        held_out: frozenset[int] = frozenset(),
        original: torch.Tensor | None = None,
    ) -> Iterator[None]:
        valid = torch.from_numpy(batch.valid).to(self.model.device)
        apart = torch.tensor([window in held_out for window in batch.windows], device=valid.device)
        tokens_apart = apart[:, None].expand_as(valid)[valid] if held_out else None

        def seen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]
            if shared.module in self._stops and stop:
                self._keep(shared.module, batch, x)
            for number, found in enumerate(vectors(shared.kind, module, arguments, valid.reshape(-1))):
                if number == len(sums):
                    sums.append(new(found.shape[1], found.device))
                sums[number].add(found, tokens_apart)
                if original is not None:
                    sums[number].add_drift(found, *vectors(shared.kind, module, (original,), valid.reshape(-1)))
            if stop:
                raise _Reached

        handle = self.block.get_submodule(shared.module).register_forward_pre_hook(seen)
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, module: str, batch: Batch, x: torch.Tensor) -> None:
        if module not in self._kept:
            self._kept[module] = States(self._batches, x.shape[-1], spill=self._spill)
        self._kept[module].put(batch, x)

    @contextmanager
    def _resumed(self, batch: Batch, kept: frozenset[str]) -> Iterator[None]:
        """Modules whose last linear layer's input was kept for every batch begin there."""
        begun: list[nn.Module] = []
        for stop in self._stops.values():
            if stop.module in kept:
                owner = self.block.get_submodule(stop.owner)
                owner.forward = self._from_kept(stop, batch)
                begun.append(owner)
                if norm := self._norms.get(stop.owner):  # what it would give is not read
                    norm.forward = _unchanged
                    begun.append(norm)
        try:
            yield
        finally:
            for owner in begun:
                del owner.forward

    def _from_kept(self, stop: Stop, batch: Batch) -> Callable[..., Any]:
        """A forward that only applies the last linear layer, once; attention modules return a pair."""
        path = stop.module

        def forward(*_: Any, **__: Any) -> Any:
            out = self._kept[path].get(batch).to(self.model.device)
            if (path, batch.start) not in self._passed:
                entered, out = out, self.block.get_submodule(path)(out)
                if out.shape == entered.shape:
                    self._kept[path].put(batch, out)
                    self._passed.add((path, batch.start))
            return (out, None) if stop.returns_pair else out

        return forward


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def vectors(kind: str, module: Any, arguments: tuple[Any, ...], valid: torch.Tensor) -> Iterator[torch.Tensor]:
    """What the linear layers of a shared input read in one call of its module.

    Args:
        kind: as ``formats.roles.SharedInput``.
        module: the module that is called, with ``arguments``.
        valid: bool[tokens], which positions hold a token and not padding.

    Returns:
        f32[tokens, columns]; of fused experts one after another, each with the tokens that were routed to it.
    """
    if kind == "linear":
        x = arguments[0].reshape(-1, arguments[0].shape[-1])
        yield x if bool(valid.all()) else x[valid]
        return
    states, chosen = arguments[0], arguments[1]
    for expert in range(module.num_experts):
        x = states[(chosen == expert).any(dim=-1) & valid]
        if kind == "experts_down":
            gate, up = nn.functional.linear(x, module.gate_up_proj[expert]).chunk(2, dim=-1)
            x = module.act_fn(gate) * up
        yield x
