"""What a killed walk goes on from: one format, whatever the walk makes.

Hidden states are a walk's only progress besides what it has made, and that lies in its own file (a checkpoint's layers,
a GGUF's tensors). After a layer the states are written to a folder, not more often than every half minute of work, with
what observers have summed so far. A note beside them says which layer they enter, whose they are, and has a key over
everything they depend on. The note is replaced last and names its files, so that a kill at any moment leaves a whole
earlier state. All have a hash of the key in their names, KEY here: jobs that share a folder leave each other's alone.

    walk.KEY.json        {"key", "layer", "groups": [[member, ...], ...], "files": [name, ...], "arrays": name or null}
    layer7-0.KEY.f32     hidden states that enter layer 7 of the first group, f32[tokens, n_embd]
    layer7.KEY.npz       arrays of observers
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.errors import OutputError
from bitladder.files.atomic import write_whole, written_aside
from bitladder.files.kept_array import SECONDS_BETWEEN, read_arrays
from bitladder.records import to_json
from bitladder.records.reading import read_json
from bitladder.walk.states import States

_GIVEN_UP_S = 24 * 3600.0
"""States of other walks that are older than this go: they take gigabytes, and nobody went on from them."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class _Note:
    """What the note says."""

    key: str
    layer: int
    groups: list[list[int]]
    files: list[str]
    arrays: str | None


@dataclass(frozen=True)
class Kept:
    """Where a killed walk was: the first layer to do, each group's members and file, arrays of observers."""

    layer: int
    groups: list[list[int]]
    files: list[Path]
    arrays: Arrays
    """By number of the owner and name: ``0.blk.1.attn_q.weight.squares``."""

    def of(self, number: int) -> Arrays:
        """What one of those that keep arrays had saved."""
        own = f"{number}."
        return {name.removeprefix(own): array for name, array in self.arrays.items() if name.startswith(own)}

    def restore(self, group: int, states: States) -> None:
        """Fill states with those of a group."""
        whole = states.everything
        if whole.numel():
            whole.copy_(torch.from_file(str(self.files[group]), size=whole.numel()).view(whole.shape))


class Keep:
    """Keeps the states of one stream in ``folder``; members are numbered as the stream numbers them."""

    def __init__(self, folder: Path, key: str) -> None:
        """``key``: of everything that the states depend on; states under another key are not taken."""
        self._folder, self._key = folder, key
        self._own = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._note = folder / f"walk.{self._own}.json"
        self._saved = time.monotonic()

    def load(self, tokens: int, width: int) -> Kept | None:
        """What an earlier run left, or None when there is nothing whole under this key, of states
        f32[tokens, width]."""
        try:
            note = read_json(_Note, self._note.read_text(encoding="utf-8"))
            files = [self._folder / Path(name).name for name in note.files]
            if note.key != self._key or any(file.stat().st_size != tokens * width * 4 for file in files):
                return None
        except (OSError, ValueError):  # none, or not ours: notes are replaced whole
            return None
        arrays = read_arrays(self._folder / Path(note.arrays).name) if note.arrays else {}
        return None if arrays is None else Kept(note.layer, note.groups, files, arrays)

    def due(self) -> bool:
        """Whether the last save was long enough ago."""
        return time.monotonic() - self._saved >= SECONDS_BETWEEN

    def save(self, layer: int, groups: Sequence[tuple[Sequence[int], States]], owned: Sequence[Arrays] = ()) -> None:
        """Keep what enters ``layer``, and arrays by name of some owners.

        Raises:
            OutputError: the folder cannot be written.
        """
        arrays = {f"{number}.{name}": array for number, own in enumerate(owned) for name, array in own.items()}
        files = [f"layer{layer}-{number}.{self._own}.f32" for number in range(len(groups))]
        named = f"layer{layer}.{self._own}.npz" if arrays else None
        note = _Note(self._key, layer, [list(members) for members, _ in groups], files, named)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name, (_, states) in zip(files, groups, strict=True):
                states.everything.numpy().tofile(self._folder / name)
            if named:
                with written_aside(self._folder / named) as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
            write_whole(self._note, json.dumps(to_json(note)))
            self._remove(but={*files, named, self._note.name})
        except OSError as error:
            raise OutputError(
                f"The walk's state cannot be kept in {self._folder}: {error.strerror}.",
                means="It is kept so that a killed walk can go on where it was.",
                do="Free some space there.",
            ) from error
        self._saved = time.monotonic()

    def done(self) -> None:
        """The walk has ended: nothing needs to be kept."""
        if self._folder.exists():
            self._note.unlink(missing_ok=True)
            self._remove(but=set())

    def _remove(self, but: set[str | None]) -> None:
        for file in [*self._folder.glob("layer*"), *self._folder.glob("walk.*")]:
            with suppress(FileNotFoundError):  # another walk was here first
                given_up = time.time() - file.stat().st_mtime > _GIVEN_UP_S
                if file.name not in but and (given_up or f".{self._own}." in file.name):
                    file.unlink()
