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
            ready = self.partial / "ready"
            shutil.rmtree(ready, ignore_errors=True)
            ready.mkdir()
            parts = [self.partial / f"{_TOP}.safetensors"]
            parts += [self.layer_file(entry.layer) for entry in self.finished()]
            self._join(parts, ready)
            for name, content in companions.items():
                _write(ready / name, content)
            _write(ready / LOG, self.log.encode())
            _write_json(ready / "config.json", config)
            _write_json(ready / MANIFEST, {**manifest, _SOURCE: self.source_sha256, "fingerprint": self.fingerprint})
            if self.target.exists():
                self.target.replace(self.partial / "replaced")  # a folder of ours: __init__ made sure
            put_in_place(ready, self.target)
            self.discard()
        return self.target

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
        index: dict[str, str] = {}
        total = 0
        for number, group in enumerate(groups, 1):
            name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = [tensor for part in group for tensor in stored_tensors(part)]
            write_safetensors(ready / name, tensors)
            index |= {tensor.name: name for tensor in tensors}
            total += sum(tensor.nbytes for tensor in tensors)
        if len(groups) > 1:
            _write_json(
                ready / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": index},
            )


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
