"""A checkpoint folder written layer by layer: resumable while it grows, complete or absent when it is done.

``files/layer_store.py`` collects the layers. At the end they are joined into shards, the configuration, tokenizer
and log come beside them, and the folder is renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitladder.errors import OutputError
from bitladder.files.layer_store import LayerStore, writing
from bitladder.files.safetensors_writer import PiecewiseTensor, stored_tensors, write_safetensors
from bitladder.units import GiB

MANIFEST = "bitladder.json"
SHARD_BYTES = GiB
LOG = "bitladder-log.jsonl"
"""One line per quantized tensor, in the order in which they were made."""
_TOP = "top"


class CheckpointFolder(LayerStore):
    """The writer."""

    def __init__(self, target: Path, fingerprint: str) -> None:
        """Raises OutputError where ``target`` is a folder that Bitladder did not write, or cannot be
        written."""
        if target.exists() and not (target / MANIFEST).is_file():
            raise OutputError(
                f"{target} exists and was not written by Bitladder.",
                means="Writing there would mix two checkpoints or destroy one.",
                do="Choose another --out, or move the folder away.",
            )
        super().__init__(target, fingerprint)

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
                (ready / name).write_bytes(content)
            (ready / LOG).write_text(self.log, encoding="utf-8")
            _write_json(ready / "config.json", config)
            _write_json(ready / MANIFEST, {**manifest, "fingerprint": self.fingerprint})
            for path in ready.iterdir():
                _sync(path)
            if self.target.exists():
                old = self.partial / "replaced"
                os.replace(self.target, old)  # noqa: PTH105 - a folder of ours: __init__ made sure
            os.replace(ready, self.target)  # noqa: PTH105
            _sync(self.target.parent)
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
