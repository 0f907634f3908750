"""One upstream is one function: ``complete(request) -> reply``, whose body arrives piece by piece.

`HttpBackend` is the real one, over aiohttp (why not httpx: docs/log.md). A test hands the gateway a
function instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
from yarl import URL

from bitladder.errors import EngineError
from bitladder.serve.settings import Timeouts


class UpstreamFailed(EngineError):
    """An upstream gave no usable answer.

    ``phase`` says when: ``down``, ``connect``, ``first byte``, ``stalled``, ``broken``, ``status``,
    ``garbage`` or ``wrong model``.
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
    headers: Mapping[str, str] = field(default_factory=dict)


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


class HttpReply:
    """A reply over HTTP."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives: whatever one read of the socket brought."""
        read = self._response.content.readany
        try:
            while piece := await read():
                yield piece
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamFailed("broken", f"The upstream broke off its answer: {_words(error)}.") from None

    def close(self) -> None:
        """Close the connection, or keep it for the next request when the answer is complete."""
        if self._response.content.is_eof():
            self._response.release()
        else:
            self._response.close()


def client_session(timeouts: Timeouts) -> aiohttp.ClientSession:
    """A session for all upstreams of a gateway: no proxies, cookies, redirects, decompression or limits of
    its own.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0, use_dns_cache=True)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        read_bufsize=16 * 1024,
    )


class HttpBackend:
    """An OpenAI-compatible endpoint. ``address`` gives its base URL, or None while nothing listens there."""

    def __init__(self, session: aiohttp.ClientSession, address: Callable[[], str | None], api_key: str = "") -> None:
        self._session = session
        self._address = address
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._urls: dict[str, URL] = {}

    async def complete(self, request: UpstreamRequest) -> HttpReply:
        """Send a request and wait for the head of the reply.

        A kept connection that the upstream closed in the same moment is tried once more on a fresh one;
        nothing had been answered on it.

        Raises:
            UpstreamFailed: nothing listens, or the connection broke before the reply began.
        """
        base = self._address()
        if base is None:
            raise UpstreamFailed("down", "The engine is not running.")
        where = base + request.path
        url = self._urls.get(where)
        if url is None:
            url = self._urls[where] = URL(where)
        headers = {**self._headers, **request.headers} if request.headers else self._headers
        for attempt in (1, 2):
            try:
                response = await self._session.post(url, data=request.body, headers=headers, allow_redirects=False)
                return HttpReply(response)
            except aiohttp.ServerDisconnectedError as error:
                if attempt == 2:
                    raise UpstreamFailed("broken", f"The upstream closed the connection: {_words(error)}.") from None
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                raise UpstreamFailed("connect", f"The upstream cannot be reached: {_words(error)}.") from None
            except aiohttp.ClientResponseError as error:
                raise UpstreamFailed("garbage", f"The upstream does not speak HTTP: {error.message}.") from None
            except (aiohttp.ClientError, OSError) as error:
                raise UpstreamFailed("broken", f"The upstream broke the connection: {_words(error)}.") from None
        raise AssertionError("unreachable")


def _words(error: BaseException) -> str:
    return str(error).rstrip(".") or type(error).__name__
