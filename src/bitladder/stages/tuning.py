"""Tune what a level holds beside codes, once all of its tensors are made and before its file gets its name.

What was found is kept beside the file in the making, progress as well as the outcome: a killed run goes on with the
step that it was at, or writes the numbers that it had found. Numbers replace numbers, so writing them twice is as good
as once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitladder.describe.windows import Window
from bitladder.files.atomic import write_whole
from bitladder.files.kept_array import SECONDS_BETWEEN, read_arrays
from bitladder.plan.tuning import TuningChoice, chosen, finest, held_places
from bitladder.progress import Progress
from bitladder.records.recipe import Tuning
from bitladder.walk.keep import Arrays
from bitladder.walk.layers import LayeredModel
from bitladder.walk.tuned import LevelBytes, Tunable, TunedWeights
from bitladder.walk.tuned_checkpoint import StoredLevel
from bitladder.walk.tuning import Tuned, TuneSettings, TuningPass, tune
from bitladder.walk.weights import LevelWeights

F32 = NDArray[np.float32]

_FILE = "tuning.npz"
_KEY, _DONE = "key", "done"
_NUMBERS = "numbers."


class Level(LevelBytes, Protocol):
    """A level whose tensors can be written again."""

    def put(self, name: str, pieces: Iterator[NDArray[np.uint8]]) -> None:
        """Write a tensor, given as consecutive rows."""


@dataclass(frozen=True)
class Tuner:
    """What tuning takes beside a level: a text, what moves numbers how, and where work is kept."""

    model: LayeredModel
    source: LevelWeights
    windows: Sequence[Window]
    """A part of them decides."""
    half: bool
    """Multiply in bfloat16."""
    state_bytes: int
    """Hidden states beyond this go to files in ``spill``."""
    spill: Path
    notes: Path
    """The folder in which a killed run leaves what it found."""
    key: str
    """Of all that the outcome depends on, settings apart."""
    progress: Progress
    settings: TuneSettings

    def level(self, level: Level, *, threads: int) -> Tuning:
        """Tune the free numbers of a GGUF level and write those that helped. ``threads``: for decoding."""
        weights, tensors = TunedWeights(level, threads=threads), self.model.model.tensors
        tuning, found = self._tuned(weights, lambda tokens: chosen(tensors, level.qtype, tokens, self.model.norm_names))
        for name in found:
            level.put(name, iter([weights.packed(name)]))
        return tuning

    def stored(self, level: StoredLevel) -> Tuning:
        """Tune the scales of a checkpoint level in the making and put those that helped into its store.

        Raises:
            OutputError: no room.
        """
        tuning, found = self._tuned(level, lambda tokens: finest(level.shapes(), tokens))
        if found:
            level.write()
        return tuning

    def _tuned(self, weights: Tunable, choose: Callable[[int], TuningChoice]) -> tuple[Tuning, Mapping[str, F32]]:
        """What came of it, and the numbers, which ``weights`` have then; ``choose``: what moves, for so many tokens."""
        places = held_places([window.document for window in self.windows])
        if not places:
            return Tuning(
                kept=False, numbers=0, tokens=0, held_out=0, steps=0, before=float("nan"), after=float("nan"),
                note=f"{len(self.windows)} windows of text are too few to hold some out",
            ), {}  # fmt: skip
        tokens = sum(len(window.tokens) for at, window in enumerate(self.windows) if at not in places)
        choice, kept = choose(tokens), _Notes(self.notes / _FILE, f"{self.key} {self.settings.key}")
        found = kept.outcome()
        if found is None:
            passes = TuningPass(
                self.model, self.source, weights, self.windows,
                state_bytes=self.state_bytes, spill=self.spill, half=self.half,
            )  # fmt: skip
            passes.learn()

            def told(what: str, step: int) -> None:
                self.progress(f"tuning against the source's predictions: {what}", step, self.settings.steps)

            found = tune(passes, choice.grains, places, self.settings, notes=kept, told=told)
            kept.keep_outcome(found)
        weights.numbers = dict(found.numbers)
        held = found.tokens.sum()
        return Tuning(
            kept=found.best > 0, numbers=choice.shares, tokens=tokens, held_out=int(held), steps=found.steps,
            before=float(found.before.sum() / held), after=float(found.after.sum() / held), note=choice.note,
        ), found.numbers  # fmt: skip


class _Notes:
    """One file with what a killed run goes on from."""

    def __init__(self, path: Path, key: str) -> None:
        """``key``: of all that its contents depend on; what lies there under another is not taken."""
        self._path, self._key, self._saved = path, key, time.monotonic()

    def load(self) -> Arrays | None:
        """As ``walk.tuning.Notes``."""
        return self._read(done=False)

    def due(self) -> bool:
        """As ``walk.tuning.Notes``."""
        return time.monotonic() - self._saved >= SECONDS_BETWEEN

    def save(self, arrays: Arrays) -> None:
        """As ``walk.tuning.Notes``."""
        self._write(arrays, done=False)

    def outcome(self) -> Tuned | None:
        """What an earlier run found, if it came so far."""
        kept = self._read(done=True)
        if kept is None:
            return None
        numbers = {name.removeprefix(_NUMBERS): own for name, own in kept.items() if name.startswith(_NUMBERS)}
        return Tuned(
            numbers, kept["before"], kept["after"], kept["tokens"], int(kept["steps"]), int(kept["best"])
        )  # fmt: skip

    def keep_outcome(self, found: Tuned) -> None:
        """Keep what was found, before the first tensor is written."""
        numbers = {_NUMBERS + name: own for name, own in found.numbers.items()}
        results = {"before": found.before, "after": found.after, "tokens": found.tokens}
        counts = {"steps": np.array(found.steps), "best": np.array(found.best)}
        self._write({**numbers, **results, **counts}, done=True)

    def _read(self, *, done: bool) -> Arrays | None:
        kept = read_arrays(self._path)
        if kept is None or not {_KEY, _DONE} <= kept.keys():
            return None
        own = str(kept.pop(_KEY)) == self._key
        return kept if bool(kept.pop(_DONE)) == done and own else None

    def _write(self, arrays: Mapping[str, NDArray[Any]], *, done: bool) -> None:
        buffer = BytesIO()
        np.savez(buffer, **{_KEY: np.array(self._key), _DONE: np.array(done)}, **arrays)  # type: ignore[arg-type]
        write_whole(self._path, buffer.getvalue(), do="Free some space there.")
        self._saved = time.monotonic()
