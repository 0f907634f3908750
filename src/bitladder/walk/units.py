"""Units of a walk, and how they are computed wherever that is: on a device, in a worker of a cluster.

A worker opens the model where it lies (or is sent a layer's tensors, where it cannot read the file), fills a layer,
and pushes a shard of the text through it with the code that a walk here uses.

    through   a shard through a layer as the source has it      -> sums; states that leave it, inputs that are kept
    gather    a shard up to one shared input                    -> sums; what the next pass begins with
    add       two shards' sums                                  -> their sum
    code      some of the matrices that read the input          -> what is stored of them; what they decode to
    finish    a shard through what is left of the layer         -> states that leave it
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.describe.model import Model
from bitladder.executors.base import Lane
from bitladder.executors.limits import Limits
from bitladder.files.gguf import GgufFile
from bitladder.formats.roles import SharedInput
from bitladder.formats.tensors import TensorInfo
from bitladder.walk.allocator import give_freed_memory_back, keep_freed_memory
from bitladder.walk.coding import Bench, Coder, Share
from bitladder.walk.driver import Member, Observer, Stream, Unit, Watched
from bitladder.walk.inputs import InputWatch, Wants, keeping, readable
from bitladder.walk.layer_pass import LayerPass
from bitladder.walk.layers import LayeredModel, tensor_at
from bitladder.walk.opened import layered
from bitladder.walk.states import Batch, States
from bitladder.walk.weights import FileWeights, Rows
from bitladder.walk.whole import WholeModel

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

KEPT_BYTES = 256 * 1024**2
"""Of a layer's weights in f32: of a larger one a worker has only what the unit at hand needs."""
_ALL = 1 << 62
"""Bytes of states in memory: a worker has those of a shard only."""


@dataclass(frozen=True)
class ModelAt:
    """Where workers find a model."""

    path: str
    checkpoint: str | None
    changed: int
    """When the file was, as the system counts it."""
    sent: Model | None = None
    """Its header, where they cannot read the file: tensors come with units."""
    tables: Mapping[str, U8] = field(default_factory=dict)
    """The tensors that a header without a file lacks before the first layer."""


@dataclass(frozen=True)
class Changed:
    """Readers of an input that have their final values."""

    coder: Coder
    count: int
    """Of changes that come, one for each share."""


@dataclass(frozen=True)
class AddUnit:
    """Two shards' sums."""


@dataclass(frozen=True)
class CodeUnit:
    """The codes of a share of what reads an input."""

    layer: int
    of: str
    coder: Coder
    share: Share
    summed: range | None
    """Experts that the sums that come are of."""
    peak: float | None
    """Of all experts; None where the sums that come tell."""
    changes: tuple[Changed, ...]


@dataclass(frozen=True)
class LayerUnit:
    """One shard's part of a layer."""

    layer: int
    batches: tuple[Batch, ...]
    """Of the shard, laid out from 0."""
    half: bool
    of: str
    """Whose layer it is: levels change it each in their own way."""
    watched: Watched | None = None
    shared: SharedInput | None = None
    wants: Wants | None = None
    module: str = ""
    """Whose input of the source comes as well."""
    experts: range | None = None
    """Of a stack, whose sums are asked for; all by default."""
    changes: tuple[Changed, ...] = ()
    """What of the layer is not the source's any more: values come as well."""


@dataclass(frozen=True)
class Held:
    """What stays of a unit: arrays f32[tokens, columns] of a shard."""

    states: F32 | None = None
    inputs: Mapping[str, F32] = field(default_factory=dict)
    """What modules read, by path."""
    passed: frozenset[tuple[str, int]] = frozenset()
    """As ``LayerPass.progress``."""


@dataclass(frozen=True)
class LayerTask:
    """Units of a model's layers, for an executor."""

    model: ModelAt
    limits: Limits
    """In every unit."""

    @property
    def threads(self) -> int:
        """As ``executors.Task``."""
        return self.limits.threads

    def compute(self, lane: Lane, unit: LayerUnit | AddUnit | CodeUnit, *held: Any) -> tuple[Any, Any]:
        """As ``executors.Task``. ``held`` of a shard's unit: the states that enter, what passes kept, the source's
        inputs (both of one unit, or None); of a share of codes: the sums. Then changes in their order, and the layer's
        tensors where they are sent. Two sums to be added are all that comes."""
        if lane.own_process:
            self.limits.hold()
        if isinstance(unit, AddUnit):
            first, later = held
            added = first.borrowed()
            added.merge(later)
            return added, None
        worker = _worker(lane, self.model)
        own, rest = (held[:1], held[1:]) if isinstance(unit, CodeUnit) else (held[:3], held[3:])
        if self.model.sent:
            worker.take(rest[-1])
        if isinstance(unit, CodeUnit):
            return worker.coded(unit, rest, own[0], self.threads)
        return worker.done(unit, rest, *own)


class _Sent:
    """What ``FileWeights`` reads, of tensors that were sent."""

    def __init__(self, at: ModelAt) -> None:
        assert at.sent is not None
        self.model, self.path = at.sent, Path(at.path)
        self.tensors: dict[str, U8] = dict(at.tables)
        self._infos = {tensor.name: tensor for tensor in at.sent.tensors}

    def info(self, name: str) -> TensorInfo:
        """As ``GgufFile``."""
        return self._infos[name]

    def raw(self, name: str, rows: Rows = None) -> U8:
        """As ``GgufFile``."""
        return self.tensors[name] if rows is None else self.tensors[name][rows]


class _Worker:
    """A model that is open in a lane, and the layer that units were computed with last."""

    def __init__(self, at: ModelAt, device: str) -> None:
        file = cast("GgufFile", _Sent(at)) if at.sent else GgufFile.open(Path(at.path))
        self._file, self.weights = file, FileWeights(file)
        folder = Path(at.checkpoint) if at.checkpoint else None
        if at.sent:
            self.model = LayeredModel(at.sent, self.weights, device=device)
        else:
            self.model = layered(file, self.weights, device=device, checkpoint=folder)
        self._of: tuple[int, str] | None = None
        self._block: nn.Module | None = None
        self._filled: set[str] = set()
        self._changed = 0
        self._whole = isinstance(self.model, WholeModel)
        """Whether a layer is always filled as a whole."""

    def close(self) -> None:
        """The model's file is not read any more."""
        if isinstance(self._file, GgufFile):
            self._file.close()

    def take(self, tensors: Mapping[str, U8]) -> None:
        """A layer's tensors as they are stored, where they are sent."""
        cast(_Sent, self._file).tensors = dict(tensors)

    def block(self, unit: LayerUnit | CodeUnit) -> nn.Module:
        """The layer that a unit is about, as far as it is filled."""
        of = unit.layer, unit.of
        if self._block is None or self._of != of or self._changed > len(unit.changes):
            self._block = None  # room for the next
            self._block, self._of, self._filled, self._changed = self.model.empty(unit.layer), of, set(), 0
            if self._whole:
                self._block = self.model.layer(unit.layer, self.weights)
                self._filled = {path for path, _ in self._block.named_parameters()}
        return self._block

    def fill(self, unit: LayerUnit | CodeUnit, values: Sequence[Any], paths: Collection[str]) -> nn.Module:
        """The layer with these parameters, and the changes that came of them; what was filled before is not read again.
        Of a large layer what is not asked for is let go of."""
        block, layer = self.block(unit), unit.layer
        if self._is_large(block):
            for path in [path for path, value in block.named_parameters() if not value.is_meta and path not in paths]:
                owner, _, leaf = path.rpartition(".")
                gone = nn.Parameter(torch.empty_like(tensor_at(block, path), device="meta"), requires_grad=False)
                setattr(block.get_submodule(owner), leaf, gone)
            self._filled &= set(paths)
            give_freed_memory_back()
        missing = set(paths) - self._filled
        if missing:
            self.model.fill(block, layer, self.weights, missing)
            self._filled |= missing
            for name in self.model.layer_names(layer):
                self.weights.forget(name)
        at = 0
        for number, one in enumerate(unit.changes):
            own = one.coder.paths(self.model)
            if missing.intersection(own) or (number >= self._changed and self._filled.intersection(own)):
                bench = Bench(self.model, self.weights, lambda: block)
                one.coder.fill(bench, values[at : at + one.count])
            at += one.count
        self._changed = len(unit.changes)
        return block

    def _is_large(self, block: nn.Module) -> bool:
        return sum(value.numel() for value in block.parameters()) * 4 > KEPT_BYTES and not self._whole

    def _in_parts(
        self, stream: Stream, block: nn.Module, unit: LayerUnit, watched: Watched, entering: Held
    ) -> tuple[InputWatch, Held]:
        """As ``_through``, where nothing is summed: from input to input, with the parameters that a stretch reads."""
        states = _states(unit.batches, entering.states)
        passing, keeper = LayerPass(stream, unit.layer, block, states), _Keeper(stream.batches, watched)
        for shared in self.model.inputs(unit.layer, block):
            if shared.kind != "linear":
                continue
            self.fill(unit, (), passing.runs(shared))
            begun, _ = passing.progress
            hooks = partial(keeper.hooks, block, [shared.module])
            passing.go_to(shared, unit.batches, frozenset(begun), hooks)
        self.fill(unit, (), passing.runs(None))
        passing.finish()
        return InputWatch((), watched.wants), Held(_array(states), keeper.arrays())

    def coded(self, unit: CodeUnit, values: Sequence[Any], summed: InputWatch, threads: int) -> tuple[Any, Any]:
        """Choose codes."""
        coder, own = unit.coder, summed.borrowed()
        peak = own.peak(coder.shared) if coder.reads_peak and unit.peak is None else unit.peak
        some = slice(None)
        if unit.share.experts is not None:
            assert unit.summed is not None
            some = slice(unit.share.experts.start - unit.summed.start, unit.share.experts.stop - unit.summed.start)
        bench = Bench(self.model, self.weights, partial(self.fill, unit, values, coder.paths(self.model)), threads)
        self.fill(unit, values, ())  # the factor may need the room
        return coder.code(bench, unit.share, own.statistics(coder.layer, coder.shared, some), peak)

    def done(
        self, unit: LayerUnit, values: Sequence[Any], entering: Held, kept: Held | None, source: Held | None
    ) -> tuple[InputWatch | None, Held]:
        """Compute a shard's unit. ``values``: of changes."""
        stream = Stream(self.model, [Member(self.weights)], unit.batches, state_bytes=_ALL, half=unit.half)
        block = self.block(unit)
        if unit.watched is not None:
            if self._is_large(block) and not unit.watched.inputs and self.model.entries(unit.layer, block):
                return self._in_parts(stream, block, unit, unit.watched, entering)
            self.fill(unit, values, [path for path, _ in block.named_parameters()])
            assert entering.states is not None
            return _through(stream, block, unit, unit.watched, States.around(readable(entering.states)))
        states = _states(unit.batches, entering.states)
        passing = LayerPass(stream, unit.layer, block, states)
        if kept is not None:
            own = {module: _states(unit.batches, one) for module, one in kept.inputs.items()}
            passing.go_on(own, kept.passed)
        self.fill(unit, values, passing.runs(unit.shared))
        if unit.shared is None:
            passing.finish()
            return None, Held(_array(states))
        assert unit.wants is not None
        begun, passed = passing.progress
        original = None if source is None else _states(unit.batches, source.inputs[unit.module])
        if self._is_large(block) and passing.keeps(unit.shared):
            passing.go_to(unit.shared, unit.batches, frozenset(begun), nullcontext)
            self.fill(unit, values, ())  # sums may need the room
            watch = passing.see_kept(unit.shared, unit.batches, original, unit.wants)
        else:
            watch = passing.see(unit.shared, unit.batches, frozenset(begun), original, unit.wants, unit.experts)
        begun, passed = passing.progress
        inputs = {module: _array(one) for module, one in begun.items()}
        return watch.on_the_cpu(), Held(inputs=inputs, passed=frozenset(passed))


def _through(
    stream: Stream, block: nn.Module, unit: LayerUnit, watched: Watched, entering: States
) -> tuple[InputWatch, Held]:
    keeper = _Keeper(stream.batches, watched)
    leaving = States(stream.batches, entering.width, spill=None)
    watch = stream.compute(Unit(unit.layer, 0, 0), block, [keeper], entering, leaving)
    return watch.on_the_cpu(), Held(_array(leaving), keeper.arrays())


class _Keeper(Observer):
    """Watches what several observers elsewhere want to see, and keeps inputs."""

    def __init__(self, batches: Sequence[Batch], watched: Watched) -> None:
        self._batches, self._watched, self.wants = batches, watched, watched.wants
        self.inputs: dict[str, States] = {}

    def reads(self, shared: SharedInput) -> bool:
        """As ``Observer``."""
        return shared in self._watched.inputs

    def on(self, layer: int, block: nn.Module, batch: Batch) -> Any:  # noqa: ARG002
        """As ``Observer``."""
        return self.hooks(block, self._watched.keeps, batch)

    def hooks(self, block: nn.Module, modules: Sequence[str], batch: Batch) -> Any:
        """Keeps what those of some modules read that somebody wants."""
        return keeping(block, [one for one in modules if one in self._watched.keeps], batch, self._put)

    def arrays(self) -> dict[str, F32]:
        """What was kept, by module."""
        return {name: _array(one) for name, one in self.inputs.items()}

    def _put(self, module: str, batch: Batch, x: torch.Tensor) -> None:
        if module not in self.inputs:
            self.inputs[module] = States(self._batches, x.shape[-1], spill=None)
        self.inputs[module].put(batch, x)


_WORKERS: dict[int, tuple[tuple[object, ...], _Worker]] = {}
_OPENING = threading.Lock()


def _worker(lane: Lane, at: ModelAt) -> _Worker:
    """The model that is open in a lane: one, until another is asked for."""
    known, key = _WORKERS.get(lane.number), (at.path, at.checkpoint, at.changed, lane.device)
    if known is None or known[0] != key:
        with _OPENING:  # transformers' tables of classes are filled when they are first asked for
            if known is not None:
                known[1].close()
            keep_freed_memory()
            known = _WORKERS[lane.number] = key, _Worker(at, lane.device)
    return known[1]


def _states(batches: Sequence[Batch], array: F32 | None) -> States:
    """A copy that can be written to."""
    assert array is not None
    states = States(batches, array.shape[-1], spill=None)
    states.everything.copy_(readable(array))
    return states


def _array(states: States) -> F32:
    found: F32 = states.everything.numpy()
    return found


def close_models() -> None:
    """Let go of the models that are open in this process."""
    for _, worker in _WORKERS.values():
        worker.close()
    _WORKERS.clear()
