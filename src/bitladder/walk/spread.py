"""Units of a walk computed elsewhere: on several devices, or by workers of a cluster.

A worker opens the model where it lies (or is sent a layer's tensors, where it cannot read the file), fills a layer,
and pushes a shard of the text through it with the code that a walk here uses. States and inputs that are kept between
passes stay where units are computed, shard by shard. Sums are added in the order of the shards.

    through   a shard through a layer as the source has it      -> sums; states that leave it, inputs that are kept
    gather    a shard up to one shared input                    -> sums; what the next pass begins with
    add       two shards' sums                                  -> their sum
    code      some of the matrices that read the input          -> what is stored of them; what they decode to
    finish    a shard through what is left of the layer         -> states that leave it

Sums of inputs that a level's codes follow from never come here: they are added, and codes chosen, where units are
computed, of a stack's experts some at a time (``coding.py``).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.describe.model import Model
from bitladder.errors import ClusterError
from bitladder.executors import Executor, Handle, Started
from bitladder.executors.base import Lane, weights_travel
from bitladder.executors.limits import Limits
from bitladder.files.convert import checkpoint_of
from bitladder.files.gguf import GgufFile
from bitladder.files.staging import data_files
from bitladder.formats.families import family_of
from bitladder.formats.roles import ROPE_TENSORS, SharedInput
from bitladder.formats.tensors import TensorInfo
from bitladder.walk.allocator import keep_freed_memory
from bitladder.walk.coding import Bench, Coder, Share, groups_of, shares_of
from bitladder.walk.driver import HeldInputs, Member, Observer, Stream, Unit, Watched
from bitladder.walk.inputs import InputWatch, Wants, keeping, merged, readable
from bitladder.walk.layer_pass import LayerPass, Original
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
        bench = _bench(lane, self.model)
        own, rest = (held[:1], held[1:]) if isinstance(unit, CodeUnit) else (held[:3], held[3:])
        if self.model.sent:
            bench.take(rest[-1])
        if isinstance(unit, CodeUnit):
            return bench.coded(unit, rest, own[0], self.threads)
        return bench.done(unit, rest, *own)


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


class _Bench:
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
        if sum(value.numel() for value in block.parameters()) * 4 > KEPT_BYTES and not self._whole:
            for path in self._filled - set(paths):
                owner, _, leaf = path.rpartition(".")
                gone = nn.Parameter(torch.empty_like(tensor_at(block, path), device="meta"), requires_grad=False)
                setattr(block.get_submodule(owner), leaf, gone)
            self._filled &= set(paths)
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
        states = _states(unit.batches, entering.states)
        block = self.block(unit)
        if unit.watched is not None:
            self.fill(unit, values, [path for path, _ in block.named_parameters()])
            return _through(stream, block, unit, unit.watched, states)
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
    return watch.on_the_cpu(), Held(_array(leaving), {name: _array(one) for name, one in keeper.inputs.items()})


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
        return keeping(block, self._watched.keeps, batch, self._put)

    def _put(self, module: str, batch: Batch, x: torch.Tensor) -> None:
        if module not in self.inputs:
            self.inputs[module] = States(self._batches, x.shape[-1], spill=None)
        self.inputs[module].put(batch, x)


_BENCHES: dict[int, tuple[tuple[object, ...], _Bench]] = {}
_OPENING = threading.Lock()


def _bench(lane: Lane, at: ModelAt) -> _Bench:
    """The model that is open in a lane: one, until another is asked for."""
    known, key = _BENCHES.get(lane.number), (at.path, at.checkpoint, at.changed, lane.device)
    if known is None or known[0] != key:
        with _OPENING:  # transformers' tables of classes are filled when they are first asked for
            keep_freed_memory()
            known = _BENCHES[lane.number] = key, _Bench(at, lane.device)
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


class HeldStates(States):
    """States of a text that are held where units are computed: a handle for each shard."""

    def __init__(self, executor: Executor, shards: Sequence[Sequence[Batch]], width: int) -> None:
        self._executor, self._shards, self.width = executor, shards, width
        self.handles: list[Handle] = []

    @property
    def everything(self) -> torch.Tensor:
        """A copy."""
        return torch.cat([self._shard(number) for number in range(len(self._shards))])

    def get(self, batch: Batch) -> torch.Tensor:
        """As ``States``; a copy."""
        number = next(number for number, shard in enumerate(self._shards) if batch in _starts(shard))
        start = batch.start - self._shards[number][0].start
        own = self._shard(number)[start : start + batch.tokens.size]
        return own.view(*batch.tokens.shape, self.width)

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """They are replaced where they are, by units."""
        raise NotImplementedError

    def copy_from(self, other: States) -> None:
        """As ``States``: what is held is never changed, so it can be shared."""
        assert isinstance(other, HeldStates)
        self.handles = list(other.handles)

    def _shard(self, number: int) -> torch.Tensor:
        held: Held = self._executor.fetch(self.handles[number])
        assert held.states is not None
        return readable(held.states)


class _starts:  # noqa: N801
    """Whether a batch is one of a shard's, by where it begins."""

    def __init__(self, shard: Sequence[Batch]) -> None:
        self._starts = {batch.start for batch in shard}

    def __contains__(self, batch: Batch) -> bool:
        return batch.start in self._starts


@dataclass(frozen=True)
class KeptInputs(HeldInputs):
    """Inputs of a module of the source's layer, for each shard in what stayed of it."""

    module: str
    handles: Sequence[Handle]


class SpreadUnits:
    """As ``driver.Spread``: a walk's units on an executor."""

    def __init__(self, executor: Executor, source: GgufFile, at: ModelAt) -> None:
        self.executor, self._source = executor, source
        self.task = LayerTask(at, Limits.here())
        self._sent: tuple[int, Handle] | None = None
        self._nothing = executor.put(None)

    def hold(self, states: States, shards: Sequence[Sequence[Batch]]) -> HeldStates:
        """As ``driver.Spread``."""
        held = HeldStates(self.executor, shards, states.width)
        for shard in shards:
            start, stop = shard[0].start, shard[-1].start + shard[-1].tokens.size
            held.handles.append(self.executor.put(Held(states.everything[start:stop].numpy().copy())))
        return held

    def empty(self, like: States) -> HeldStates:
        """As ``driver.Spread``."""
        assert isinstance(like, HeldStates)
        return HeldStates(self.executor, like._shards, like.width)

    def through(
        self, stream: Stream, layer: int, observers: Sequence[Observer], watched: Watched, entering: States,
        leaving: States,
    ) -> Iterator[InputWatch]:  # fmt: skip
        """As ``driver.Spread``."""
        assert isinstance(entering, HeldStates)
        assert isinstance(leaving, HeldStates)
        units = [replace(unit, watched=watched) for unit in self.units(stream, layer, "source")]
        handles: list[Handle] = []
        started = self.begun(
            lambda number: self.start(units[number], number, entering, None, None), len(units), handles
        )
        yield from (one.result() for one in started)
        leaving.handles = handles
        for one in observers:
            one.kept({module: KeptInputs(module, handles) for module in watched.keeps})

    def begun(self, start: Callable[[int], Started], count: int, handles: list[Handle]) -> Iterator[Started]:
        """So many units, in their order, each to be waited for; ``handles`` gets what stays of each. Sums may be as
        large as a layer, so no more units are begun than keep everyone busy."""
        ahead = self.executor.at_once(self.task) + 1
        begun: deque[Started] = deque()
        for number in range(count):
            while len(handles) < min(count, number + ahead):
                begun.append(start(len(handles)))
                handles.append(begun[-1].held)
            yield begun.popleft()

    def units(self, stream: Stream, layer: int, of: str) -> list[LayerUnit]:
        """One for each shard of a stream."""
        return [
            LayerUnit(layer, tuple(replace(one, start=one.start - shard[0].start) for one in shard), stream.half, of)
            for shard in stream.shards
        ]

    def start(
        self, unit: LayerUnit, number: int, entering: HeldStates, kept: Handle, source: Handle,
        changes: Sequence[Handle] = (),
    ) -> Started:  # fmt: skip
        """Begin a shard's unit."""
        optional = (self._nothing if one is None else one for one in (kept, source))
        held = [entering.handles[number], *optional, *changes, *self._sent_of(unit.layer)]
        return self.executor.start(self.task, unit, *held, place=number)

    def start_codes(self, unit: CodeUnit, number: int, summed: Handle, changes: Sequence[Handle]) -> Started:
        """Begin a share's unit."""
        held = [summed, *changes, *self._sent_of(unit.coder.layer)]
        return self.executor.start(self.task, unit, *held, place=number)

    def add(self, first: Handle, later: Handle) -> Handle:
        """The sum of two shards' sums."""
        return self.executor.start(self.task, AddUnit(), first, later).answer

    def passing(self, stream: Stream, layer: int, states: States) -> SpreadPass:
        """As ``driver.Spread``."""
        return SpreadPass(self, stream, layer, states)

    def _sent_of(self, layer: int) -> list[Handle]:
        return [] if self.task.model.sent is None else [self._tensors(layer)]

    def _tensors(self, layer: int) -> Handle:
        """A layer's tensors as they are stored, sent once."""
        if self._sent is None or self._sent[0] != layer:
            names = self._names(layer)
            self._sent = layer, self.executor.put({name: np.array(self._source.raw(name)) for name in names})
        return self._sent[1]

    def _names(self, layer: int) -> list[str]:
        prefix = f"blk.{layer}."
        return [tensor.name for tensor in self._source.model.tensors if tensor.name.startswith(prefix)]


@contextmanager
def spread_over(
    executor: Executor | None, source: GgufFile, checkpoint: Path | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Iterator[SpreadUnits | None]:  # fmt: skip
    """A model's units on an executor; None without one.

    Args:
        executor: where.
        source: the model.
        checkpoint: the folder it was converted from, where that is known.
        warn: told where weights have to travel.

    Raises:
        ClusterError: workers lack files that cannot be sent.
    """
    if executor is None:
        yield None
        return
    folder = checkpoint or checkpoint_of(source.path)
    files = [header.path for header in source.headers]
    lacking = executor.lacking(files)
    by_row = family_of(source.model.dims.architecture).layers_of(source.model.dims.n_expert) is not None
    missing = lacking or ("" if folder is None or by_row else executor.lacking([*files, *data_files(folder)]))
    if missing and not by_row:
        raise ClusterError(
            f"Workers cannot read {missing}.",
            means="This family has no row of its own: workers make its layers of its checkpoint folder.",
            do="Put both into a folder that all nodes have under the same path.",
        )
    changed = source.path.stat().st_mtime_ns
    if lacking:
        warn(weights_travel(lacking))
        names = {tensor.name for tensor in source.model.tensors}
        tables = {name: np.array(source.raw(name)) for name in ROPE_TENSORS if name in names}
        at = ModelAt(str(source.path), None, changed, source.model, tables)
    else:
        at = ModelAt(str(source.path.absolute()), str(folder.absolute()) if folder else None, changed)
    try:
        yield SpreadUnits(executor, source, at)
    finally:
        _BENCHES.clear()


class SpreadPass:
    """As ``LayerPass``, with each shard's passes, sums and codes where units are computed."""

    def __init__(self, spread: SpreadUnits, stream: Stream, layer: int, states: States) -> None:
        assert isinstance(states, HeldStates)
        self._spread, self._layer, self._states = spread, layer, states
        self._model = cast(LayeredModel, stream.stages).model
        self._of = f"level {id(stream)}"
        self._units = spread.units(stream, layer, self._of)
        self._kept: list[Handle] = [None] * len(self._units)
        self._changed: list[Changed] = []
        self._values: list[Handle] = []

    def code(self, coder: Coder, original: Original | None = None) -> Iterator[Any]:
        """As ``Pass``."""
        groups = groups_of(self._model, self._layer, coder.shared)
        peak = self._peak(coder, original) if coder.reads_peak and len(groups) > 1 else None
        wants = Wants(gram=True, largest=coder.reads_peak)
        at_once = self._spread.executor.at_once(self._spread.task)
        begun: deque[Started] = deque()
        values: list[Handle] = []
        for experts in groups:
            summed = self._summed(coder, original, wants, experts)
            for number, share in enumerate(shares_of(coder.readers, experts, at_once)):
                unit = CodeUnit(self._layer, self._of, coder, share, experts, peak, tuple(self._changed))
                begun.append(self._spread.start_codes(unit, number, summed, self._values))
                values.append(begun[-1].held)
            del summed  # what holds it may let go of it
            while len(begun) > 2 * at_once:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
        self._changed.append(Changed(coder, len(values)))
        self._values += values

    def finish(self) -> None:
        """As ``LayerPass``."""
        units, handles = [self._now(unit) for unit in self._units], list[Handle]()
        for one in self._spread.begun(lambda number: self._start(units[number], number, None), len(units), handles):
            one.result()
        self._states.handles = handles

    def _summed(self, coder: Coder, original: Original | None, wants: Wants, experts: range | None) -> Handle:
        """Sums of an input over all shards, in their order."""
        found = None
        for one in self._gathered(coder, original, wants, experts):
            found = one.answer if found is None else self._spread.add(found, one.answer)
            one.wait()
        return found

    def _peak(self, coder: Coder, original: Original | None) -> float | None:
        parts = (one.result() for one in self._gathered(coder, original, Wants(largest=True), None))
        return merged(parts).peak(coder.shared)

    def _gathered(
        self, coder: Coder, original: Original | None, wants: Wants, experts: range | None
    ) -> Iterator[Started]:
        assert original is None or isinstance(original, KeptInputs)
        what = {"shared": coder.shared, "wants": wants, "experts": experts}
        what["module"] = "" if original is None else original.module
        units, handles = [self._now(unit, **what) for unit in self._units], list[Handle]()
        yield from self._spread.begun(lambda number: self._start(units[number], number, original), len(units), handles)
        self._kept = handles

    def _now(self, unit: LayerUnit, **what: Any) -> LayerUnit:
        return replace(unit, changes=tuple(self._changed), **what)

    def _start(self, unit: LayerUnit, number: int, original: KeptInputs | None) -> Started:
        source = None if original is None else original.handles[number]
        return self._spread.start(unit, number, self._states, self._kept[number], source, self._values)
