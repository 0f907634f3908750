"""What Linux' control groups leave to this process: memory and processor time within every limit on the path from its
own group to the root, version 1 and 2, wherever they are mounted.

Functions take ``root``, the folder under which ``proc`` and ``sys`` lie: ``/``, or a recorded tree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
_NO_LIMIT = 1 << 60
"""What version 1 writes for "no limit" lies above, rounded to a page."""


class GroupMemory(NamedTuple):
    """Bytes. All 0 without a limit."""

    limit: int
    """The least limit along the path."""
    used: int
    """What of it is not to be had: it is used, or a group above has less left."""


class _MemoryFiles(NamedTuple):
    """What a version calls its files and figures."""

    limits: tuple[str, ...]
    used: str
    above: str
    """In ``memory.stat``: the least limit of the groups above, those that cannot be seen from within too."""
    given_back: tuple[str, ...]
    """In ``memory.stat``: what the kernel gives back before it refuses memory."""


_MEMORY = (
    _MemoryFiles(
        ("memory.max", "memory.high"), "memory.current", "", ("inactive_file", "active_file", "slab_reclaimable")
    ),
    _MemoryFiles(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", "hierarchical_memory_limit",
        ("total_inactive_file", "total_active_file"),
    ),
)  # fmt: skip


def group_memory(root: Path = ROOT) -> GroupMemory:
    """The limit on memory and what of it is taken.

    Page cache, active or not, does not count as used: the kernel gives it back before it refuses memory.
    """
    limits, left = [], []
    for folder in _groups("memory", root):
        stats = dict(line.split(maxsplit=1) for line in read(folder / "memory.stat").splitlines() if " " in line)
        for files in _MEMORY:
            own = [_whole(read(folder / name)) for name in files.limits]
            known = [limit for limit in (*own, _whole(stats.get(files.above, ""))) if 0 < limit < _NO_LIMIT]
            if not known:
                continue
            used = _whole(read(folder / files.used)) - sum(_whole(stats.get(key, "")) for key in files.given_back)
            limits.append(min(known))
            left.append(min(known) - max(0, used))
    if not limits:
        return GroupMemory(0, 0)
    return GroupMemory(min(limits), max(0, min(limits) - min(left)))


def cpu_quota(root: Path = ROOT) -> float:
    """Cores' worth of processor time; infinity without a quota."""
    least = math.inf
    for folder in _groups("cpu", root):
        if text := read(folder / "cpu.max"):  # version 2: "200000 100000" or "max 100000"
            quota, period = (_whole(part) for part in f"{text} 100000".split()[:2])
        else:  # version 1: -1 when there is none
            quota, period = (_whole(read(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota and period:
            least = min(least, quota / period)
    return least


class _Mount(NamedTuple):
    """A tree of control groups."""

    point: Path
    top: tuple[str, ...]
    """The group that lies at the mount point, as parts of its path."""
    controllers: frozenset[str]
    """None: version 2, one tree for all."""


def _groups(controller: str, root: Path) -> list[Path]:
    """Folders of the control groups that bound this process, its own first and what is mounted last: limits of all of
    them hold.
    """
    found = []
    for mount in _mounts(root) or _usual_mounts(controller):
        if mount.controllers and controller not in mount.controllers:
            continue
        parts = _own_group(mount, controller, root)
        at = root.joinpath(*mount.point.parts[1:])
        found += [at.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return list(dict.fromkeys(found))


def _mounts(root: Path) -> list[_Mount]:
    """Where trees of control groups are mounted, by the kernel's own list."""
    found = []
    for line in read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        places, kinds = left.split(), right.split()
        if len(places) < 5 or not kinds or kinds[0] not in ("cgroup", "cgroup2"):
            continue
        top, point = (_unescaped(place) for place in places[3:5])
        controllers = frozenset(kinds[-1].split(",")) if kinds[0] == "cgroup" else frozenset[str]()
        found.append(_Mount(Path(point), _parts(top), controllers))
    return found


def _usual_mounts(controller: str) -> Iterator[_Mount]:
    """For a system without that list."""
    usual = Path("/sys/fs/cgroup")
    yield _Mount(usual, (), frozenset())
    yield _Mount(usual / controller, (), frozenset({controller}))


def _own_group(mount: _Mount, controller: str, root: Path) -> tuple[str, ...]:
    """This process's group, as parts below the mount point; none where its path is one that is not seen from here (a
    container that is told the host's).
    """
    for line in read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller in names.split(",") if mount.controllers else (number == "0" and not names):
            parts = _parts(path)
            inside = parts[: len(mount.top)] == mount.top and ".." not in parts
            return parts[len(mount.top) :] if inside else ()
    return ()


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


def _unescaped(text: str) -> str:
    """Spaces and the like, which the list of mounts writes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _whole(text: str) -> int:
    """A kernel file's count; 0 where it says "max", -1 or nothing."""
    return int(text) if text.isdecimal() and len(text) < 20 else 0


def read(path: Path) -> str:
    """A small kernel file's text, or nothing where this system has no such file."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
