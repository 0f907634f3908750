"""One upstream is one function: ``complete(request) -> reply``, whose body arrives piece by piece.

The real one is `HttpBackend` in ``connections``. A test hands the gateway a function instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from bitladder.errors import EngineError

PHASES = {
    "down": "is not running",
    "connect": "cannot be reached",
    "first byte": "did not answer in time",
    "stalled": "did not answer in time",
    "broken": "broke off",
    "status": "answered with an error",
    "busy": "is busy",
    "garbage": "answered with something that is no answer",
    "wrong model": "answered as another model",
    "no tool call": "called no tool",
}
"""What became of an upstream, in words, by the phase in which it failed."""


class UpstreamFailed(EngineError):
    """An upstream gave no usable answer.

    ``phase`` says when: a name of ``PHASES``.
    """

    def __init__(self, phase: str, found: str) -> None:
        super().__init__(found)
        self.phase = phase


@dataclass(frozen=True)
class UpstreamRequest:
    """What is sent to an upstream."""

    path: str
    body: bytes
    stream: bool


class Reply(Protocol):
    """What comes back. Whoever got it closes it, which cancels what the upstream is still doing for it."""

    @property
    def status(self) -> int:
        """HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Header fields; ``get`` takes names in lower case."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives.

        Raises:
            UpstreamFailed: it broke off.
        """
        ...

    def close(self) -> None:
        """Let go."""
        ...


Complete = Callable[[UpstreamRequest], Awaitable[Reply]]
