"""Our client for upstreams: HTTP/1.1 over kept connections, parsed by llhttp (httptools).

A gateway's request needs little of a client: one POST, its head and body written at once, and the reply's body handed
on as it arrives. General clients spend more on a request than the rest of the gateway together, and aiohttp takes what
comes unasked on a kept connection for the answer to the next request, which here would be somebody else's (docs/log.md
has figures and the case). No cookies, redirects or decompression; proxies and certificates as `engines.network` finds.
"""

from __future__ import annotations

import asyncio
import functools
import re
import select
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self, cast
from urllib.parse import urlsplit

import httptools

from bitladder.engines.address import API, api_base
from bitladder.engines.network import Proxy, proxy_for, tls_context
from bitladder.errors import UsageError
from bitladder.serve.backends import UpstreamFailed, UpstreamRequest
from bitladder.serve.protocol import COUNT_TOKENS, MESSAGES
from bitladder.units import KiB

KEPT_S = 4.0
"""An idle connection is used again within so long: llama.cpp closes its own after 5 s."""
_MAX_HEAD = 64 * KiB
_HIGH_WATER = 64 * KiB
"""Bytes that wait for a slow client before nothing more is read from the upstream."""
_NO_BODY = (204, 304)
_ANTHROPIC, _ANTHROPIC_VERSION = "anthropic.com", "2023-06-01"
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")


@dataclass(frozen=True)
class Address:
    """Where an upstream listens. ``prefix`` stands before every path, ``host`` is the header's value."""

    name: str
    port: int
    tls: bool
    host: str
    prefix: str
    proxy: Proxy | None = None
    """What stands between; requests in plain HTTP name the whole address there, those in TLS go through a tunnel."""

    @property
    def begins(self) -> str:
        """What a request's target begins with."""
        return f"http://{self.host}{self.prefix}" if self.proxy is not None and not self.tls else self.prefix


@functools.lru_cache(maxsize=256)
def address_of(base_url: str) -> Address:
    """The address in a base URL, such as ``https://models.lan:8443/openai``.

    Raises:
        UpstreamFailed: phase ``connect``, it is none, or its proxy cannot be used.
    """
    try:
        parts = urlsplit(base_url)
        name, port = parts.hostname or "", parts.port
        host = parts.netloc.rpartition("@")[2].encode("ascii").decode()
    except ValueError as error:
        raise UpstreamFailed("connect", f"'{base_url}' is no address: {error}.") from None
    tls = parts.scheme == "https"
    if parts.scheme not in ("http", "https") or not name:
        raise UpstreamFailed("connect", f"'{base_url}' is no HTTP address.")
    try:
        proxy = proxy_for(base_url)
    except UsageError as error:
        raise UpstreamFailed("connect", error.found) from None
    return Address(name, port or (443 if tls else 80), tls, host, parts.path.rstrip("/"), proxy)


class ConnectionPool:
    """Connections of one gateway, kept open between requests."""

    def __init__(self, connect_s: float) -> None:
        self._connect_s = connect_s
        self._idle: dict[Address, list[Connection]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for idle in self._idle.values():
            for connection in tuple(idle):
                connection.transport.abort()

    async def send(self, address: Address, request: bytes) -> HttpReply:
        """Send the bytes of a request and wait for the head of the reply.

        A kept connection that the upstream closed in the same moment is tried once more on a fresh one; nothing had
        been answered on it.

        Raises:
            UpstreamFailed: it cannot be reached, or breaks off or sends garbage before the head is complete.
        """
        kept = self._kept(address)
        if kept is not None:
            try:
                return await kept.exchange(request)
            except UpstreamFailed:
                if kept.answered:
                    raise
        return await (await self._connected(address)).exchange(request)

    async def get(
        self, base_url: str, path: str, seconds: float, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of a document.

        Raises:
            UpstreamFailed: as in `send`, or the body broke off.
            TimeoutError: not all of it came within ``seconds``.
        """
        address = address_of(base_url)
        async with asyncio.timeout(seconds):
            reply = await self.send(address, request_head("GET", address, path, headers or {}) + b"\r\n")
            try:
                return reply.status, b"".join([piece async for piece in reply.chunks()])
            finally:
                reply.close()

    def keep(self, connection: Connection) -> None:
        """Keep a connection whose reply is complete for the next request."""
        self._idle.setdefault(connection.address, []).append(connection)

    def forget(self, connection: Connection) -> None:
        """A connection is closed."""
        idle = self._idle.get(connection.address, [])
        if connection in idle:
            idle.remove(connection)

    def _kept(self, address: Address) -> Connection | None:
        idle = self._idle.get(address)
        while idle:
            connection = idle.pop()
            young = connection.loop.time() - connection.idle_since <= KEPT_S
            if young and not connection.transport.is_closing() and connection.quiet:
                return connection
            connection.transport.abort()
        return None

    async def _connected(self, address: Address) -> Connection:
        loop = asyncio.get_running_loop()
        connection = Connection(self, address, loop)
        try:
            async with asyncio.timeout(self._connect_s):
                if address.proxy is None:
                    tls = tls_context() if address.tls else None
                    await loop.create_connection(lambda: connection, address.name, address.port, ssl=tls)
                else:
                    await _through(address.proxy, address, connection)
        except TimeoutError:
            raise UpstreamFailed(
                "connect", f"The upstream cannot be reached within {self._connect_s:g} s at {address.host}."
            ) from None
        except (OSError, UnicodeError, UsageError) as error:
            raise UpstreamFailed("connect", f"The upstream cannot be reached at {address.host}: {error}.") from None
        return connection


async def _through(proxy: Proxy, address: Address, connection: Connection) -> None:
    """Connect through a proxy: in plain HTTP it passes requests on, for TLS it is asked for a tunnel.

    Raises:
        OSError: it cannot be reached, or refuses.
    """
    loop = connection.loop
    proxy_tls = tls_context() if proxy.tls else None
    if not address.tls:
        await loop.create_connection(lambda: connection, proxy.name, proxy.port, ssl=proxy_tls)
        return
    transport, tunnel = await loop.create_connection(_Tunnel, proxy.name, proxy.port, ssl=proxy_tls)
    try:
        place = f"{f'[{address.name}]' if ':' in address.name else address.name}:{address.port}"
        lines = [f"CONNECT {place} HTTP/1.1", f"host: {place}"]
        if proxy.authorization:
            lines.append(f"proxy-authorization: {proxy.authorization}")
        transport.write("".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1"))
        status = await tunnel.opened
        if not 200 <= status < 300:
            raise OSError(f"the proxy at {proxy.place} answered with status {status}")
        secured = await loop.start_tls(transport, connection, tls_context(), server_hostname=address.name)
        if secured is None:
            raise OSError("the connection was closed while TLS began")
    except BaseException:
        transport.abort()
        raise
    connection.connection_made(secured)


class _Tunnel(asyncio.Protocol):
    """What a proxy answers to CONNECT; ``opened`` is its status."""

    def __init__(self) -> None:
        self.opened: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._head = b""

    def data_received(self, data: bytes) -> None:
        """Wait for the end of the head."""
        self._head += data
        if self.opened.done():
            return
        if b"\r\n\r\n" in self._head:
            found = _STATUS.match(self._head)
            self._end(int(found[1]) if found else None)
        elif len(self._head) > _MAX_HEAD:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """It is gone."""
        self._end(None)

    def _end(self, status: int | None) -> None:
        if self.opened.done():
            return
        if status is None:
            self.opened.set_exception(OSError("the proxy does not answer as one"))
        else:
            self.opened.set_result(status)


def request_head(method: str, address: Address, path: str, headers: Mapping[str, str]) -> bytes:
    """A request's line and header fields, without the empty line that ends them.

    Raises:
        UpstreamFailed: phase ``connect``, a field holds a line break or a character beyond Latin-1.
    """
    fields = {"host": address.host, **headers}
    if address.proxy is not None and address.proxy.authorization and not address.tls:
        fields["proxy-authorization"] = address.proxy.authorization
    lines = [f"{method} {address.begins}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    if any("\r" in line or "\n" in line for line in lines):
        raise UpstreamFailed("connect", "A header field for the upstream holds a line break.")
    try:
        return "".join(f"{line}\r\n" for line in lines).encode("latin-1")
    except UnicodeEncodeError as error:
        raise UpstreamFailed("connect", f"A header field for the upstream cannot be sent: {error.reason}.") from None


class Connection(asyncio.Protocol):
    """One connection, for one request at a time. Callbacks of the parser fill in the reply."""

    transport: asyncio.Transport

    def __init__(self, pool: ConnectionPool, address: Address, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.address = address
        self.idle_since = 0.0
        self._pool = pool
        self._waiter: asyncio.Future[None] | None = None
        self._failure: UpstreamFailed | None = None
        self._paused = False
        self._busy = False
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.answered = False
        """Whether anything came since the request was sent."""
        self._framing = 0
        self._head_complete = self._complete = self._measured = self._reusable = False
        self._headers: dict[str, str] = {}
        self._pieces: list[bytes] = []
        self._size = 0

    @property
    def quiet(self) -> bool:
        """Whether nothing waits to be read: what comes unasked would be taken for the answer to the next request."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    async def exchange(self, request: bytes) -> HttpReply:
        """Send a request and wait for the head of its reply.

        Raises:
            UpstreamFailed: the connection broke, or what came is no HTTP.
        """
        self._begin()
        self._busy = True
        self.transport.write(request)
        try:
            while not self._head_complete:
                if self._failure is not None:
                    raise self._failure
                await self._wait()
        except BaseException:
            self.transport.abort()
            raise
        return HttpReply(self, self._parser.get_status_code(), self._headers)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body of the reply as it arrives: whatever the last reads of the socket brought."""
        while True:
            if self._pieces:
                pieces, self._pieces, self._size = self._pieces, [], 0
                if self._paused:
                    self._paused = False
                    self.transport.resume_reading()
                yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
            elif self._complete:
                return
            elif self._failure is not None:
                raise self._failure
            else:
                await self._wait()

    def release(self) -> None:
        """The reply is no longer wanted: keep the connection when it is complete, else close it."""
        if not self._busy:
            return
        self._busy = False
        if self._complete and self._reusable and self._failure is None and not self.transport.is_closing():
            self._pieces = []
            self.idle_since = self.loop.time()
            self._pool.keep(self)
        else:
            self.transport.abort()

    async def _wait(self) -> None:
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, phase: str, found: str) -> None:
        if self._failure is None and not self._complete:
            self._failure = UpstreamFailed(phase, found)
        self._reusable = False
        self._wake()

    # What the transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; whoever waits is woken once for all that one read brought."""
        self.answered = True
        self._framing += len(data)  # set back by whatever is no head, chunk size, extension or trailer
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(
                "garbage", f"The upstream does not speak HTTP: {str(error).rstrip('.') or type(error).__name__}."
            )
            self.transport.abort()
            return
        if self._framing > _MAX_HEAD and not self._complete:
            self._fail("garbage", f"The head or the trailers of the upstream's reply exceed {_MAX_HEAD} bytes.")
            self.transport.abort()
            return
        if self._size > _HIGH_WATER and not self._paused and not self._complete:
            self._paused = True
            self.transport.pause_reading()
        if self._head_complete:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """A reply that told no length ends here; any other one is broken off."""
        self._pool.forget(self)
        if exc is None and self._head_complete and not self._measured:
            self._complete = True
        said = "it closed the connection" if exc is None else str(exc).rstrip(".") or type(exc).__name__
        self._fail("broken", f"The upstream broke off: {said}.")

    # What the parser says.

    def on_message_begin(self) -> None:
        """A reply begins; a connection on which another one follows, asked for or not, cannot be trusted again."""
        if self._complete:
            raise ValueError("more than one reply")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field; trailers are dropped."""
        if self._head_complete:
            return
        field = name.decode("latin-1").lower()
        self._measured |= field in ("content-length", "transfer-encoding")
        self._headers[field] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is complete, unless it was an interim one (1xx)."""
        status = self._parser.get_status_code()
        if status < 200:
            self._headers, self._measured = {}, False
        else:
            self._head_complete = True
            self._measured |= status in _NO_BODY

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._framing = 0
        self._pieces.append(data)
        self._size += len(data)

    def on_message_complete(self) -> None:
        """The reply is complete."""
        if self._head_complete:
            self._complete = True
            self._reusable = self._parser.should_keep_alive()


class HttpReply:
    """A reply over HTTP; see `bitladder.serve.backends.Reply`."""

    def __init__(self, connection: Connection, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = headers
        self._connection = connection

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives.

        Raises:
            UpstreamFailed: it broke off.
        """
        return self._connection.chunks()

    def close(self) -> None:
        """Close the connection, or keep it for the next request when the answer is complete."""
        self._connection.release()


class HttpBackend:
    """An OpenAI-compatible endpoint. ``base_url`` gives its address as `api_base` takes it, or None while nothing
    listens there; ``at``: one of the IP addresses of its name, to connect to.
    """

    def __init__(
        self, pool: ConnectionPool, base_url: Callable[[], str | None], api_key: str = "", *, at: str = ""
    ) -> None:
        self._pool = pool
        self._at = at
        self._base_url = base_url
        self._key = api_key
        self._heads: dict[tuple[str, str], tuple[Address, bytes]] = {}

    def _fields(self, address: Address, path: str) -> dict[str, str]:
        """Header fields. Anthropic's API wants its key under another name, and no other one."""
        fields = {"content-type": "application/json", "accept-encoding": "identity"}
        is_anthropics = path in (MESSAGES, COUNT_TOKENS)
        if is_anthropics:
            fields["anthropic-version"] = _ANTHROPIC_VERSION
        if self._key and is_anthropics:
            fields["x-api-key"] = self._key
        if self._key and not (is_anthropics and address.name.endswith(_ANTHROPIC)):
            fields["authorization"] = f"Bearer {self._key}"
        return fields

    async def complete(self, request: UpstreamRequest) -> HttpReply:
        """Send a request and wait for the head of the reply.

        Raises:
            UpstreamFailed: nothing listens, or the connection broke before the reply began.
        """
        base_url = self._base_url()
        if base_url is None:
            raise UpstreamFailed("down", "The engine is not running.")
        known = self._heads.get((base_url, request.path))
        if known is None:
            address = self._address(base_url)
            known = (
                address,
                request_head("POST", address, request.path.removeprefix(API), self._fields(address, request.path)),
            )
            self._heads[base_url, request.path] = known
        address, head = known
        return await self._pool.send(address, head + b"content-length: %d\r\n\r\n" % len(request.body) + request.body)

    async def alive(self, seconds: float) -> int:
        """Status of what it answers when asked for its models, read no further.

        Raises:
            UpstreamFailed: it cannot be connected to, or breaks off.
            TimeoutError: no answer within ``seconds``.
        """
        base_url = self._base_url()
        if base_url is None:
            raise UpstreamFailed("down", "The engine is not running.")
        address = self._address(base_url)
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        async with asyncio.timeout(seconds):
            reply = await self._pool.send(address, request_head("GET", address, "/models", headers) + b"\r\n")
            reply.close()
        return reply.status

    def _address(self, base_url: str) -> Address:
        address = address_of(api_base(base_url))
        return replace(address, name=self._at) if self._at else address
