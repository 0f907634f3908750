"""Messages through a pipe of their own: a kind, a few words, and numbers.

Each is a header (``<IQ``: bytes of the note, bytes of the numbers), a note in JSON and numbers as f64. Who receives
bounds both before any memory is taken, since a process that computes on a stranger's file may have gone astray.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

_HEADER = struct.Struct("<IQ")
_NOTE_BYTES = 1 << 16


@dataclass(frozen=True)
class Message:
    """``note`` holds what the sender added to the kind; ``numbers`` is f64[n]."""

    kind: str
    note: dict[str, Any]
    numbers: NDArray[np.float64]


class BadMessage(Exception):
    """What came is no message, or larger than it may be."""


class Sender:
    """The writing end, by file descriptor."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # a debugger that a crash starts must not hold it open
        self._file: IO[bytes] = os.fdopen(descriptor, "wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def send(self, kind: str, numbers: NDArray[np.floating] | None = None, **note: str) -> None:
        """Send one message at once."""
        words = json.dumps({"kind": kind, **note}).encode()[:_NOTE_BYTES]
        body = b"" if numbers is None else np.ascontiguousarray(numbers, "<f8").tobytes()
        self._file.write(_HEADER.pack(len(words), len(body)) + words)
        self._file.write(body)
        self._file.flush()


def receive(file: IO[bytes], most: int) -> Message | None:
    """The next message, of at most ``most`` numbers; None at the end, also where a message was cut short.

    Raises:
        BadMessage: it is none, or too large.
    """
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    words, body = _HEADER.unpack(header)
    if words > _NOTE_BYTES or body > 8 * most or body % 8:
        raise BadMessage(f"a message of {words} and {body} bytes")
    note, numbers = file.read(words), file.read(body)
    if len(note) < words or len(numbers) < body:
        return None
    try:
        found = json.loads(note)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise BadMessage("a note that is no note")
    return Message(found.pop("kind"), found, np.frombuffer(numbers, "<f8"))
