"""uvicorn's HTTP protocol with bounds on the head of a request, which it does not set itself; with word of clients that
leave, and with what is written together sent together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bitladder.units import KiB

MAX_HEAD_BYTES = 64 * KiB
HEAD_S = 20.0
"""Seconds to send the head of a request, from connecting or from its first byte."""
WHEN_GONE = "bitladder.when_gone"
"""ASGI extension: a function to be given what to call when the client closes the connection, or None."""


class Together:
    """A transport whose writes wait for the end of the loop's turn: the head of a reply and its first piece, or the
    last piece and the end, leave in one packet and wake the client once.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send soon."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)

    def close(self) -> None:
        """Send what waits, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._waiting:
            pieces, self._waiting = self._waiting, []
            self._transport.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class CarefulProtocol(HttpToolsProtocol):
    """Refuses heads that are too long, and closes connections that take too long over one."""

    _head_bytes = 0
    _in_head = True
    _deadline: asyncio.TimerHandle | None = None
    _gone: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock starts before the first byte."""
        super().connection_made(cast(asyncio.Transport, Together(transport, self.loop)))
        self._keep_time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._in_head = False
        self._keep_time()
        super().connection_lost(exc)
        if self._gone is not None:
            self._gone()

    def data_received(self, data: bytes) -> None:
        """Count what arrives while a head is not complete. One that comes whole needs no clock."""
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The head of a request may have {MAX_HEAD_BYTES} bytes.")
        self._keep_time()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self.scope["extensions"] = cast(Any, {WHEN_GONE: self._when_gone})
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._in_head = False
        super().on_headers_complete()

    def _when_gone(self, call: Callable[[], None] | None) -> None:
        self._gone = call
        self.flow.resume_reading()  # a paused connection would not tell its end

    def _keep_time(self) -> None:
        if self._in_head == (self._deadline is not None):
            return
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_S, self.transport.close)
        else:
            self._deadline.cancel()
            self._deadline = None
