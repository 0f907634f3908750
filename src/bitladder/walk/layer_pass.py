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

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import nn

from bitladder.formats.roles import SharedInput
from bitladder.walk.coding import Bench, Coder, groups_of, shares_of
from bitladder.walk.driver import HeldInputs, Stream
from bitladder.walk.inputs import InputWatch, Wants, merged
from bitladder.walk.layers import Entry, LayeredModel, inference
from bitladder.walk.products import products
from bitladder.walk.states import Batch, States
from bitladder.walk.weights import LevelWeights

Original = States | HeldInputs
"""What the source has as an input: here, or where units are computed."""


class _Reached(Exception):
    """The input that a pass was after has been seen; the rest of the layer need not run."""


class Pass(Protocol):
    """A layer of a level that is built while it passes, wherever its units are computed."""

    def code(self, coder: Coder, original: Original | None = None) -> Iterator[Any]:
        """Gather what an input looks like, choose the codes of all that reads it, and put them into the layer. Inputs
        are taken in the order they are computed, each once.

        Args:
            coder: of that input.
            original: what the source itself has there, of a linear layer's input.

        Returns:
            What the coder says of each share, in their order.

        Raises:
            BadWeights: inputs or weights are not finite.
        """

    def finish(self) -> None:
        """As ``LayerPass``."""


def passing(stream: Stream, layer: int, block: nn.Module, states: States, weights: LevelWeights) -> Pass:
    """Passes through a layer of a level that is built, where the stream's units are computed. ``weights``: what coders
    read beside the block."""
    if stream.spread is not None:
        return stream.spread.passing(stream, layer, states)
    return LayerPass(stream, layer, block, states, weights)


class LayerPass:
    """One decoder layer of one level that is built while it passes. ``states`` are what enters it; ``finish`` replaces
    them by what leaves it."""

    def __init__(
        self, stream: Stream, layer: int, block: nn.Module, states: States, weights: LevelWeights | None = None
    ) -> None:
        """What is kept between passes goes to files beyond what hidden states leave of the stream's ``state_bytes``.
        ``weights``: for coders."""
        self._stream, self._layer, self._block, self._states = stream, layer, block, states
        self._weights = weights or stream.members[0].weights
        self._room = stream.shelf.room.rest()
        self._entries = {one.linear: one for one in stream.stages.entries(layer, block)}
        self._kept: dict[str, States] = {}
        self._passed: set[tuple[str, int]] = set()
        """Where a kept input, of a module and of the batch that begins there, has been replaced by the output."""

    def code(self, coder: Coder, original: Original | None = None) -> Iterator[Any]:
        """As ``Pass``."""
        shared = coder.shared
        assert isinstance(self._stream.stages, LayeredModel)
        bench = Bench(self._stream.stages, self._weights, lambda: self._block)
        groups, changes = groups_of(bench.model.model, self._layer, shared), list[Any]()
        peak = None
        if coder.reads_peak and len(groups) > 1:
            peak = self.gather(shared, None, Wants(largest=True), None).peak(shared)
        for experts in groups:
            seen = self.gather(shared, original, Wants(gram=True, largest=coder.reads_peak), experts)
            if coder.reads_peak and len(groups) == 1:
                peak = seen.peak(shared)
            [share] = shares_of(coder.readers, experts, 1)
            answer, change = coder.code(bench, share, seen.statistics(self._layer, shared, slice(None)), peak)
            del seen
            changes.append(change)
            if coder.piecewise:  # decoded weights of hundreds of experts are as large as the layer
                coder.fill(bench, changes)
                changes.clear()
            yield answer
        if changes:
            coder.fill(bench, changes)

    def gather(
        self, shared: SharedInput, original: Original | None, wants: Wants, experts: range | None = None
    ) -> InputWatch:
        """Sums over one shared input (of some experts of a stack; by default all); the pass ends where it is seen.
        Inputs are gathered in the order they are computed; what reads them must not change after the next one was
        gathered. ``original``: what the source itself has there, of a linear layer's input."""
        whole = frozenset(self._kept)  # what this very pass begins to keep is there for the batches before, not after
        assert original is None or isinstance(original, States)
        return merged(self.see(shared, shard, whole, original, wants, experts) for shard in self._stream.shards)

    def see(
        self,
        shared: SharedInput,
        shard: Sequence[Batch],
        whole: frozenset[str],
        original: States | None,
        wants: Wants,
        experts: range | None = None,
    ) -> InputWatch:
        """What a shard shows of an input, as ``gather``. ``whole``: the modules whose input was kept by passes
        before."""
        watch = InputWatch([shared], wants, half=self._stream.half, experts=experts)

        def looking(batch: Batch) -> AbstractContextManager[object]:
            exact = None if original is None else original.get(batch).to(self._stream.stages.device)
            return watch.on(self._block, batch, exact)

        self.go_to(shared, shard, whole, looking)
        return watch

    def keeps(self, shared: SharedInput) -> bool:
        """Whether what a pass up to this input finds there is kept."""
        return shared.kind == "linear" and shared.module in self._entries

    def see_kept(
        self, shared: SharedInput, shard: Sequence[Batch], original: States | None, wants: Wants
    ) -> InputWatch:
        """As ``see``, of an input that a pass went up to before; no parameter is read."""
        watch, module = InputWatch([shared], wants, half=self._stream.half), self._block.get_submodule(shared.module)
        device = self._stream.stages.device
        for batch in shard:
            exact = None if original is None else original.get(batch).to(device)
            with inference():
                watch.take(shared, module, batch, self._kept[shared.module].get(batch).to(device), exact)
        return watch

    def go_to(
        self,
        shared: SharedInput,
        shard: Sequence[Batch],
        whole: frozenset[str],
        looking: Callable[[Batch], AbstractContextManager[object]],
    ) -> None:
        """Pass up to an input, with hooks of the caller's for each batch. Otherwise as ``see``."""
        for batch in shard:
            with inference(), self._begun(batch, whole), looking(batch), self._end(shared, batch), suppress(_Reached):
                self._run(batch)

    @property
    def progress(self) -> tuple[dict[str, States], set[tuple[str, int]]]:
        """What is kept between passes: inputs, and which of them have been replaced by outputs."""
        return self._kept, self._passed

    def go_on(self, kept: Mapping[str, States], passed: Collection[tuple[str, int]]) -> None:
        """Take up what another pass over the same text kept."""
        self._kept, self._passed = dict(kept), set(passed)

    def runs(self, shared: SharedInput | None) -> list[str]:
        """The block's parameters that a pass up to an input reads, or one to the end: neither what reads this input and
        later ones, nor what has gone by and is kept."""
        stages = self._stream.stages
        assert isinstance(stages, LayeredModel)
        inputs = stages.inputs(self._layer, self._block)
        later = [] if shared is None else inputs[inputs.index(shared) :]
        linear = [one for one in later if one.kind == "linear"]  # a stack's inputs are found with its weights
        roles = {role for one in linear for role in one.roles}
        readers = [one.path for one in stages.family.parameters if roles.intersection(one.roles)]
        left = [*(one.module for one in linear), *(path.rpartition(".")[0] for path in readers)]
        begun = [entry for entry in self._entries.values() if entry.linear in self._kept]
        batches = {batch.start for batch in self._stream.batches}

        def is_run(path: str) -> bool:
            if any(_within(path, module) for module in left):
                return False
            for entry in begun:
                if _within(path, entry.module):
                    passed = {start for linear, start in self._passed if linear == entry.linear} >= batches
                    return _within(path, entry.linear) and not passed
            return True

        return [path for path, _ in self._block.named_parameters() if is_run(path)]

    def finish(self) -> None:
        """Replace the states by what leaves the layer with its present weights."""
        for batch in self._stream.batches:
            with inference(), self._begun(batch, frozenset(self._kept)):
                self._states.put(batch, self._run(batch))

    def _run(self, batch: Batch) -> torch.Tensor:
        stages = self._stream.stages
        with products(half=self._stream.half):
            return stages.run(self._block, self._layer, self._states.get(batch).to(stages.device))

    @contextmanager
    def _end(self, shared: SharedInput, batch: Batch) -> Iterator[None]:
        """The pass ends at an input, which is kept where a later one can begin there."""

        def reached(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if shared.module in self._entries:
                self._keep(shared.module, batch, arguments[0])
            raise _Reached

        handle = self._block.get_submodule(shared.module).register_forward_pre_hook(reached)
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, module: str, batch: Batch, x: torch.Tensor) -> None:
        if module not in self._kept:
            self._kept[module] = self._room.states(self._stream.batches, x.shape[-1])
        self._kept[module].put(batch, x)

    @contextmanager
    def _begun(self, batch: Batch, kept: frozenset[str]) -> Iterator[None]:
        """Modules whose last linear layer's input was kept for every batch begin there."""
        begun: list[nn.Module] = []
        for entry in self._entries.values():
            if entry.linear in kept:
                owner = self._block.get_submodule(entry.module)
                owner.forward = self._from_kept(entry, batch)
                begun.append(owner)
                if entry.norm is not None:  # what it would give is not read
                    norm = self._block.get_submodule(entry.norm)
                    norm.forward = _unchanged
                    begun.append(norm)
        try:
            yield
        finally:
            for owner in begun:
                del owner.forward

    def _from_kept(self, entry: Entry, batch: Batch) -> Callable[..., Any]:
        """A forward that only applies the last linear layer, once."""
        path = entry.linear

        def forward(*_: Any, **__: Any) -> Any:
            out = self._kept[path].get(batch).to(self._stream.stages.device)
            if (path, batch.start) not in self._passed:
                entered, out = out, self._block.get_submodule(path)(out)
                if out.shape == entered.shape:
                    self._kept[path].put(batch, out)
                    self._passed.add((path, batch.start))
            return (out, None) if entry.pair else out

        return forward


def _within(path: str, module: str) -> bool:
    return path.startswith(f"{module}.")


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x
