"""Whether a file may be written where the user says: one answer for every verb.

What a user names as an output may be a file that they need: the very model that is read, a workload written by hand, a
level of another model with the same name. A verb says what it writes, what it reads, and how its own earlier output is
known; everything else that is there stays, unless the user says ``--force``. No verb ever writes over what it reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from bitladder.errors import OutputError, UsageError

Ours = Callable[[Path], bool]
"""Whether a file that is there was made by Bitladder, is of the kind that would be written, and comes from the same
source."""

_ELSEWHERE = "Choose another place with --out."
_MOST_READ = 64 << 20
"""Texts of ours are smaller; what is larger is something else."""


def check_output(
    path: Path, what: str, *, inputs: Iterable[Path] = (), ours: Ours | None = None, force: bool | None = None
) -> None:
    """Refuse to write where a file would be lost that nobody gave up.

    Args:
        path: what would be written, a file or a folder.
        what: its kind, for the message: ``an importance matrix``.
        inputs: files and folders that it is made from; links to them and other spellings count, ``force`` does not
            help.
        ours: knows an earlier output of the same kind and source, which may be replaced; None where nothing may.
        force: whether the user said that what is there may go; None where a verb has no such option.

    Raises:
        UsageError: ``path`` is an input, is no ordinary file or folder, or is something else of the user's.
        OutputError: it would lie in something that is no folder.
    """
    place = _ELSEWHERE
    for one in inputs:
        if same_place(path, one):
            raise UsageError(f"{_titled(what)} would be written over its own source, {path}.", do=place)
    _standing(path, path.parents)
    if str(path) == "-":
        raise UsageError(f"{_titled(what)} cannot go to standard output.", do="Name a file.")
    if not os.path.lexists(path):
        return
    is_known = ours is not None and (path.is_file() or path.is_dir()) and ours(path)
    if path.is_dir() and not is_known:
        raise UsageError(
            f"{path} exists, and is a folder that Bitladder did not write from the same source.",
            means=f"{_titled(what)} in its place would destroy what is there, or mix two.",
            do=place,
        )
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(f"{path} is no ordinary file.", do=place)
    if is_known or force:
        return
    found = f"{path} exists, and is not {what} made from the same source."
    if not path.exists():
        found = f"{path} is a link to something that is not there."
    do = place if force is None else "Choose another place, or give --force to replace it."
    raise UsageError(found, means="Writing there would destroy it.", do=do)


def check_folder(folder: Path) -> None:
    """Refuse a folder that nothing can be written into, before the work whose results go there. It is not made yet.

    Raises:
        OutputError: it lies in something that is no folder, or is closed to this user.
    """
    within = _standing(folder, (folder, *folder.parents))
    if within is not None and not os.access(within, os.W_OK | os.X_OK):
        raise OutputError(
            f"{folder} cannot be written: {within} is closed to you.",
            means="It is read-only, or belongs to somebody else.",
            do=_ELSEWHERE,
        )


def _standing(path: Path, places: Iterable[Path]) -> Path | None:
    """The first of some places that is there; raises OutputError where it is no folder, so that ``path`` cannot be."""
    within = next((place for place in places if os.path.lexists(place)), None)
    if within is not None and not within.is_dir():
        raise OutputError(f"{path} cannot be written: {within} is no folder.", do=_ELSEWHERE)
    return within


def same_place(path: Path, other: Path) -> bool:
    """Whether two paths are one file: by device and inode, which sees through links, spellings and letter case; by
    name where one is not there yet."""
    try:
        return path.samefile(other)
    except OSError:
        pass
    try:
        return path.resolve() == other.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False


def holding(*marks: str) -> Ours:
    """Knows a text by what our writer put into it: every mark is there. An empty mark, of a source whose hash is not
    known, is in no text."""

    def is_ours(path: Path) -> bool:
        data = _read(path)
        return bool(data) and all(mark and mark.encode() in data for mark in marks)

    return is_ours


def same_text(content: str) -> Ours:
    """Knows what would be written: a text that the user has changed since is theirs."""

    def is_ours(path: Path) -> bool:
        return _read(path) == content.encode()

    return is_ours


def _read(path: Path) -> bytes:
    """A file's bytes; none where it cannot be read, is a folder or larger than any text of ours."""
    try:
        return path.read_bytes() if path.stat().st_size <= _MOST_READ else b""
    except OSError:
        return b""


def _titled(what: str) -> str:
    return what[:1].upper() + what[1:]
