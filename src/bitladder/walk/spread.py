"""Units of a walk computed elsewhere: on several devices, or by workers of a cluster.

States and inputs that are kept between passes stay where units are computed (``units.py``), shard by shard. Sums are
added in the order of the shards.

Sums of inputs that a level's codes follow from never come here: they are added, and codes chosen, where units are
computed, of a stack's experts some at a time (``coding.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bitladder.errors import ClusterError
from bitladder.executors import Executor, Handle, Started
from bitladder.executors.base import weights_travel
from bitladder.executors.limits import Limits
from bitladder.files.convert import checkpoint_of
from bitladder.files.gguf import GgufFile
from bitladder.files.staging import data_files
from bitladder.formats.families import family_of
from bitladder.formats.roles import ROPE_TENSORS
from bitladder.walk.coding import Coder, groups_of, shares_of
from bitladder.walk.driver import HeldInputs, Observer, Stream, Watched
from bitladder.walk.inputs import InputWatch, Wants, merged, readable
from bitladder.walk.layer_pass import Original
from bitladder.walk.layers import LayeredModel
from bitladder.walk.states import Batch, States
from bitladder.walk.units import AddUnit, Changed, CodeUnit, Held, LayerTask, LayerUnit, ModelAt, close_models


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


@dataclass
class _Expected:
    """The pass through the source's own layer that a stream comes to next."""

    layer: int
    watched: Watched
    entering: HeldStates
    begun: list[Started] = field(default_factory=list)
    """Its units, where they were begun."""


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
        self._sent: dict[int, Handle] = {}
        self._expected: dict[Stream, _Expected] = {}
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
        known = self._expected.pop(stream, None)
        if known is not None and known.begun and (known.layer, known.watched) == (layer, watched):
            started, handles = iter(known.begun), [one.held for one in known.begun]
        else:
            handles = []
            units = self._through(stream, layer, watched)
            started = self.begun(
                lambda number: self.start(units[number], number, entering, None, None), len(units), handles
            )
        yield from (one.result() for one in started)
        leaving.handles = handles
        for one in observers:
            one.kept({module: KeptInputs(module, handles) for module in watched.keeps})

    def expect(self, stream: Stream, layer: int, watched: Watched, entering: States) -> None:
        """As ``driver.Spread``."""
        assert isinstance(entering, HeldStates)
        if not watched.inputs:  # answers that hold sums may be as large as a layer each, too many to be begun at once
            self._expected[stream] = _Expected(layer, watched, entering)

    def look_ahead(self, stream: Stream) -> None:
        """Begin what is expected of a stream: there are workers that would have to wait. Units that come later stand
        behind these in line, which costs nothing, for they have to be done."""
        one = self._expected.get(stream)
        if one is not None and not one.begun:
            units = self._through(stream, one.layer, one.watched)
            one.begun = [self.start(unit, number, one.entering, None, None) for number, unit in enumerate(units)]

    def _through(self, stream: Stream, layer: int, watched: Watched) -> list[LayerUnit]:
        return [replace(unit, watched=watched) for unit in self.units(stream, layer, "source")]

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
        """A layer's tensors as they are stored, sent once; the layer before it may still be at work."""
        if layer not in self._sent:
            names = self._names(layer)
            self._sent = {number: held for number, held in self._sent.items() if number == layer - 1}
            self._sent[layer] = self.executor.put({name: np.array(self._source.raw(name)) for name in names})
        return self._sent[layer]

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
        close_models()


class SpreadPass:
    """As ``LayerPass``, with each shard's passes, sums and codes where units are computed."""

    def __init__(self, spread: SpreadUnits, stream: Stream, layer: int, states: States) -> None:
        assert isinstance(states, HeldStates)
        self._spread, self._stream, self._layer, self._states = spread, stream, layer, states
        self._model = cast(LayeredModel, stream.stages).model
        self._of = f"level {id(stream)}"
        self._last = stream.stages.inputs(layer, stream.stages.outline(layer))[-1]
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
        if len(values) < at_once and coder.shared == self._last:
            self._spread.look_ahead(self._stream)
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
