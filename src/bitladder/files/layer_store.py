"""What a walk over the layers makes, kept layer by layer: after each one a kill costs nothing that was finished.

``.NAME.partial/`` beside the target holds one safetensors file per layer, and a log: a line of JSON for what is being
made, one for every finished tensor with its loss, one for every finished layer. The log is the journal: whoever makes
the same thing again reads from it which layers are done. (The hidden states to go on with are ``walk/keep.py``'s.) A
file ``lock`` is locked by the process that is at it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder import system
from bitladder.errors import OutputError
from bitladder.files.atomic import written_aside
from bitladder.units import human_bytes

if TYPE_CHECKING:
    import torch

_LOG = "log.jsonl"
_LOCK = "lock"


@dataclass(frozen=True)
class FinishedLayer:
    """What the log remembers of a layer: its number, and what its maker noted of each tensor."""

    layer: int
    tensors: tuple[dict[str, Any], ...]
    seconds: float = 0.0


class LayerStore(ABC):
    """Layers of one result. ``fingerprint`` says what the result depends on: another one's partial work is not
    continued."""

    while_in_use = "Wait for it to end, or choose another folder with --out."
    """What to do when another process is at it."""
    _lock = -1

    def __init__(self, target: Path, fingerprint: str) -> None:
        self.target, self.fingerprint = target, fingerprint
        self.partial = target.parent / f".{target.name}.partial"

    def begin(self) -> None:
        """Take up an earlier run's partial work, or begin afresh. Until then nothing is written: what is refused before
        the work leaves no folder behind.

        Raises:
            OutputError: the folder cannot be written, or another process is at it.
        """
        with writing(self.partial):
            self._claim_alone()
            if not self._is_begun():
                for path in self.partial.iterdir():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    elif path.name != _LOCK:
                        path.unlink()
                self._append([self._first_line()])

    def _claim_alone(self) -> None:
        """Two processes must not write one folder: the second is told so."""
        if self._lock >= 0:
            return
        self.partial.mkdir(parents=True, exist_ok=True)
        path = self.partial / _LOCK
        self._lock = system.open_file(path, "O_RDWR", "O_CREAT", "O_NOFOLLOW")
        if not system.claim(self._lock, path):
            self.close()
            raise OutputError(
                f"{self.partial} is being written by another process.",
                means="Bitladder already makes this very thing.",
                do=self.while_in_use,
            )

    def close(self) -> None:
        """Let go, leaving what was made for a later run to go on from."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the target already holds exactly this."""

    def finished(self) -> list[FinishedLayer]:
        """Layers that need not be done again, in order."""
        if not self._is_begun():
            return []
        found, tensors = [], []
        for line in self._logged()[1:]:
            if "tensor" in line:
                tensors.append(line)
            else:
                found.append(FinishedLayer(int(line["layer"]), tuple(tensors), float(line["seconds"])))
                tensors = []
        return found

    def truncate(self, layers: int) -> None:
        """Forget all but the first ``layers`` layers, and lines of a layer that was not finished."""
        with writing(self.partial):
            self._rewrite(self.finished()[:layers])

    def layer_file(self, layer: int) -> Path:
        """Where the tensors of ``layer`` are kept."""
        return self.partial / f"{layer:05d}.safetensors"

    @property
    def log(self) -> str:
        """The log as it stands."""
        return (self.partial / _LOG).read_text(encoding="utf-8")

    def put_layer(
        self,
        layer: int,
        tensors: Mapping[str, torch.Tensor],
        notes: Sequence[Mapping[str, Any]],
        *,
        seconds: float = 0.0,
    ) -> None:
        """Keep a layer's tensors and what is noted of them.

        ``notes``: what to log, one mapping with a ``tensor`` per finished tensor.

        Raises:
            OutputError: no room.
        """
        self.begin()
        with writing(self.partial):
            _save(self.layer_file(layer), tensors)
            self.note_layer(layer, notes, seconds=seconds)

    def note_layer(self, layer: int, notes: Sequence[Mapping[str, Any]], *, seconds: float = 0.0) -> None:
        """Note that ``layer_file`` holds a whole layer."""
        self._append(_of_layer(FinishedLayer(layer, tuple(dict(note) for note in notes), seconds)))

    def replace_layers(
        self, layers: Iterator[tuple[int, Mapping[str, torch.Tensor]]], digests: Mapping[str, str]
    ) -> None:
        """Put other tensors of finished layers in the place of theirs, and note what they decode to, by name.

        Until the last of them is written the log has the old digests: a killed call is to be made again.

        Raises:
            OutputError: no room.
        """
        with writing(self.partial):
            for layer, tensors in layers:
                _save(self.layer_file(layer), tensors)
            told = [
                replace(one, tensors=tuple({**note, "digest": digests.get(note["tensor"], note.get("digest", ""))}
                        for note in one.tensors))
                for one in self.finished()
            ]  # fmt: skip
            self._rewrite(told)

    def discard(self) -> None:
        """Remove the partial work, and let go."""
        if system.WINDOWS:  # which removes no open file
            self.close()
        shutil.rmtree(self.partial, ignore_errors=True)  # still locked: nobody may take it up meanwhile
        self.close()

    def _is_begun(self) -> bool:
        """Whether the partial work that lies there is of this very result."""
        return self._logged()[:1] == [self._first_line()]

    def _first_line(self) -> dict[str, Any]:
        return {"making": self.target.name, "fingerprint": self.fingerprint}

    def _logged(self) -> list[dict[str, Any]]:
        """The log's lines; what a kill cut short is left out."""
        try:
            text = (self.partial / _LOG).read_text(encoding="utf-8", errors="replace")
        except OSError:  # none is there; whatever else is wrong with the place is said by whoever writes
            return []
        lines = []
        for line in text.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def _rewrite(self, layers: Sequence[FinishedLayer]) -> None:
        lines = [self._first_line(), *(line for one in layers for line in _of_layer(one))]
        with written_aside(self.partial / _LOG) as file:
            file.write(_lines(lines).encode())

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with (self.partial / _LOG).open("a", encoding="utf-8") as file:
            file.write(_lines(lines))


def _of_layer(one: FinishedLayer) -> list[dict[str, Any]]:
    """A finished layer's lines: its tensors, and last the word that it is whole."""
    last = {"layer": one.layer, "finished": True, "seconds": round(one.seconds, 3)}
    return [*({"layer": one.layer, **tensor} for tensor in one.tensors), last]


def _lines(values: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole under its name or not at all."""
    from safetensors.torch import save_file

    with written_aside(path) as file:
        save_file(dict(tensors), file.name, metadata={"format": "pt"})


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Whatever keeps files from being written, in the user's terms."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        what = f"{folder.parent} cannot be written: {getattr(error, 'strerror', None) or error}."
        if getattr(error, "errno", None) not in system.FULL and f"os error {errno.ENOSPC}" not in str(error):
            raise OutputError(
                what,
                means="The folder is read-only, belongs to somebody else, or is no folder.",
                do="Choose another folder with --out.",
            ) from error
        parent = next(path for path in (folder, *folder.parents) if path.exists())
        kept = "; finished layers are kept, the same call goes on from them" if [*folder.glob("*.safetensors")] else ""
        raise OutputError(
            f"{what} {human_bytes(shutil.disk_usage(parent).free)} are free there.",
            means="The disk is full, or a limit on disk use or file size is reached.",
            do=f"Free some space or choose another --out{kept}.",
        ) from error
