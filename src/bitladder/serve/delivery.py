"""Sending an answer to the client: headers that name what served it, backpressure, and honest endings."""

from __future__ import annotations

import asyncio
import re
import time

from starlette.types import Send

from bitladder.serve.backends import UpstreamFailed
from bitladder.serve.dialects import DIALECTS
from bitladder.serve.events import stream_error
from bitladder.serve.guessing import Told
from bitladder.serve.limits import let_go
from bitladder.serve.metrics import Record, RequestOutcome
from bitladder.serve.protocol import header_text
from bitladder.serve.relay import Relayed
from bitladder.serve.settings import UpstreamTimeouts
from bitladder.serve.watch import PhaseTimeout, Watch
from bitladder.units import KiB

_PIECE = 64 * KiB
_GUESSES = re.compile(rb'"draft_n":\s*(\d{1,12}),\s*"draft_n_accepted":\s*(\d{1,12})')
"""As llama.cpp ends an answer; within a text the quotes would be escaped."""
Headers = tuple[tuple[bytes, bytes], ...]


class Delivery:
    """One answer on its way to one client. ``record`` is filled in as it goes."""

    def __init__(self, send: Send, record: Record, began: float, timeouts: UpstreamTimeouts) -> None:
        self.record = record
        self._send = send
        self._began = began
        self._timeouts = timeouts
        self._started = False
        self._events = 0
        self._marks = DIALECTS[record.path].marks if record.path in DIALECTS else b"data:"

    async def deliver(self, answer: Relayed, headers: Headers, watch: Watch) -> None:
        """Send an answer.

        Raises:
            UpstreamFailed: it broke off before its first byte was sent; another may be tried.
        """
        self.record.status = answer.status
        if answer.stream is not None:
            await self._deliver_stream(answer, headers, watch)
            return
        watch.phase("the client", self._timeouts.client)
        await self._start(answer, (*headers, (b"content-length", str(len(answer.head)).encode())))
        self.record.tokens = answer.tokens
        self._look_for_guesses(answer.head)
        self.record.outcome = RequestOutcome.COMPLETE if answer.status < 400 else RequestOutcome.REFUSED
        # In pieces, each when the client has taken the one before: its slot bounds how many large documents wait.
        for begins in range(0, len(answer.head) - _PIECE, _PIECE):
            piece = answer.head[begins : begins + _PIECE]
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            watch.phase("the client", self._timeouts.client)
        rest = len(answer.head) - (len(answer.head) - 1) % _PIECE - 1 if answer.head else 0
        await self._send({"type": "http.response.body", "body": answer.head[rest:]})

    async def _deliver_stream(self, answer: Relayed, headers: Headers, watch: Watch) -> None:
        assert answer.stream is not None
        between, client = self._timeouts.between, self._timeouts.client
        record, send = self.record, self._send
        waiting_for_upstream = True
        try:
            async for events in answer.stream:
                waiting_for_upstream = False
                watch.phase("the client", client)
                if not self._started:
                    await self._start(answer, (*headers, (b"cache-control", b"no-store")))
                # Returns at once unless the client is slow; while it waits, nothing is read upstream.
                await send({"type": "http.response.body", "body": events, "more_body": True})
                self._events += events.count(b"data:")
                record.tokens += events.count(self._marks)
                self._look_for_guesses(events)
                waiting_for_upstream = True
                watch.phase("the next piece", between)
        except UpstreamFailed as failure:
            if not self._started:
                raise
            let_go(failure)
            await self._cut(failure.phase, failure.found)
            return
        except asyncio.CancelledError:
            cause = watch.cause()
            if not isinstance(cause, PhaseTimeout):
                if cause is None and self._started:  # the gateway's own end
                    await self._cut("stopped", "The gateway was stopped.")
                raise cause or asyncio.CancelledError from None
            if not waiting_for_upstream:
                record.outcome = RequestOutcome.CLIENT_LEFT  # it takes nothing: returning now closes its connection
                return
            if not self._started:
                raise UpstreamFailed("stalled", str(cause)) from None
            await self._cut("stalled", f"The upstream stalled: {cause}.")
            return
        record.outcome = RequestOutcome.COMPLETE
        await send({"type": "http.response.body", "body": b""})

    def _look_for_guesses(self, sent: bytes) -> None:
        """Note what an engine that guesses tells of it."""
        if self.record.guessing and (found := _GUESSES.search(sent)):
            self.record.guesses = Told(int(found[1]), int(found[2]))

    async def _start(self, answer: Relayed, headers: Headers) -> None:
        record = self.record
        record.first_s = time.monotonic() - self._began
        self._started = True
        about = (
            (b"content-type", answer.content_type.encode("latin-1", "replace")),
            (b"x-bitladder-reason", header_text(record.reason).encode()),
            (b"x-request-id", record.id.encode()),
        )
        await self._send(
            {
                "type": "http.response.start",
                "status": answer.status,
                "headers": [*about, *answer.extra, *headers],
            }
        )

    async def _cut(self, phase: str, found: str) -> None:
        """Tell the client that its answer is not complete."""
        self.record.outcome = RequestOutcome.CUT
        self.record.failures += (f"{self.record.tier}: {phase}",)
        said = f"{found} The answer above is not complete."
        event = stream_error(said, "upstream_failed", self.record.path, self._events)
        await self._send({"type": "http.response.body", "body": event, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})
