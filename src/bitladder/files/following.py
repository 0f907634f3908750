"""SHA-256 of files that are being read anyway: a thread hashes just behind the reader, so the disk is asked
once.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from bitladder.errors import BadInput
from bitladder.files.hashing import recall, remember, state_of

AHEAD = 256 << 20
"""Bytes that hashing may run ahead of a reader: it warms the cache, and has work while other modules are loaded."""
_CHUNK = 4 << 20
_HELD = 8
"""Pieces that wait to be hashed."""


class FollowingHash:
    """Hashes ``paths`` one after another, never past the point that ``advance`` has named.

    Files whose hash is known from before are not read. ``states``: what each was before it was read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self.states = [state_of(path) for path in self._paths]
        self._digests: list[str | None] = [recall(path) for path in self._paths]
        self._goal = (0, 0)
        self._abandoned = self._ended = False
        self._fed: deque[tuple[int, int, memoryview]] = deque()
        self._changed = threading.Condition()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="source hash")
        self._thread.start()

    def advance(self, file: int, offset: int) -> None:
        """The reader has come to byte ``offset`` of file number ``file``, and is done with the files before
        it.
        """
        with self._changed:
            self._goal = max(self._goal, (file, offset))
            self._changed.notify_all()

    def feed(self, file: int, offset: int, data: memoryview) -> None:
        """The reader has come to ``offset`` and gives what it has read there, which need not be read once more; what it
        left out before is read. Waits while several pieces have not been hashed."""
        if self._digests[file] is not None:
            return
        with self._changed:
            self._changed.wait_for(lambda: len(self._fed) < _HELD or self._ended)
            self._fed.append((file, offset, data))
            self._goal = max(self._goal, (file, offset + len(data)))
            self._changed.notify_all()

    def result(self) -> list[str]:
        """The hash of every file, once the rest has been read.

        Raises:
            BadInput: a file cannot be read, or has changed meanwhile.
        """
        self.advance(len(self._paths), 0)
        self._thread.join()
        if self._failure is not None:
            raise BadInput(
                f"The source cannot be read: {self._failure}.", do="Check the disk it lies on."
            ) from self._failure
        for path, state in zip(self._paths, self.states, strict=True):
            if state_of(path) != state:
                raise BadInput(
                    f"{path} changed while it was read.",
                    means="Another program writes to it.",
                    do="Wait until it is complete and try again.",
                )
        return [digest for digest in self._digests if digest is not None]

    def abandon(self) -> None:
        """Stop: nobody wants the result."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            for number, path in enumerate(self._paths):
                if self._digests[number] is None and not self._hash(number, path):
                    return
        except OSError as error:
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _next(self, number: int, at: int) -> memoryview | int:
        """The bytes at this place, where the reader gave them, else how many may be read next; waits until it is some.
        0: abandoned."""
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned or self._goal > (number, at))
            if self._abandoned:
                return 0
            while self._fed and self._fed[0][:2] < (number, at):
                self._fed.popleft()
            file, offset = self._fed[0][:2] if self._fed else self._goal
            if self._fed and (file, offset) == (number, at):
                self._changed.notify_all()
                return self._fed.popleft()[2]
            return _CHUNK if file > number else min(_CHUNK, offset - at)

    def _hash(self, number: int, path: Path) -> bool:
        """Hash one file; False when abandoned on the way."""
        digest, at = hashlib.sha256(), 0
        room = memoryview(bytearray(_CHUNK))
        with path.open("rb", buffering=0) as file:
            while piece := self._next(number, at):
                if isinstance(piece, int):
                    file.seek(at)
                    piece = room[: file.readinto(room[:piece])]
                if not piece:
                    self._digests[number] = digest.hexdigest()
                    remember(path, digest.hexdigest(), self.states[number])
                    return True
                digest.update(piece)
                at += len(piece)
        return False
