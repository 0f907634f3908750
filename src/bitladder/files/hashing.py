"""SHA-256 of files and folders, remembered: a file that has not changed since is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from bitladder.errors import OutputError
from bitladder.files.atomic import write_whole
from bitladder.files.folders import cache_folder, cache_key
from bitladder.files.regular import open_regular
from bitladder.progress import Progress, silent

_CHUNK = 8 << 20


def file_sha256(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of a file's bytes as hex; kept in the cache as long as nothing says that the file changed."""
    known = recall(path)
    if known is not None:
        return known
    size = path.stat().st_size
    hasher, before = hashlib.sha256(), state_of(path)
    with open_regular(path) as file:
        done = 0
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
            done += len(chunk)
            progress(f"hashing {path.name}", done, size)
    remember(path, hasher.hexdigest(), before)
    return hasher.hexdigest()


def folder_sha256(folder: Path, progress: Progress = silent, *, without: Collection[str] = ()) -> str:
    """SHA-256 as hex over the names and hashes of a folder's files, sorted by name; folders in it are left out.

    ``without``: names of files that do not count, such as notes of when and how fast it was made.
    """
    files = (path for path in folder.iterdir() if path.is_file() and path.name not in without)
    hasher = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        hasher.update(path.name.encode() + b"\0" + bytes.fromhex(file_sha256(path, progress)))
    return hasher.hexdigest()


def recall(path: Path) -> str | None:
    """The hash kept for a file that has not changed since, or None."""
    note, state = _note(path)
    known = _read(note)
    digest = known.pop("sha256", None)
    return digest if isinstance(digest, str) and known == state else None


def state_of(path: Path) -> dict[str, object]:
    """What must be unchanged for a hash of a file to hold, taken before the file is read."""
    return _note(path)[1]


def remember(path: Path, digest: str, before: dict[str, object]) -> None:
    """Keep a hash that somebody computed while reading the file for another purpose; not where the file is no longer
    what it was ``before`` (``state_of``): then part of what was hashed may be gone."""
    note, state = _note(path)
    if state == before:
        _write(note, {**state, "sha256": digest})


def _note(path: Path) -> tuple[Path, dict[str, object]]:
    """Where a file's hash is kept, and what must be unchanged for it to hold. Programs that copy files set size and
    time of modification as they like; a file's number and the time at which its entry changed they cannot set."""
    path = path.resolve()
    stat = path.stat()
    note = cache_folder("hashes", f"{cache_key(str(path))[:32]}.json")
    state = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}
    return note, {"path": str(path), "device": stat.st_dev, **state}


def _read(note: Path) -> dict[str, object]:
    try:
        value = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(note: Path, value: dict[str, object]) -> None:
    """Keep a note if the cache can be written; without it the file is hashed again next time."""
    with contextlib.suppress(OutputError):
        write_whole(note, json.dumps(value))
