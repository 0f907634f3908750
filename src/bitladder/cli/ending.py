"""How the program ends where no verb is at hand: before one has begun, and when what was printed does not arrive."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended (128 + SIGINT)."""


def say_stopped() -> None:
    """What is said on Ctrl-C."""
    print("\nStopped. What was finished is kept; the same command goes on from there.", file=sys.stderr)


def open_streams() -> None:
    """Have a standard stream that was closed before we began (``2>&-``) take what is printed, and its number: libraries
    would print into the file that got it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - until the end
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


class Watched:
    """Whether what is printed to a stream arrives: the error alone, where it does not, says not what it is about."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._failures: list[OSError] = []
        for name in ("write", "flush"):
            setattr(stream, name, self._noting(getattr(stream, name)))

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any) -> Any:
            try:
                return function(*args)
            except OSError as error:
                self._failures.append(error)
                raise

        return noting

    def failure(self) -> OSError | None:
        """Why it does not; None where all of it arrives. What is left is thrown away then: Python would try once more
        at the end, and complain."""
        with suppress(OSError):
            self._stream.flush()
        if not self._failures:
            return None
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return self._failures[0]
