"""A walk that was killed goes on at the last layer it had kept.

Hidden states are all there is to a walk's progress. After a layer they are written to a folder, not more
often than every half minute of work, next to a note of the layer, of which models share which states, and of
a key over everything the states depend on. The note is replaced last and names its files, so that a kill at
any moment leaves a whole earlier state.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bitladder.errors import OutputError
from bitladder.walk.states import States
from bitladder.walk.weights import LevelWeights

SECONDS_BETWEEN = 30.0
_NOTE = "walk.json"


def walk_key(weights: Sequence[LevelWeights], tensors: Sequence[str], tokens: Sequence[bytes]) -> str:
    """A hash over every model's tensors (by identity), and over the windows."""
    digest = hashlib.blake2b(digest_size=16)
    for own in weights:
        for name in tensors:
            digest.update(repr((name, own.identity(name))).encode())
    for window in tokens:
        digest.update(len(window).to_bytes(8, "little") + window)
    return digest.hexdigest()


class Checkpoint:
    """Keeps a walk's states in ``folder``; models are numbered as the walk numbers them."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._saved = time.monotonic()

    def load(self) -> tuple[int, list[list[int]], list[Path]] | None:
        """The first layer still to do, and each group's members and file; None when there is nothing for this
        key."""
        try:
            note = json.loads((self._folder / _NOTE).read_text())
        except FileNotFoundError:
            return None
        except ValueError:  # half a note cannot be ours: it is replaced whole
            return None
        files = [self._folder / name for name in note.get("files", [])]
        if note.get("key") != self._key or not all(file.exists() for file in files):
            return None
        return note["layer"], note["groups"], files

    def restore(self, file: Path, states: States) -> None:
        """Fill states from a group's file."""
        states.data.copy_(torch.from_file(str(file), size=states.data.numel()).view(states.data.shape))

    def save(self, layer: int, groups: Sequence[tuple[Sequence[int], States]]) -> None:
        """Keep what leaves a layer, unless that was done a moment ago.

        Raises:
            OutputError: the folder cannot be written.
        """
        if time.monotonic() - self._saved < SECONDS_BETWEEN:
            return
        files = [f"layer{layer}-{number}.f32" for number in range(len(groups))]
        note = {
            "key": self._key,
            "layer": layer + 1,
            "groups": [list(members) for members, _ in groups],
            "files": files,
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name, (_, states) in zip(files, groups, strict=True):
                states.data.numpy().tofile(self._folder / name)
            partial = self._folder / (_NOTE + ".partial")
            partial.write_text(json.dumps(note))
            partial.replace(self._folder / _NOTE)
            self._remove(keep=files)
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
            self._remove(keep=())
            (self._folder / _NOTE).unlink(missing_ok=True)

    def _remove(self, keep: Sequence[str]) -> None:
        for file in self._folder.glob("layer*.f32"):
            if file.name not in keep:
                file.unlink()
