"""Write a GGUF file in pieces, in any order, so that it is either complete under its name or not there at
all.

    <name>.partial            the file in the making; every piece is written at its final place
    <name>.partial.journal    line 1: what is being made; then a line per finished tensor: number, SHA-256

A process that dies leaves both. Whoever makes the same file again opens them, checks every tensor the journal
lists against its hash, and makes only the rest. At the end the file is flushed to the disk, renamed, and the
journal removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bitladder import system
from bitladder.errors import OutputError
from bitladder.files.atomic import put_in_place
from bitladder.formats import gguf
from bitladder.formats.blocks import QTYPES
from bitladder.formats.tensors import TensorInfo
from bitladder.units import human_bytes

Buffer = bytes | bytearray | memoryview
_OTHER_FILES = 256
_FLUSH_FROM = 32 << 20
"""Bytes of a file that wait for the disk: what is left for the end takes a few milliseconds."""


def encoded(kind: int, value: str | float | bool) -> bytes:
    """A value as a header stores it, its type in front."""
    head = struct.pack("<I", kind)
    if kind == gguf.STRING:
        text = str(value).encode()
        return head + struct.pack("<Q", len(text)) + text
    return head + struct.pack("<" + gguf.SCALARS[kind], value)


@dataclass(frozen=True)
class Layout:
    """A file's header and where its tensors go; offsets in bytes from the start of the file."""

    header: bytes
    offsets: tuple[int, ...]
    tensors: tuple[TensorInfo, ...]
    size: int


def layout(metadata: Mapping[str, bytes], tensors: Sequence[TensorInfo], alignment: int) -> Layout:
    """Lay out a file: ``metadata`` as encoded values by key, ``tensors`` in file order."""
    parts = [gguf.MAGIC, struct.pack("<IQQ", gguf.VERSION_WRITTEN, len(tensors), len(metadata))]
    for key, value in metadata.items():
        name = key.encode()
        parts += [struct.pack("<Q", len(name)), name, value]
    at, offsets = 0, []
    for tensor in tensors:
        name = tensor.name.encode()
        shape = tuple(reversed(tensor.shape))
        parts += [struct.pack("<Q", len(name)), name, struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts += [struct.pack("<IQ", QTYPES[tensor.qtype].ggml_type, at)]
        offsets.append(at)
        at += gguf.padded(tensor.nbytes, alignment)
    header = b"".join(parts)
    start = gguf.padded(len(header), alignment)
    header = header.ljust(start, b"\0")
    return Layout(header, tuple(start + offset for offset in offsets), tuple(tensors), start + at)


def cannot_write(path: Path, error: OSError, needed: int = 0) -> OutputError:
    """The error for the user when the system refuses a write."""
    if error.errno in system.FULL:
        reason = "the disk is full" if error.errno == errno.ENOSPC else "a limit on disk use or file size is reached"
        return OutputError(
            f"{path}: {reason}; {needed} bytes ({human_bytes(needed)}) are needed.",
            means="What was begun has been removed.",
            do="Free space, or choose another folder with --out.",
        )
    return OutputError(
        f"{path} cannot be written: {error.strerror}.",
        means="The folder is read-only, belongs to somebody else, or is no folder.",
        do="Choose another folder with --out.",
    )


def _open_own(path: Path, *flags: str) -> int:
    """Open a file in the making, or make it. In a folder that others can write to, a link of its name may lead
    anywhere: none is followed, and a file that has a second name is somebody's.

    Raises:
        OutputError: a link or something else that is not ours lies there.
        OSError: as ``os.open``.
    """
    strange = OutputError(
        f"{path} is a link, or no ordinary file.",
        means="It has the name of a file that Bitladder makes; writing there would change what it leads to.",
        do="Remove it, or choose another folder with --out.",
    )
    try:
        handle = system.open_file(path, *flags, "O_CREAT", "O_NOFOLLOW", "O_NONBLOCK")
    except OSError as error:
        if path.is_symlink() or (os.path.lexists(path) and not path.is_file()):
            raise strange from error
        raise
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise strange
    return handle


def allow_files(count: int) -> None:
    """Let this process have ``count`` files in the making, beside its others; systems start a process with 1,024.

    Raises:
        OutputError: the system's own limit is lower.
    """
    needed = count + _OTHER_FILES
    may = system.allow_open_files(needed)
    if may < needed:
        raise OutputError(
            f"{count} files are to be written at once; this system lets a process have {may}.",
            means="Every part of a split model is a file. Nothing was written.",
            do="Give a larger --split-max-size, write fewer levels at once, or raise the limit (ulimit -n).",
        )


class GgufWriter:
    """A file in the making. ``write`` may be called from several threads for different pieces.

    ``fingerprint`` says what is being made: a journal with another one is of no use, and its file is begun
    afresh. The header is written by ``finish``, so values of a known length may be filled in late.

    Raises:
        OutputError: the folder or file cannot be written.
    """

    def __init__(self, path: Path, plan: Layout, fingerprint: str) -> None:
        self.path = path
        self.plan = plan
        self.partial = self.partial_of(path)
        self.journal = path.with_name(path.name + ".partial.journal")
        self._first_line = f"{fingerprint} {plan.size}"
        self._claims = self._read_journal()
        self._file = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_own(self.partial, "O_RDWR")
            self._claim_alone()
            self._begin()
        except OSError as error:
            if self._file >= 0:
                os.close(self._file)
                self.partial.unlink(missing_ok=True)
                self.journal.unlink(missing_ok=True)
            raise cannot_write(path, error, plan.size) from error

    def _begin(self) -> None:
        """Take up what an earlier run left, or begin afresh: then padding must be zeros, whatever stood
        there.
        """
        if not self._claims:
            os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self.plan.size)
        if not self._claims:
            self.journal.unlink(missing_ok=True)  # a link that lies there goes, not what it leads to
            with self.journal.open("x") as log:
                log.write(self._first_line + "\n")

    @staticmethod
    def partial_of(path: Path) -> Path:
        """Where a file is while it is being made."""
        return path.with_name(path.name + ".partial")

    def _claim_alone(self) -> None:
        """Two processes must not write one file: the second is told so."""
        if not system.claim(self._file, self.partial):
            os.close(self._file)
            raise OutputError(
                f"{self.partial} is being written by another process.",
                means="Bitladder already makes this very file.",
                do="Wait for it to end, or choose another folder with --out.",
            )

    def _read_journal(self) -> dict[int, str]:
        """Tensors that an earlier run says it finished; a torn last line is no claim."""
        if not (self.partial.exists() and self.journal.exists()) or self.partial.stat().st_size != self.plan.size:
            return {}
        lines = self.journal.read_text(errors="replace").splitlines()
        if not lines or lines[0] != self._first_line:
            return {}
        claims = {}
        for line in lines[1:]:
            number, _, digest = line.partition(" ")
            if number.isdecimal() and int(number) < len(self.plan.tensors) and len(digest) == 64:
                claims[int(number)] = digest
        return claims

    def finished(self, number: int, digest_of: Callable[[Callable[[int, int], bytes]], str]) -> bool:
        """Whether an earlier run left tensor ``number`` complete. ``digest_of(read)`` computes the hash to
        compare.
        """
        if number not in self._claims:
            return False
        offset = self.plan.offsets[number]
        return digest_of(lambda at, count: system.read_at(self._file, count, offset + at)) == self._claims[number]

    def write(self, number: int, at: int, data: Buffer) -> None:
        """Write a piece of tensor ``number``, ``at`` bytes from its start."""
        try:
            self._write_at(data, self.plan.offsets[number] + at)
        except OSError as error:
            raise cannot_write(self.path, error, self.plan.size) from error

    def _write_at(self, data: Buffer, position: int) -> None:
        view = memoryview(data)
        while view:  # a disk that is nearly full takes a part, and says so at the next call
            written = system.write_at(self._file, view, position)
            view, position = view[written:], position + written

    def read(self, number: int, at: int, count: int) -> bytes:
        """Read ``count`` bytes of tensor ``number`` again, from byte ``at`` on."""
        try:
            return system.read_at(self._file, count, self.plan.offsets[number] + at)
        except OSError as error:
            raise cannot_write(self.path, error, self.plan.size) from error

    def done(self, number: int, digest: str) -> None:
        """Note that tensor ``number`` is complete and has this hash."""
        try:
            with os.fdopen(
                _open_own(self.journal, "O_WRONLY", "O_APPEND"), "w"
            ) as log:  # not kept open: a split model has thousands of parts
                log.write(f"{number} {digest}\n")
        except OSError as error:
            raise cannot_write(self.path, error, self.plan.size) from error

    def flush(self) -> None:
        """Ask the system to put what was written so far on the disk; returns when it has."""
        try:
            system.flush_data(self._file)
        except OSError as error:
            raise cannot_write(self.path, error, self.plan.size) from error

    def finish(self, header: bytes) -> None:
        """Write the header, put everything on the disk and give the file its name."""
        if len(header) != len(self.plan.header):
            raise ValueError(f"the header has {len(header)} bytes, {len(self.plan.header)} were laid out")
        try:
            self._write_at(header, 0)
            if system.WINDOWS:  # which renames no open file
                self.close()
            put_in_place(self.partial, self.path)  # still locked: nobody may take the file up under its old name
            self.journal.unlink()
            self.close()
        except OSError as error:
            raise cannot_write(self.path, error, self.plan.size) from error

    def close(self) -> None:
        """Let go, leaving what was made for a later run to go on from."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def discard(self) -> None:
        """Let go and remove everything."""
        if system.WINDOWS:  # which removes no open file
            self.close()
        self.partial.unlink(missing_ok=True)  # still locked: nobody may take up what goes
        self.journal.unlink(missing_ok=True)
        self.close()


class Flusher:
    """Puts files on the disk while they grow, by a thread of its own, so that their end need not wait for all of it.

    Use as a context manager around the writing.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._running: Future[None] | None = None
        self._waiting: Counter[GgufWriter] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def wrote(self, writer: GgufWriter, count: int) -> None:
        """Told that ``count`` bytes were written. Raises OutputError where the disk did not take earlier ones."""
        self._waiting[writer] += count
        if self._waiting[writer] < _FLUSH_FROM or (self._running is not None and not self._running.done()):
            return
        if self._running is not None:
            self._running.result()
        self._waiting[writer] = 0
        self._running = self._pool.submit(writer.flush)


def piece_digest(digests: Sequence[bytes]) -> str:
    """A tensor's hash from the hashes of its pieces, in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
