"""What differs between operating systems, in one place: Linux, macOS, Windows.

Modules and functions that only some systems have are looked for here, each with what stands in for it elsewhere. No
other module imports ``fcntl``, ``resource``, ``pwd`` or ``msvcrt``, or asks which system this is in order to call them
(``tests/test_systems.py``).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

fcntl: Any
resource: Any
pwd: Any
try:
    import fcntl
    import pwd
    import resource
except ImportError:
    fcntl = resource = pwd = None

WINDOWS = sys.platform == "win32"
MACOS = sys.platform == "darwin"
LINUX = sys.platform.startswith("linux")
CAN_FORK = hasattr(os, "fork")
HAS_PROCESS_LIMITS = resource is not None
"""A process can bound its own memory, time and files for good."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Numbers of errors of a write for which there is no room."""

_MACOS_FILES = 10240
"""OPEN_MAX, which macOS enforces whatever its limit says."""
_LOCKED_BYTE = 1 << 40
"""On Windows a lock is on bytes, and keeps others from reading them: on one that no file has."""
_seeking = threading.Lock()


def spin_limit(environment: Mapping[str, str]) -> dict[str, str]:
    """What an environment lacks for libgomp's threads (llama.cpp's, torch's, those of compiled loops) to wait without
    keeping cores from others; nothing where the user said how they wait.

    They wait for each other by spinning, and beside a busy process one that spins long takes the core of the thread it
    waits for. 2000 turns cost nothing when it is quiet (``benchmarks/engine_spin.py``).
    """
    said = any(name in environment for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    return {} if said else {"GOMP_SPINCOUNT": "2000"}


def open_file(path: Path, *flags: str, mode: int = 0o666) -> int:
    """``os.open`` with flags by their names, those that this system has; bytes as they are, not for children.

    Raises:
        OSError: as ``os.open``; a link where ``O_NOFOLLOW`` is named.
    """
    if "O_NOFOLLOW" in flags and not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    found = 0
    for name in (*flags, "O_CLOEXEC", "O_NOINHERIT", "O_BINARY"):
        found |= getattr(os, name, 0)
    return os.open(path, found, mode)


def lock_alone(handle: int) -> bool:
    """Whether this process has an open file alone, from now until it is closed."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif WINDOWS:
            _lock_byte(handle)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK, getattr(errno, "EDEADLOCK", errno.EDEADLK)):
            return False
        raise
    return True


def claim(handle: int, path: Path) -> bool:
    """The same, of a file that still lies under its name: its owner may just have finished and moved it."""
    try:
        return lock_alone(handle) and path.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _lock_byte(handle: int) -> None:
    import importlib

    msvcrt: Any = importlib.import_module("msvcrt")
    with _seeking:
        at = os.lseek(handle, 0, os.SEEK_CUR)
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(handle, at, os.SEEK_SET)


def read_at(handle: int, count: int, offset: int) -> bytes:
    """Up to ``count`` bytes of an open file from ``offset`` on, whatever other threads read."""
    if hasattr(os, "pread"):
        return os.pread(handle, count, offset)
    with _seeking:
        os.lseek(handle, offset, os.SEEK_SET)
        return os.read(handle, count)


def read_into(handle: int, room: memoryview, offset: int) -> int:
    """Read an open file from ``offset`` on into ``room``, as far as it goes; returns how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [room], offset)
    found = read_at(handle, len(room), offset)
    room[: len(found)] = found
    return len(found)


def write_at(handle: int, data: bytes | memoryview, offset: int) -> int:
    """Write bytes at ``offset`` of an open file, whatever other threads write; returns how many were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(handle, data, offset)
    with _seeking:
        os.lseek(handle, offset, os.SEEK_SET)
        return os.write(handle, data)


def flush_data(handle: int) -> None:
    """Returns when the disk has what was written to an open file."""
    getattr(os, "fdatasync", os.fsync)(handle)  # macOS and Windows have no such call


def flush_entry(path: Path) -> None:
    """Returns when the disk has a file's contents, or a folder's names; Windows flushes no folders."""
    if WINDOWS and path.is_dir():
        return
    handle = open_file(path, "O_RDWR" if WINDOWS else "O_RDONLY")  # there only who may write may flush
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_mode(handle: int, mode: int) -> None:
    """Give an open file the permissions ``mode``, where files have them."""
    if hasattr(os, "fchmod"):
        os.fchmod(handle, mode)


def reserve(handle: int, size: int) -> None:
    """Take ``size`` bytes of disk for an open file now, so that a full disk is an error here.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    if shutil.disk_usage(Path.cwd() if WINDOWS else handle).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(handle, size)


def drop_pages(mapped: mmap.mmap, start: int, length: int) -> None:
    """Give back mapped pages; the system's cache keeps what it can. Elsewhere the system decides alone."""
    if hasattr(mapped, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, start, length)


def drop_cached(handle: int, start: int = 0, length: int = 0) -> None:
    """Ask the system to forget what it keeps in memory of a stretch of a file (0 bytes: to its end), where it takes
    such wishes. What is not on the disk yet stays, and Linux begins to write it: by itself it waits up to half a
    minute, and who flushes the file in the end waits for all of it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, start, length, os.POSIX_FADV_DONTNEED)


def allow_open_files(wanted: int) -> int:
    """Let this process have ``wanted`` open files, or as near to it as it may; returns how many it may have now."""
    if resource is None:
        return sys.maxsize  # Windows: as many as there is memory for
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= wanted:
        return sys.maxsize if soft == unlimited else soft
    most = wanted if hard == unlimited else min(wanted, hard)
    for count in (most, min(most, _MACOS_FILES)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
            return count
    return int(soft)


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    if resource is None:
        import psutil

        found: Any = psutil.Process().memory_info()  # peak_wset is Windows' own
        return int(found.peak_wset)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if MACOS else 1024)


def user() -> tuple[str, int, int] | None:
    """Name, number and group of who runs this; None where users have no numbers."""
    if pwd is None or not hasattr(os, "getuid"):
        return None
    found = pwd.getpwuid(os.getuid())
    return found.pw_name, found.pw_uid, found.pw_gid


def ended_by(code: int | None, *signals: str) -> bool:
    """Whether a process's exit code says that one of these signals, by name, ended it. On Windows none does."""
    return code in {-getattr(signal, name) for name in signals if hasattr(signal, name)}


def c_library() -> Any | None:
    """The C library that this process runs in; None where it cannot be had so."""
    with contextlib.suppress(OSError, TypeError):  # TypeError: Windows
        return ctypes.CDLL(None)
    return None


def own_group() -> dict[str, Any]:
    """Options of ``subprocess.Popen`` for a child that a terminal's Ctrl-C does not reach, nor what it starts: one that
    its parent still needs in order to end well. It must notice by itself when the parent is gone (``wait_for_parent``).
    """
    if WINDOWS:
        import subprocess

        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"process_group": 0}


def die_with_parent(on: bool = True) -> None:
    """Linux's parent-death signal: this process is killed when the *thread* that started it ends."""
    library = c_library() if LINUX else None
    if library is not None:
        pr_set_pdeathsig = 1
        library.prctl(pr_set_pdeathsig, signal.SIGKILL if on else 0)


def wait_for_parent(parent: int) -> None:
    """Returns when standard input closes, or this process's parent is another one."""
    while True:
        if WINDOWS:  # selects sockets only; whoever ends closes the pipe
            readable = [0]
        else:
            readable, _, _ = select.select([0], [], [], 1.0)
        if (readable and not os.read(0, 4096)) or os.getppid() != parent:
            return


def refer_to(there: Path, name: Path) -> None:
    """Give a file a second name to be read by: a link; where links need rights (Windows) a hard link, else a copy.

    Raises:
        OSError: the folder cannot be written, or ``name`` is taken.
    """
    try:
        name.symlink_to(there)
    except (OSError, NotImplementedError):
        if not WINDOWS:
            raise
        try:
            os.link(there, name)
        except OSError:
            shutil.copyfile(there, name)
