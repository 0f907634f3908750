"""uvicorn's HTTP protocol with bounds on the head of a request, which it does not set itself."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bitladder.units import KiB

MAX_HEAD_BYTES = 64 * KiB
HEAD_S = 20.0
"""Seconds to send the head of a request, from connecting or from its first byte."""


class CarefulProtocol(HttpToolsProtocol):
    """Refuses heads that are too long, and closes connections that take too long over one."""

    _head_bytes = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock starts before the first byte."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what arrives while a head is not complete."""
        super().data_received(data)
        if self._deadline is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The head of a request may have {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._start_clock()

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._stop_clock()
        super().on_headers_complete()

    def _start_clock(self) -> None:
        if self._deadline is None:
            self._head_bytes = 0
            self._deadline = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
