"""A checkpoint folder written layer by layer: resumable while it grows, complete or absent when it is done.

``files/layer_store.py`` collects the layers. At the end they are joined into shards, the configuration, tokenizer
and log come beside them, and the folder is renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitladder.files.atomic import put_in_place, written_aside
from bitladder.files.hashing import folder_sha256
from bitladder.files.layer_store import LayerStore, writing
from bitladder.files.outputs import check_output
from bitladder.files.safetensors_writer import PiecewiseTensor, stored_tensors, write_safetensors
from bitladder.progress import Progress, silent
from bitladder.units import GiB

MANIFEST = "bitladder.json"
SHARD_BYTES = GiB
LOG = "bitladder-log.jsonl"
"""One line per quantized tensor, in the order in which they were made."""
_TOP = "top"
_SOURCE = "source_sha256"


def checkpoint_sha256(folder: Path, progress: Progress = silent) -> str:
    """What tells one checkpoint folder from another: its files by names and hashes, without what Bitladder notes
    beside them (times of the walk among it)."""
    return folder_sha256(folder, progress, without=(MANIFEST, LOG))


def checkpoint_bytes(folder: Path) -> int:
    """Size of all its files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def fingerprint_of(folder: Path) -> str:
    """The fingerprint (``CheckpointFolder``) that a finished folder says it has; empty when Bitladder did not write
    it."""
    return str(_json(folder / MANIFEST).get("fingerprint", ""))


def notes_of(folder: Path) -> tuple[str, ...]:
    """What was noted for users when Bitladder wrote a folder; nothing of other folders."""
    report = _json(folder / MANIFEST).get("report")
    notes = report.get("notes") if isinstance(report, dict) else None
    return tuple(note for note in notes if isinstance(note, str)) if isinstance(notes, list) else ()


class CheckpointFolder(LayerStore):
    """The writer."""

    def __init__(
        self,
        target: Path,
        fingerprint: str,
        source_sha256: str = "",
        *,
        inputs: Sequence[Path] = (),
        force: bool | None = None,
    ) -> None:
        """Raises UsageError where ``target`` is one of ``inputs``, or a folder that Bitladder did not write from the
        same source (with ``force``: did not write)."""
        super().__init__(target, fingerprint)
        self.source_sha256 = source_sha256

        def is_ours(folder: Path) -> bool:
            found = _json(folder / MANIFEST)
            same = found.get("fingerprint") == fingerprint or found.get(_SOURCE) == source_sha256
            return bool(found) and (same or bool(force))

        check_output(target, "a checkpoint", inputs=inputs, ours=is_ours, force=force)

    def is_complete(self) -> bool:
        """Whether the target already holds exactly this."""
        return self.manifest().get("fingerprint") == self.fingerprint

    def manifest(self) -> dict[str, Any]:
        """What the finished folder says of itself; empty when there is none."""
        return _json(self.target / MANIFEST)

    def finish(
        self,
        top: Sequence[PiecewiseTensor],
        config: dict[str, Any],
        companions: Mapping[str, bytes],
        manifest: dict[str, Any],
    ) -> Path:
        """Join the shards, add configuration and companions (file name to content) and put the folder in
        place.

        Raises:
            OutputError: no room.
        """
        with writing(self.partial):
            write_safetensors(self.partial / f"{_TOP}.safetensors", top)
            parts = [self.partial / f"{_TOP}.safetensors"]
            parts += [self.layer_file(entry.layer) for entry in self.finished()]
            ready = self._ready()
            self._join(parts, ready)
            self._put(ready, config, companions, {**manifest, "fingerprint": self.fingerprint})
        return self.target

    def finish_shards(
        self,
        tensors: Sequence[Sequence[str]],
        total: int,
        config: dict[str, Any],
        companions: Mapping[str, bytes],
        manifest: dict[str, Any],
    ) -> Path:
        """As ``finish`` of layers that are shards already: nothing is copied.

        Args:
            tensors: The names of those in each.
            total: Bytes of all of them.
            config: As ``finish``.
            companions: As ``finish``.
            manifest: As ``finish``, with the fingerprint of what the folder holds.

        Raises:
            OutputError: no room.
        """
        with writing(self.partial):
            ready = self._ready()
            names = _shard_names(len(tensors))
            for layer, name in enumerate(names):
                self.layer_file(layer).replace(ready / name)
            _write_index(ready, dict(zip(names, tensors, strict=True)), total)
            self._put(ready, config, companions, manifest)
        return self.target

    def _ready(self) -> Path:
        ready = self.partial / "ready"
        shutil.rmtree(ready, ignore_errors=True)
        ready.mkdir()
        return ready

    def _put(
        self, ready: Path, config: dict[str, Any], companions: Mapping[str, bytes], manifest: dict[str, Any]
    ) -> None:
        """Put what goes beside the shards into the folder, and the folder in place."""
        for name, content in companions.items():
            _write(ready / name, content)
        _write(ready / LOG, self.log.encode())
        _write_json(ready / "config.json", config)
        _write_json(ready / MANIFEST, {**manifest, _SOURCE: self.source_sha256})
        if self.target.exists():
            self.target.replace(self.partial / "replaced")  # a folder of ours: __init__ made sure
        put_in_place(ready, self.target)
        self.discard()

    def _join(self, parts: Sequence[Path], ready: Path) -> None:
        """Group layer files into shards of about ``SHARD_BYTES``, and index them when there are several."""
        groups: list[list[Path]] = []
        room = 0
        for part in parts:
            size = part.stat().st_size
            if not groups or size > room:
                groups.append([])
                room = SHARD_BYTES
            groups[-1].append(part)
            room -= size
        held: dict[str, list[str]] = {}
        total = 0
        for name, group in zip(_shard_names(len(groups)), groups, strict=True):
            tensors = [tensor for part in group for tensor in stored_tensors(part)]
            write_safetensors(ready / name, tensors)
            held[name] = [tensor.name for tensor in tensors]
            total += sum(tensor.nbytes for tensor in tensors)
        _write_index(ready, held, total)


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_index(folder: Path, tensors: Mapping[str, Sequence[str]], total: int) -> None:
    """Say which shard holds what, where there are several."""
    if len(tensors) > 1:
        index = {tensor: shard for shard, names in tensors.items() for tensor in names}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is none or a kill cut it short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    with written_aside(path) as file:
        file.write(content)
