"""A process that imports this is killed at a chosen moment, by its environment:

GOLDEN_KILL      ``WHAT:COUNT``: SIGKILL when stderr has told of WHAT for the COUNT-th time, or a file whose path holds
                 WHAT is opened or renamed for the COUNT-th time
GOLDEN_WRITTEN   a file for the number of bytes that the process wrote
GOLDEN_MINUTES   after each line on stderr that holds this text, the clock is a minute ahead: what is kept every half
                 minute, or told every few seconds, is so each time
"""

import os
import signal
import sys
import time

_what, _, _count = os.environ.get("GOLDEN_KILL", "").rpartition(":")
_haste = os.environ.get("GOLDEN_MINUTES", "")
_seen = 0
_ahead = 0.0
_monotonic = time.monotonic


def _tell(text: str) -> None:
    global _seen, _ahead  # noqa: PLW0603
    if _haste and _haste in text:
        _ahead += 60.0
    if _what and _what in text:
        _seen += 1
        if _seen == int(_count):
            os.kill(os.getpid(), signal.SIGKILL)


def _audit(event: str, args: tuple[object, ...]) -> None:
    if event in ("open", "os.rename") and _what:
        _tell(" ".join(str(arg) for arg in args[:2]))


class _Told:
    """Stderr, and a listener to it."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def write(self, text: str) -> int:
        count = self._inner.write(text)
        self._inner.flush()
        _tell(text)
        return count


if _what or _haste:
    time.monotonic = lambda: _monotonic() + _ahead
    sys.stderr = _Told(sys.stderr)
    sys.addaudithook(_audit)

if _where := os.environ.get("GOLDEN_WRITTEN"):
    import atexit
    from pathlib import Path

    def _bytes_written() -> None:
        """What this process has written, to files and elsewhere."""
        told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        Path(_where).write_text(told["wchar"])

    atexit.register(_bytes_written)
