"""Tune what a level holds beside codes, once all of its tensors are made and before its file gets its name.

What was found is kept beside the file in the making, progress as well as the outcome: a killed run goes on with the
step that it was at, or writes the numbers that it had found. Numbers replace numbers, so writing them twice is as good
as once.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitladder.describe.windows import Window
from bitladder.files.atomic import write_whole
from bitladder.plan.tuning import chosen, held_places
from bitladder.progress import Progress
from bitladder.records.recipe import Tuning
from bitladder.walk.keep import SECONDS_BETWEEN, Arrays
from bitladder.walk.layers import LayeredModel
from bitladder.walk.tuning import LevelBytes, Tuned, TunedWeights, TuneSettings, TuningPass, tune
from bitladder.walk.weights import LevelWeights

_FILE = "tuning.npz"
_KEY, _DONE = "key", "done"
_NUMBERS = "numbers."


class Level(LevelBytes, Protocol):
    """A level whose tensors can be written again."""

    def put(self, name: str, pieces: Iterator[NDArray[np.uint8]]) -> None:
        """Write a tensor, given as consecutive rows."""


def tune_level(
    model: LayeredModel,
    source: LevelWeights,
    level: Level,
    windows: Sequence[Window],
    settings: TuneSettings,
    *,
    half: bool,
    threads: int,
    state_bytes: int,
    spill: Path,
    notes: Path,
    key: str,
    progress: Progress,
) -> Tuning:
    """Tune a level's free numbers and write those that helped.

    Args:
        model: whose layers they are.
        source: the source's weights.
        level: whose numbers move.
        windows: the calibration text; a part of it decides.
        settings: how numbers are moved.
        half: multiply in bfloat16.
        threads: for decoding.
        state_bytes: hidden states beyond this go to files in ``spill``.
        spill: a folder.
        notes: the folder in which a killed run leaves what it found.
        key: of all that the outcome depends on, settings apart.
        progress: told after each step.
    """
    places = held_places([window.document for window in windows])
    if not places:
        return Tuning(
            kept=False, numbers=0, tokens=0, held_out=0, steps=0, before=float("nan"), after=float("nan"),
            note=f"{len(windows)} windows of text are too few to hold some out",
        )  # fmt: skip
    tokens = sum(len(window.tokens) for at, window in enumerate(windows) if at not in places)
    choice = chosen(model.model.tensors, level.qtype, tokens, model.norm_names)
    kept = _Notes(notes / _FILE, f"{key} {settings.key}")
    weights = TunedWeights(level, threads=threads)
    found = kept.outcome()
    if found is None:
        passes = TuningPass(model, source, weights, windows, state_bytes=state_bytes, spill=spill, half=half)
        passes.learn()

        def told(what: str, step: int) -> None:
            progress(f"tuning against the source's predictions: {what}", step, settings.steps)

        found = tune(passes, choice.grains, places, settings, notes=kept, told=told)
        kept.keep_outcome(found)
    weights.numbers = dict(found.numbers)
    for name in found.numbers:
        level.put(name, iter([weights.packed(name)]))
    held = found.tokens.sum()
    return Tuning(
        kept=found.best > 0, numbers=choice.shares, tokens=tokens, held_out=int(held), steps=found.steps,
        before=float(found.before.sum() / held), after=float(found.after.sum() / held), note=choice.note,
    )  # fmt: skip


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
        try:
            with self._path.open("rb") as file:
                kept = dict(np.load(file, allow_pickle=False))
            if str(kept.pop(_KEY)) == self._key and bool(kept.pop(_DONE)) == done:
                return kept
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # none, or not ours: it is replaced whole
            pass
        return None

    def _write(self, arrays: Mapping[str, NDArray[Any]], *, done: bool) -> None:
        buffer = BytesIO()
        np.savez(buffer, **{_KEY: np.array(self._key), _DONE: np.array(done)}, **arrays)  # type: ignore[arg-type]
        write_whole(self._path, buffer.getvalue(), do="Free some space there.")
        self._saved = time.monotonic()
