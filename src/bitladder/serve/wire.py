"""uvicorn's HTTP protocol with bounds, which it does not set itself, on all that a client can send or leave unread;
with word of clients that leave, and with what is written together sent together.

Every connection is in one of four states, and each state has a limit of size and one of time:

    head      from connecting, or from a request's first byte        `MAX_FRAMING`, `MAX_FIELDS`, `HEAD_S`
    body      wanted: whoever reads it counts it and keeps its time  `MAX_FRAMING` between two bytes of it
              not wanted (its request is answered): thrown away      `MAX_UNWANTED`, `UNWANTED_S`
    answer    requests that come meanwhile wait                      `MAX_PIPELINED`
              the client does not take it                            `MAX_UNSENT` of all together, `TAKE_S`
    idle      kept for the next request                              uvicorn's ``timeout_keep_alive``

A connection whose end is decided reads on for a little (`LINGER_S`), since closing one on which bytes are unread makes
the kernel throw away the reply. `MAX_CONNECTIONS` bounds their number: for one more the one that has waited longest for
its client makes way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from bitladder.serve.protocol import Refused
from bitladder.units import KiB, MiB

MAX_FRAMING = 64 * KiB
"""Bytes of a head, of its trailers, and of anything else that is no body (chunk sizes and extensions) in a row."""
_PIECE = 32 * KiB
MAX_FIELDS = 100
"""Header fields of a request, its trailers among them."""
HEAD_S = 20.0
"""Seconds to send the head of a request, from connecting or from its first byte."""
MAX_UNWANTED = 64 * MiB
"""Bytes that are read and thrown away after a request was answered, so that a client still sending gets its answer."""
UNWANTED_S = 20.0
LINGER_S = 5.0
MAX_PIPELINED = 8
"""Requests that wait for the answer to the one before them; the last one's answer closes the connection."""
MAX_UNSENT = 128 * MiB
"""Bytes of answers that wait for slow clients, on all connections together."""
TAKE_S = 60.0
"""Seconds in which a slow client takes enough for more to be written."""
MAX_CONNECTIONS = 1024
WHEN_GONE = "bitladder.when_gone"
"""ASGI extension: a function to be given what to call when the client closes the connection, or None."""


class Shared(ServerState):
    """What the connections of one server share."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[CarefulProtocol, None] = {}
        """Connections that wait for their client, the one that has waited longest first."""
        self.unsent = 0
        """Bytes written to connections whose clients are slow."""


class Together:
    """A transport whose writes wait for the end of the loop's turn: the head of a reply and its first piece, or the
    last piece and the end, leave in one packet and wake the client once. What is done to it after it was closed has no
    effect: uvloop's transports raise then. ``end`` closes it, at once unless given otherwise.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, end: Callable[[], None] | None = None
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._end = end or transport.close
        self._waiting: list[bytes] = []
        self._closed = False

    def write(self, data: bytes) -> None:
        """Send soon."""
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(data)

    def close(self) -> None:
        """Send what waits, and close."""
        if not self._closed:
            self.flush()
            self._closed = True
            self._end()

    def is_closing(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._closed or self._transport.is_closing()

    def pause_reading(self) -> None:
        """Read no more for now."""
        if not self.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if not self.is_closing():
            self._transport.resume_reading()

    def flush(self) -> None:
        """Send what waits, unless the connection is closed."""
        pieces, self._waiting = self._waiting, []
        if pieces and not self.is_closing():
            self._transport.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class CarefulProtocol(HttpToolsProtocol):
    """One connection within the bounds above."""

    server_state: Shared
    _raw: asyncio.Transport
    _in_head = True
    _in_body = False
    _deaf = False
    """Whether what still comes is thrown away: the connection ends with the answers that are owed."""
    _framing = 0
    """Bytes since the message began, or since its last byte of body."""
    _fields = 0
    _field_bytes = 0
    _unwanted = 0
    _unsent = 0
    _refusal: Refused | None = None
    _deadline: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _gone: Callable[[], None] | None = None

    # What the transport says.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock starts before the first byte."""
        self._raw = transport
        super().connection_made(cast(asyncio.Transport, Together(transport, self.loop, self._end)))
        if len(self.connections) > MAX_CONNECTIONS and not self._make_way():
            self._hear_no_more()
            self._answer(Refused(503, "No more connections fit.", code="too_many_connections", retry_after_s=1))
            self.transport.flush()  # type: ignore[attr-defined]
            self._hang_up()
            return
        self._note_waiting()
        self._keep_time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget everything."""
        self._in_head = self._in_body = False
        self._deaf = True
        self._keep_time()
        self._count_unsent(0)
        self.server_state.waiting.pop(self, None)
        self.pipeline.clear()
        super().connection_lost(exc)
        if self._gone is not None:
            self._gone()

    def data_received(self, data: bytes) -> None:
        """Feed the parser and count. A head that comes whole needs no clock."""
        if self._deaf:
            self._throw_away(len(data))
            return
        self._unset_keepalive_if_required()
        if len(data) <= _PIECE:
            self._feed(data)
        else:  # one read may bring 256 KiB; what one field, or one chunk's extension, holds is counted in pieces
            view = memoryview(data)
            for begins in range(0, len(data), _PIECE):
                self._feed(view[begins : begins + _PIECE])
                if self._deaf:
                    self._throw_away(len(data) - begins)
                    return
        self._keep_time()

    def _feed(self, data: bytes | memoryview) -> None:
        self._framing += len(data)  # callbacks set it back where something else begins
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._hear_no_more()  # no other protocol is spoken here: the request is answered, and that is all
            return
        except httptools.HttpParserError as error:
            if not self._deaf:
                self._refuse(self._refusal or _no_http(error))
            return
        if self._in_head or self._in_body:
            if self._framing > MAX_FRAMING:
                self._refuse(_too_much_framing())
            elif self._in_body and self.cycle.response_complete:
                self._throw_away(len(data))
        elif self.cycle is None or self.cycle.response_complete:
            # Answered already: what came is nothing (empty lines), and a head should follow it.
            self._in_head = self._framing > 0

    def pause_writing(self) -> None:
        """The client takes less than is written."""
        super().pause_writing()
        self._count_unsent(self._raw.get_write_buffer_size())
        if self.server_state.unsent > MAX_UNSENT:
            self._raw.abort()
            return
        self._note_waiting()
        if self._taking is None:
            self._taking = self.loop.call_later(TAKE_S, self._raw.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        self._count_unsent(0)
        self._note_waiting()

    # What the parser says.

    def on_message_begin(self) -> None:
        """A head begins."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._hear_no_more()
            raise ValueError("too many requests at once")
        super().on_message_begin()
        self.scope["extensions"] = cast(Any, {WHEN_GONE: self._when_gone})
        self._in_head = True
        self._framing = self._fields = self._field_bytes = self._unwanted = 0

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        self._count_field(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field, or a trailer: those are counted and dropped, since nothing here reads any."""
        self._fields += 1
        if self._fields > MAX_FIELDS:
            self._refusal = Refused(431, f"A request may have {MAX_FIELDS} header fields.", code="head_too_large")
            raise self._refusal
        self._count_field(len(name) + len(value))
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._in_head, self._in_body, self._framing = False, True, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._framing = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._in_body, self._framing = False, 0
        super().on_message_complete()
        self._note_waiting()

    # What uvicorn says.

    def on_response_complete(self) -> None:
        """An answer is written."""
        super().on_response_complete()
        self._note_waiting()
        self._keep_time()

    # The bounds.

    def _count_field(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > MAX_FRAMING:
            self._refusal = _too_much_framing()
            raise self._refusal

    def _throw_away(self, size: int) -> None:
        self._unwanted += size
        if self._unwanted > MAX_UNWANTED:
            self._raw.abort()

    def _hear_no_more(self) -> None:
        self._deaf, self._in_head = True, False
        if self.cycle is not None:
            self.cycle.keep_alive = False
        self._keep_time()

    def _refuse(self, refused: Refused) -> None:
        """End the connection, with an error where the client can still take it for the answer to this request."""
        cycle = self.cycle
        free = cycle is None or cycle.response_complete
        mine = self._in_body and not free and not cycle.response_started and not self.pipeline
        self._hear_no_more()
        if free or mine:
            self._answer(refused)
        if not free:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()

    def _answer(self, refused: Refused) -> None:
        fields = [*self.server_state.default_headers, *refused.fields, (b"connection", b"close")]
        head = b"".join(b"%b: %b\r\n" % field for field in fields)
        self.transport.write(STATUS_LINE[refused.status] + head + b"\r\n" + refused.body)

    def _make_way(self) -> bool:
        """End the connection that has waited longest for its client; whether there is one."""
        oldest = next(iter(self.server_state.waiting), None)
        if oldest is None:
            return False
        del self.server_state.waiting[oldest]
        oldest._raw.abort()
        return True

    def _note_waiting(self) -> None:
        """Enter or leave the list of those that wait for their client."""
        cycle, waiting = self.cycle, self.server_state.waiting
        if self._in_body or cycle is None or cycle.response_complete or self.flow.write_paused:
            if not self._raw.is_closing():
                waiting.setdefault(self)
        else:
            waiting.pop(self, None)

    def _count_unsent(self, size: int) -> None:
        self.server_state.unsent += size - self._unsent
        self._unsent = size
        if size == 0 and self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _end(self) -> None:
        """Close, when all is written; before that read on for a while if something is still to come."""
        raw = self._raw
        if raw.is_closing():
            return
        if (self._in_body or self._deaf) and raw.can_write_eof():
            self._deaf, self._in_head, self._in_body = True, False, False
            self._keep_time()
            raw.resume_reading()
            raw.write_eof()
            self.loop.call_later(LINGER_S, self._hang_up)
        else:
            self._hang_up()

    def _hang_up(self) -> None:
        raw = self._raw
        if not raw.is_closing():
            raw.close()
            if raw.get_write_buffer_size() and self._taking is None:
                self._taking = self.loop.call_later(TAKE_S, raw.abort)

    def _when_gone(self, call: Callable[[], None] | None) -> None:
        self._gone = call
        if call is not None and self.parser is None:
            call()  # the client left before
        self.flow.resume_reading()  # a paused connection would not tell its end

    def _keep_time(self) -> None:
        """Start the clock where a head or a body that nobody wants is awaited, and stop it where none is."""
        answered = self.cycle is None or self.cycle.response_complete
        if ((self._in_head or self._in_body) and answered) == (self._deadline is not None):
            return
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_S if self._in_head else UNWANTED_S, self._hang_up)
        else:
            self._deadline.cancel()
            self._deadline = None


def _no_http(error: Exception) -> Refused:
    found = str(error).rstrip(".") or type(error).__name__
    return Refused(400, f"This is no HTTP request: {found}.", code="bad_request")


def _too_much_framing() -> Refused:
    return Refused(
        431,
        f"The head of a request, and what its body is framed by, may have {MAX_FRAMING} bytes in a row.",
        code="head_too_large",
    )
