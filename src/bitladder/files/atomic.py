"""Files written whole or not at all: aside under a name that nothing has, flushed to the disk, renamed, and the rename
flushed. What a library or a longer job makes under a name of its own gets its place by ``put_in_place``."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bitladder import system
from bitladder.errors import OutputError


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name ``path`` when the block ends well, and is removed when it does not.

    It is made beside ``path`` (whose folder is made, too) under a name that did not exist, so nothing is written
    through a link that lies there; a link under the name itself is replaced, not followed. It gets the permissions of
    the file it replaces, or those of any new file. Libraries that want a path take the file's ``name``.

    Raises:
        OSError: no space, no permission. What was under the name before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:  # x: neither a file nor a link may be there
            yield file
        with part.open("r+b") as written:  # again: a library may have put another file under the name
            with suppress(FileNotFoundError):
                system.copy_mode(written.fileno(), stat.S_IMODE(path.stat().st_mode))
            os.fsync(written.fileno())
        _rename(part, path)
    except BaseException:
        with suppress(OSError):  # where nothing could be written, nothing can be removed either
            part.unlink()
        raise


def write_whole(path: Path, content: str | bytes, *, do: str = "Name another place with --out.") -> Path:
    """Write a file and its folder; returns the path. ``do`` is the advice where that fails.

    Raises:
        OutputError: no space, no permission. What was under the name before is still there.
    """
    try:
        with written_aside(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.", do=do) from error
    return path


def put_in_place(made: Path, path: Path) -> Path:
    """Give a finished file or folder its name, once its contents are on the disk; returns the path.

    Both lie in one file system, and links in the folder are not followed. Over a file of that name, or an empty folder;
    another folder must be moved away first.

    Raises:
        OSError: no space, no permission, or a folder with something in it lies there.
    """
    for inner in [*made.rglob("*"), made]:
        if not inner.is_symlink() and (inner.is_file() or inner.is_dir()):
            system.flush_entry(inner)
    _rename(made, path)
    return path


def _rename(made: Path, path: Path) -> None:
    made.replace(path)
    with suppress(OSError):  # it has its name; a folder that nobody may list, or some file systems, cannot be flushed
        system.flush_entry(path.parent)
