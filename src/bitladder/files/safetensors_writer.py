"""Safetensors files written piece by piece, so that what a file holds need never be in memory at once.

The library's own writer wants every tensor of a file beside each other, and copies them: an embedding and a head of
128,256 rows of 4,096 took 7 GB that way. Layout: see ``files/checkpoint.py``. Tensors with wide elements come first, so
that each begins at a multiple of its element's size, as readers that map the file expect.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from bitladder import system
from bitladder.files.atomic import written_aside
from bitladder.files.checkpoint import DTYPE_BYTES, CheckpointTensor, read_safetensors_header
from bitladder.files.regular import open_regular

_AT_ONCE = 2**22
_ALIGNED = 8
_SOON = 1 << 16
"""Bytes that are worth a request to the disk as soon as they are written."""


@dataclass(frozen=True)
class PiecewiseTensor:
    """A tensor whose bytes are made when they are written."""

    name: str
    dtype: str
    """As safetensors calls it: ``F16``."""
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes | memoryview]]
    """Its data, in order."""

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def write_safetensors(
    path: Path, tensors: Sequence[PiecewiseTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file, whole under its name or not at all.

    Raises:
        OSError: no room.
        ValueError: two tensors of one name, or one whose pieces are not as long as its shape says.
    """
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    head, _ = _header(ordered, metadata)
    with written_aside(path) as file:
        file.write(head)
        for tensor in ordered:
            written = sum(file.write(piece) for piece in tensor.pieces())
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes where its shape takes {tensor.nbytes}")


class PlacedTensors:
    """A safetensors file whose tensors are written piece by piece, in any order."""

    def __init__(self, file: BinaryIO, starts: Mapping[str, int]) -> None:
        self._file, self._starts = file, starts

    def write(self, name: str, at: int, data: bytes | memoryview) -> None:
        """Put bytes of a tensor where they belong, ``at`` bytes after its beginning."""
        start = self._starts[name] + at
        self._file.seek(start)
        self._file.write(data)
        if len(data) >= _SOON:
            self._file.flush()
            system.drop_cached(self._file.fileno(), start, len(data))  # begins to write it


@contextmanager
def placed_safetensors(path: Path, tensors: Sequence[CheckpointTensor]) -> Iterator[PlacedTensors]:
    """A file for tensors of these names, types and shapes, whole under its name when the block ends well. What the
    block does not write is zero.

    Raises:
        OSError: no room.
        ValueError: two tensors of one name.
    """
    head, starts = _header(sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype]), None)
    with written_aside(path) as file:
        file.truncate(len(head) + sum(tensor.nbytes for tensor in tensors))
        file.write(head)
        yield PlacedTensors(file, {name: len(head) + start for name, start in starts.items()})


def _header(
    ordered: Sequence[PiecewiseTensor | CheckpointTensor], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """What a file begins with, and where each tensor begins behind it."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts: dict[str, int] = {}
    end = 0
    for tensor in ordered:
        if tensor.name in table:
            raise ValueError(f"two tensors are called {tensor.name}")
        start, end = end, end + tensor.nbytes
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        starts[tensor.name] = start
    head = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNED)
    return len(head).to_bytes(8, "little") + head, starts


def stored_tensors(path: Path) -> list[PiecewiseTensor]:
    """The tensors of a file, to be written again elsewhere.

    Raises:
        BadFile: it contradicts itself.
    """
    tensors = read_safetensors_header(path)
    at = path.stat().st_size - sum(tensor.nbytes for tensor in tensors)
    found = []
    for tensor in tensors:
        pieces = partial(_read, path, at, tensor.nbytes)
        found.append(PiecewiseTensor(tensor.name, tensor.dtype, tensor.shape, pieces))
        at += tensor.nbytes
    return found


def tensor_hashes(path: Path) -> Iterator[tuple[str, str]]:
    """The name of every tensor of a file, and the SHA-256 hash (hex) of its bytes: processors have instructions for it.
    The system need not keep what was read.

    Raises:
        BadFile: the file contradicts itself, or cannot be read.
    """
    headers = read_safetensors_header(path)
    room = memoryview(bytearray(_AT_ONCE))
    with open_regular(path) as file:
        file.seek(path.stat().st_size - sum(tensor.nbytes for tensor in headers))
        for tensor in headers:
            found, left = hashlib.sha256(), tensor.nbytes
            while left and (count := file.readinto(room[: min(left, len(room))])):  # type: ignore[attr-defined]
                found.update(room[:count])
                left -= count
                system.drop_cached(file.fileno(), file.tell() - count, count)
            yield tensor.name, found.hexdigest()


def _read(path: Path, start: int, nbytes: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while nbytes:
            piece = file.read(min(nbytes, _AT_ONCE))
            if not piece:
                return
            nbytes -= len(piece)
            yield piece
