"""A checkpoint folder written layer by layer: resumable while it grows, complete or absent when it is done.

``.NAME.partial/`` beside the target collects one safetensors file per layer and what is needed to go on after
a kill. At the end they are joined into shards, the configuration and tokenizer come beside them, and the
folder is renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder.errors import OutputError
from bitladder.units import GiB, human_bytes

if TYPE_CHECKING:
    import torch

MANIFEST = "bitladder.json"
SHARD_BYTES = GiB
_STATES = "states.npy"
_JOURNAL = "journal.json"
_TOP = "top"


@dataclass(frozen=True)
class FinishedLayer:
    """What the journal remembers of a layer: its number and whatever its maker wants back after a kill."""

    layer: int
    record: dict[str, Any]


class CheckpointFolder:
    """The writer. ``fingerprint`` says what the result depends on: another one's partial work is not
    continued."""

    def __init__(self, target: Path, fingerprint: str) -> None:
        """Raises OutputError where ``target`` is a folder that Bitladder did not write, or cannot be
        written."""
        self.target, self.fingerprint = target, fingerprint
        self.partial = target.parent / f".{target.name}.partial"
        self._refuse_overwriting()
        with _writing(self.partial):
            if self._journal().get("fingerprint") != fingerprint:
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True)
                self._write_journal({"fingerprint": fingerprint, "layers": []})

    def is_complete(self) -> bool:
        """Whether the target already holds exactly this."""
        return self.manifest().get("fingerprint") == self.fingerprint

    def manifest(self) -> dict[str, Any]:
        """What the finished folder says of itself; empty when there is none."""
        return _json(self.target / MANIFEST)

    def finished(self) -> list[FinishedLayer]:
        """Layers that need not be done again, in order."""
        return [FinishedLayer(int(e["layer"]), dict(e["record"])) for e in self._journal().get("layers", [])]

    def truncate(self, layers: int) -> None:
        """Forget all but the first ``layers`` layers."""
        with _writing(self.partial):
            journal = self._journal()
            journal["layers"] = journal["layers"][:layers]
            self._write_journal(journal)

    def states_file(self, layer: int) -> Path:
        """Where the hidden states that leave ``layer`` are kept."""
        return self.partial / f"{layer:05d}.{_STATES}"

    def put_layer(
        self, layer: int, tensors: Mapping[str, torch.Tensor], record: dict[str, Any], states: Any = None
    ) -> None:
        """Keep a layer's tensors (and the states that leave it); after this a kill does not undo the layer.

        Raises:
            OutputError: no room.
        """
        import numpy as np

        with _writing(self.partial):
            self._save(self.partial / f"{layer:05d}.safetensors", tensors)
            if states is not None:
                fresh = self.partial / f"new.{_STATES}"
                np.save(fresh, states)
                fresh.replace(self.states_file(layer))
            journal = self._journal()
            journal["layers"].append({"layer": layer, "record": record})
            self._write_journal(journal)
            self.states_file(layer - 1).unlink(missing_ok=True)

    def finish(
        self,
        top: Mapping[str, torch.Tensor],
        config: dict[str, Any],
        companions: Mapping[str, bytes],
        manifest: dict[str, Any],
    ) -> Path:
        """Join the shards, add configuration and companions (file name to content) and put the folder in
        place.

        Raises:
            OutputError: no room.
        """
        with _writing(self.partial):
            self._save(self.partial / f"{_TOP}.safetensors", top)
            ready = self.partial / "ready"
            shutil.rmtree(ready, ignore_errors=True)
            ready.mkdir()
            parts = [self.partial / f"{_TOP}.safetensors"]
            parts += [self.partial / f"{entry.layer:05d}.safetensors" for entry in self.finished()]
            self._join(parts, ready)
            for name, content in companions.items():
                (ready / name).write_bytes(content)
            _write_json(ready / "config.json", config)
            _write_json(ready / MANIFEST, {**manifest, "fingerprint": self.fingerprint})
            for path in ready.iterdir():
                _sync(path)
            if self.target.exists():
                old = self.partial / "replaced"
                os.replace(self.target, old)  # noqa: PTH105 - a folder of ours: __init__ made sure
            os.replace(ready, self.target)  # noqa: PTH105
            _sync(self.target.parent)
            shutil.rmtree(self.partial)
        return self.target

    def _join(self, parts: Sequence[Path], ready: Path) -> None:
        """Group layer files into shards of about ``SHARD_BYTES``, and index them when there are several."""
        from safetensors.torch import load_file, save_file

        groups: list[list[Path]] = []
        room = 0
        for part in parts:
            size = part.stat().st_size
            if not groups or size > room:
                groups.append([])
                room = SHARD_BYTES
            groups[-1].append(part)
            room -= size
        index: dict[str, str] = {}
        total = 0
        for number, group in enumerate(groups, 1):
            name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = {key: value for part in group for key, value in load_file(part).items()}
            save_file(tensors, ready / name, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, name)
            total += sum(value.nbytes for value in tensors.values())
        if len(groups) > 1:
            _write_json(
                ready / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": index},
            )

    def _refuse_overwriting(self) -> None:
        if self.target.exists() and not (self.target / MANIFEST).is_file():
            raise OutputError(
                f"{self.target} exists and was not written by Bitladder.",
                means="Writing there would mix two checkpoints or destroy one.",
                do="Choose another --out, or move the folder away.",
            )

    def _journal(self) -> dict[str, Any]:
        return _json(self.partial / _JOURNAL)

    def _write_journal(self, journal: dict[str, Any]) -> None:
        fresh = self.partial / f"new.{_JOURNAL}"
        _write_json(fresh, journal)
        fresh.replace(self.partial / _JOURNAL)

    @staticmethod
    def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        fresh = path.with_name("new.safetensors")
        save_file(dict(tensors), fresh, metadata={"format": "pt"})
        fresh.replace(path)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Whatever keeps files from being written, in the user's terms."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        parent = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(parent).free
        raise OutputError(
            f"{folder.parent} cannot be written: {error}. {human_bytes(free)} are free there.",
            means="The disk is full, or the folder belongs to someone else.",
            do="Free some space or choose another --out; finished layers are kept, the same call goes on from them.",
        ) from error


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is none or a kill cut it short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Make sure that a rename does not outrun the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
