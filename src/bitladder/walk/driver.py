"""The one loop over a model's layers: embed, load a layer, push every batch of every member through it, let observers
look, drop the layer, say where it is, keep what a resume needs.

A *member* is a model that goes through: a reference, a level whose weights exist, or one that is built while it
passes. An *observer* looks on while a member passes, and takes what was summed when the whole text has gone through a
layer. A *stream* is members that read one text and stand at the same layer: those whose weights have been equal so far
share hidden states. A *unit* is one shard of a text through one layer of a member; what a unit sums is added to the
others' in the order of shards, so that a result does not depend on which was computed first, or where.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.formats.roles import SharedInput
from bitladder.progress import Progress
from bitladder.units import MiB
from bitladder.walk.allocator import keep_freed_memory
from bitladder.walk.inputs import InputStatistics, InputWatch, Wants, merged
from bitladder.walk.keep import Arrays, Keep
from bitladder.walk.layers import Entry, Weights, inference
from bitladder.walk.products import products
from bitladder.walk.rounding import QTypeOf
from bitladder.walk.side_by_side import side_by_side
from bitladder.walk.states import Batch, Shelf, States, shards_of
from bitladder.walk.weights import LevelWeights

if TYPE_CHECKING:
    from bitladder.walk.layer_pass import Pass

_HELD_BYTES, _ACTIVE_BYTES, _ACTIVE = 256 * MiB, 512 * MiB, 4
"""Members go through a layer side by side as far as their versions of it in f32 do not outgrow this, and activations of
their batches that: so many at a time, of the layer's widest matrix."""

Seen = Mapping[SharedInput, list[InputStatistics]]
"""Statistics of a layer's inputs, one per expert for stacked experts."""


class Stages(Protocol):
    """A model as stages that hidden states pass one after another; they need not be alike."""

    embedding: str
    """The tensor that token ids are looked up in."""
    at_once: ClassVar[bool]
    """Whether a stage's module may run several batches at the same time."""

    @property
    def embedded(self) -> tuple[str, ...]:
        """The tensors that decide what enters the first stage."""

    @property
    def n_layer(self) -> int:
        """How many stages there are."""

    @property
    def device(self) -> torch.device:
        """Where arithmetic happens."""

    @property
    def width(self) -> int:
        """Of hidden states."""

    def embed(self, tokens: NDArray[np.int64], weights: Weights) -> torch.Tensor:
        """States f32[windows, n, width] that enter the first stage, of ids int64[windows, n]."""

    def layer_names(self, layer: int) -> list[str]:
        """The tensors that a stage reads: who holds them can drop them after it."""

    def outline(self, layer: int) -> nn.Module:
        """The modules of a stage without their weights: to be looked at, not run."""

    def layer(self, layer: int, weights: Weights) -> nn.Module:
        """A stage filled with weights; whoever holds it drops it before the next."""

    def inputs(self, layer: int, block: nn.Module) -> list[SharedInput]:
        """The inputs of a stage's linear modules, in the order they are computed: what can be observed in it."""

    def columns(self, layer: int, role: str) -> NDArray[np.int64] | None:
        """Where each input of the linear layer that a tensor is meets the tensor: its column. None where inputs and
        columns are in one order."""

    def entries(self, layer: int, block: nn.Module) -> list[Entry]:
        """Where a pass can begin in the middle of a stage; none where that is not known."""

    def run(self, block: nn.Module, layer: int, states: torch.Tensor) -> torch.Tensor:
        """States f32[windows, n, width] after a stage."""

    def round_inputs(self, block: nn.Module, layer: int, qtype_of: QTypeOf) -> None:
        """Make a stage round what its linear modules read as llama.cpp does beside weights of these types."""


class Resumable:
    """What is made while a walk goes on, and where it is when the walk goes on after a kill."""

    @property
    def news(self) -> str:
        """What a line of progress says of it: its name, how the last layer went."""
        return ""

    def holds(self, layers: int) -> bool:  # noqa: ARG002
        """Whether what was made of the first ``layers`` layers is still there."""
        return True

    def resume(self, layers: int, arrays: Arrays) -> None:
        """Go on after ``layers`` layers: forget what was made of later ones, take back ``arrays``."""

    def arrays(self) -> Arrays:
        """What is kept beside the states, of that which lies in no file of its own."""
        return {}


class Observer(Resumable):
    """Looks on while a member passes a layer; by default at nothing."""

    wants = Wants()
    reads_weights = True
    """Whether ``take`` looks at the block's weights: where units are computed elsewhere, nobody else needs them here.
    """

    def reads(self, shared: SharedInput) -> bool:  # noqa: ARG002
        """Whether it takes statistics of this input."""
        return False

    def on(self, layer: int, block: nn.Module, batch: Batch) -> AbstractContextManager[object]:  # noqa: ARG002
        """Hooks of its own, for the time that a batch takes."""
        return nullcontext()

    def keeps(self, layer: int, block: nn.Module) -> list[str]:  # noqa: ARG002
        """Modules whose inputs it keeps by its hooks: where units are computed elsewhere, these are kept there."""
        return []

    def kept(self, inputs: Mapping[str, HeldInputs]) -> None:
        """What was kept elsewhere of what somebody ``keeps``, by module."""

    def take(self, layer: int, block: nn.Module, seen: Seen) -> None:
        """The whole text has gone through a layer. ``block`` is left as it is found."""


class Member(Resumable):
    """A model that goes through the layers with the weights that it has."""

    def __init__(self, weights: LevelWeights, observers: Sequence[Observer] = (), *, rounding: bool = False) -> None:
        """``rounding``: round what matrices read as llama.cpp does (``rounding.py``)."""
        self.weights, self.observers, self._rounding = weights, observers, rounding

    def load(self, stages: Stages, layer: int) -> nn.Module:
        """Its version of a layer."""
        block = stages.layer(layer, self.weights)
        if self._rounding:
            stages.round_inputs(block, layer, self.weights.qtype)
        return block


class Builder(Member, ABC):
    """A level whose weights come to be while it passes: its states are its own from the first layer on."""

    @abstractmethod
    def build(self, stream: Stream, layer: int, states: States) -> None:
        """Make a layer and replace the states that enter it by those that leave it."""


class HeldInputs(Protocol):
    """Inputs of some modules of a layer, held where units are computed."""


class Spread(Protocol):
    """Computes a stream's units elsewhere (``spread.py``)."""

    def hold(self, states: States, shards: Sequence[Sequence[Batch]]) -> States:
        """States that are held where units are computed, shard by shard."""

    def empty(self, like: States) -> States:
        """Such states with undefined contents."""

    def through(
        self, stream: Stream, layer: int, observers: Sequence[Observer], watched: Watched, entering: States,
        leaving: States,
    ) -> Iterator[InputWatch]:  # fmt: skip
        """Do all units of a layer with the source's weights; gives what was seen of each shard, in their order."""

    def expect(self, stream: Stream, layer: int, watched: Watched, entering: States) -> None:
        """What ``through`` will be asked for next: it may begin where workers would have to wait."""

    def passing(self, stream: Stream, layer: int, states: States) -> Pass:
        """Passes through a layer that is built."""


@dataclass(frozen=True)
class Watched:
    """What of a layer someone wants to see."""

    inputs: Sequence[SharedInput]
    wants: Wants
    keeps: Sequence[str]


@dataclass(frozen=True)
class Unit:
    """One shard of a stream's text through one layer of a member, and of those alike so far: the smallest piece of
    work, that could be computed anywhere. Units of a layer depend on nothing of one another."""

    layer: int
    member: int
    shard: int


@dataclass
class MemberGroup:
    """Members that have shared all weights so far, by their numbers, and their states."""

    members: list[int]
    states: States


@dataclass
class _Passage:
    """Members on their way through one layer, and their version of it while batches are still to go."""

    members: list[int]
    entering: States
    leaving: States
    block: nn.Module | None = None
    left: int = 0


class Stream:
    """Members that read one text and stand at the same layer; what is kept for a resume is kept of all at once."""

    def __init__(
        self,
        stages: Stages,
        members: Sequence[Member],
        batches: Sequence[Batch],
        *,
        state_bytes: int,
        spill: Path | None = None,
        keep: Keep | None = None,
        half: bool = False,
        shards: int = 1,
        remember: bool = False,
        back: bool = False,
        spread: Spread | None = None,
    ) -> None:
        """
        Args:
            stages: the model's layers.
            members: who goes through.
            batches: the text.
            state_bytes: hidden states beyond this go to files in ``spill``.
            spill: a folder; the system's for temporary files by default.
            keep: what makes it go on after a kill.
            half: multiply in bfloat16 (``products.py``).
            shards: into how many units a layer is cut.
            remember: leave the states that entered each layer in ``entered``, for a way back.
            back: it goes from the last layer to the first.
            spread: computes units elsewhere, with the weights of ``stages``' own file; None: here, in their order.
        """
        self.stages, self.members, self.batches, self.half = stages, members, batches, half
        self.shards = shards_of(batches, shards)
        self.shelf = Shelf(batches, stages.width, budget_bytes=state_bytes, folder=spill)
        self.groups: list[MemberGroup] = []
        self.entered: list[States] = []
        self.layer = stages.n_layer if back else 0
        """The layer that its states enter, or with ``back`` have left."""
        self._keep, self._remember, self._back = keep, remember, back
        self.spread = spread

    @property
    def resumables(self) -> list[Resumable]:
        """Members and their observers."""
        return [one for member in self.members for one in (member, *member.observers)]

    @property
    def news(self) -> list[str]:
        """Of those that have any."""
        return [one.news for one in self.resumables if one.news]

    def enter(self) -> None:
        """Fill the states with what enters the first layer to do: what an earlier walk left, or the embeddings."""
        tokens = sum(batch.tokens.size for batch in self.batches)
        kept = self._keep.load(tokens, self.stages.width) if self._keep else None
        if kept and all(one.holds(kept.layer) for one in self.resumables):
            self.layer = kept.layer
            self.groups = [MemberGroup(members, self.shelf.take()) for members in kept.groups]
            for number, group in enumerate(self.groups):
                kept.restore(number, group.states)
        else:
            kept = None
            self.groups = [MemberGroup(members, self.shelf.take()) for members in self._embedded_alike()]
            for group in self.groups:
                weights = self.members[group.members[0]].weights
                for batch in self.batches:
                    group.states.put(batch, self.stages.embed(batch.tokens, weights))
                for name in self.stages.embedded:
                    weights.forget(name)
        if self.spread is not None:
            for group in self.groups:
                group.states = self.spread.hold(group.states, self.shards)
        for number, one in enumerate(self.resumables):
            one.resume(self.layer, kept.of(number) if kept else {})

    def has_passed(self, layer: int) -> bool:
        """Whether a layer is done, by this walk or an earlier one."""
        return layer >= self.layer if self._back else layer < self.layer

    def through(self, layer: int) -> None:
        """Push every group through a layer; groups fall apart into such that still share everything."""
        groups: list[MemberGroup] = []
        beside: list[_Passage] = []
        for group in self.groups:
            parts = list(self._alike(group.members, layer))
            for number, members in enumerate(parts):
                # The last part to go may overwrite the states that all parts start from.
                last = number == len(parts) - 1 and not self._remember
                states = group.states if last else self._room(group.states)
                if self._only_passes(members):
                    beside.append(_Passage(members, group.states, states))
                else:
                    self._pass(layer, members, group.states, states)
                groups.append(MemberGroup(members, states))
        self._side_by_side(layer, beside)
        if self._remember:
            self.entered.append(self.groups[0].states)
        self.groups, self.layer = groups, layer if self._back else layer + 1
        if self._keep and self._keep.due():
            owned = [one.arrays() for one in self.resumables]
            self._keep.save(self.layer, [(group.members, group.states) for group in groups], owned)

    def compute(
        self, unit: Unit, block: nn.Module, observers: Sequence[Observer], entering: States, leaving: States
    ) -> InputWatch:
        """Do a unit; returns what was seen of its shard. ``leaving`` may be ``entering``."""
        watched = self._watched(unit.layer, block, observers)
        watch = InputWatch(watched.inputs, watched.wants, half=self.half)
        for batch in self.shards[unit.shard]:
            with inference(), products(half=self.half), ExitStack() as looking:
                looking.enter_context(watch.on(block, batch))
                for one in observers:
                    looking.enter_context(one.on(unit.layer, block, batch))
                out = self.stages.run(block, unit.layer, entering.get(batch).to(self.stages.device))
                leaving.put(batch, out)
        return watch

    def states_of(self, member: int) -> States:
        """What has left the last layer of a member that went by."""
        return next(group.states for group in self.groups if member in group.members)

    def finished(self) -> None:
        """What the walk was for is done: nothing needs to be kept for a resume."""
        if self._keep:
            self._keep.done()

    def _only_passes(self, members: Sequence[int]) -> bool:
        """Whether nobody looks on or builds, so that the order of units does not matter."""
        plain = not any(isinstance(self.members[one], Builder) or self.members[one].observers for one in members)
        return plain and self.spread is None and self.stages.at_once and self.stages.device.type == "cpu"

    def _side_by_side(self, layer: int, passages: Sequence[_Passage]) -> None:
        """Push batches of all passages through a layer; those that overwrite what others read come last."""
        if not passages:
            return
        loading, shapes = Lock(), [one.shape for one in self.stages.outline(layer).parameters()]
        held = max(1, _HELD_BYTES // (4 * sum(math.prod(shape) for shape in shapes)))
        widest = max(size for shape in shapes for size in shape[-2:])
        most = max(1, _ACTIVE_BYTES // (_ACTIVE * 4 * widest * max(batch.tokens.size for batch in self.batches)))

        def push(unit: tuple[_Passage, Batch]) -> None:
            passage, batch = unit
            with loading:
                if passage.block is None:
                    passage.block = self.members[passage.members[0]].load(self.stages, layer)
                block = passage.block
            with inference(), products(half=self.half):
                passage.leaving.put(batch, self.stages.run(block, layer, passage.entering.get(batch)))
            with loading:
                passage.left -= 1
                if not passage.left:
                    passage.block = None

        for overwriting in (False, True):
            some = [one for one in passages if (one.leaving is one.entering) == overwriting]
            for few in (some[at : at + held] for at in range(0, len(some), held)):
                for one in few:
                    one.left = len(self.batches)
                units = [(one, batch) for one in few for batch in self.batches]
                side_by_side(push, units, sizes=[batch.tokens.size for _, batch in units], most=most)

    def _pass(self, layer: int, members: Sequence[int], entering: States, leaving: States) -> None:
        lead = self.members[members[0]]
        if isinstance(lead, Builder):
            if leaving is not entering:
                leaving.copy_from(entering)
            lead.build(self, layer, leaving)
            return
        observers = [one for member in members for one in self.members[member].observers]
        needed = self.spread is None or any(one.reads_weights for one in observers)
        block = lead.load(self.stages, layer) if needed else self.stages.outline(layer)
        if self.spread is not None:
            watched = self._watched(layer, block, observers)
            parts = self.spread.through(self, layer, observers, watched, entering, leaving)
        else:
            units = (Unit(layer, members[0], shard) for shard in range(len(self.shards)))
            parts = (self.compute(unit, block, observers, entering, leaving) for unit in units)
        seen = merged(parts).results(layer)
        for one in observers:
            one.take(layer, block, {shared: found for shared, found in seen.items() if one.reads(shared)})
        if self.spread is not None and layer + 1 < self.stages.n_layer:
            watched = self._watched(layer + 1, self.stages.outline(layer + 1), observers)
            self.spread.expect(self, layer + 1, watched, leaving)

    def _watched(self, layer: int, block: nn.Module, observers: Sequence[Observer]) -> Watched:
        inputs = [shared for shared in self.stages.inputs(layer, block) if any(one.reads(shared) for one in observers)]
        wants = reduce(or_, (one.wants for one in observers), Wants())
        return Watched(inputs, wants, [module for one in observers for module in one.keeps(layer, block)])

    def _room(self, like: States) -> States:
        return self.shelf.take() if self.spread is None else self.spread.empty(like)

    def _alike(self, members: Sequence[int], layer: int) -> Iterator[list[int]]:
        """Members whose version of a layer is the same, together; builders each alone."""
        names = self.stages.layer_names(layer)
        plain = {id(self.members[one].weights) for one in members if not isinstance(self.members[one], Builder)}

        def key(one: int) -> Hashable:
            member = self.members[one]
            if isinstance(member, Builder):
                return one
            return tuple(member.weights.identity(name) for name in names) if len(plain) > 1 else ()

        return iter(split(members, key))

    def _embedded_alike(self) -> list[list[int]]:
        everyone = range(len(self.members))
        if len({id(member.weights) for member in self.members}) == 1:
            return [list(everyone)]
        names = self.stages.embedded
        return split(everyone, lambda one: tuple(self.members[one].weights.identity(name) for name in names))


def split(members: Sequence[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Members with equal keys together, in order."""
    parts: dict[Hashable, list[int]] = {}
    for member in members:
        parts.setdefault(key(member), []).append(member)
    return list(parts.values())


def forward(streams: Sequence[Stream], progress: Progress, title: str = "", *, stop: int | None = None) -> None:
    """Take streams of one model through its layers, from wherever an earlier walk left each of them.

    Args:
        streams: of the same stages.
        progress: told before each layer of each stream, in layers.
        title: what progress begins with.
        stop: the first layer that is left out; None for all.

    Raises:
        BadFile, BadWeights: a tensor is missing, misshapen or not finite, or activations are not.
        OutputError: no room for hidden states.
    """
    for stream in streams:
        stream.enter()
    first = min((stream.layer for stream in streams), default=0)
    n_layer = streams[0].stages.n_layer if streams else 0
    _sweep(streams, range(first, n_layer if stop is None else stop), progress, title)


def backward(stream: Stream, progress: Progress, title: str = "") -> None:
    """The second sweep: the same units from the last layer to the first. The stream has its groups already."""
    _sweep([stream], range(stream.layer - 1, -1, -1), progress, title)


def _sweep(streams: Sequence[Stream], layers: range, progress: Progress, title: str) -> None:
    keep_freed_memory()
    for layer in layers:
        for stream in streams:
            n_layer, news = stream.stages.n_layer, ", ".join(stream.news)
            progress(f"{title}layer {layer + 1} of {n_layer}{': ' if news else ''}{news}", layer, n_layer)
            if not stream.has_passed(layer):
                stream.through(layer)
        for weights in {id(member.weights): member.weights for one in streams for member in one.members}.values():
            for name in streams[0].stages.layer_names(layer):
                weights.forget(name)
