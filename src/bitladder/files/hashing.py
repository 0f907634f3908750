"""SHA-256 of files, remembered: a file that has not changed since is not read again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from bitladder.files.folders import cache_folder
from bitladder.progress import Progress, silent

_CHUNK = 8 << 20


def file_sha256(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of a file's bytes as hex; kept in the cache under its path, size and time of change
    (nanoseconds).
    """
    path = path.resolve()
    stat = path.stat()
    state = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    note = cache_folder("hashes", hashlib.sha256(str(path).encode()).hexdigest()[:32] + ".json")
    known = _read(note)
    if isinstance(digest := known.pop("sha256", None), str) and known == state:
        return digest
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        done = 0
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
            done += len(chunk)
            progress(f"hashing {path.name}", done, stat.st_size)
    _write(note, {**state, "sha256": hasher.hexdigest()})
    return hasher.hexdigest()


def _read(note: Path) -> dict[str, object]:
    try:
        value = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(note: Path, value: dict[str, object]) -> None:
    """Keep a note if the cache can be written; without it the file is hashed again next time."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(value, file)
        Path(name).replace(note)
    except OSError:
        return
