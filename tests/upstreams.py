"""Upstreams that are functions, and a client over ASGI: the gateway without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bitladder.serve.app import build_app
from bitladder.serve.backends import Complete, UpstreamFailed, UpstreamRequest
from bitladder.serve.deploy import Deployment, deployed
from bitladder.serve.settings import ServeSettings, TierSpec

Piece = bytes | float | Exception
"""Bytes to send, seconds to wait, or an error to raise."""

QUALITY = TierSpec("Q8_0", url="http://quality.invalid", sha256="a" * 64, slots=4)
SPEED = TierSpec("Q4_K_M", url="http://speed.invalid", sha256="b" * 64, slots=4)
CHAT = "/v1/chat/completions"


@dataclass
class FakeReply:
    status: int
    headers: Mapping[str, str]
    pieces: Sequence[Piece]
    closed: bool = False

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, bytes):
                yield piece
            else:
                await asyncio.sleep(piece)

    def close(self) -> None:
        self.closed = True


@dataclass
class Upstream:
    """Answers every request with what ``answer`` makes of it, and keeps what it was asked."""

    answer: Callable[[UpstreamRequest], FakeReply]
    asked: list[UpstreamRequest] = field(default_factory=list)
    replies: list[FakeReply] = field(default_factory=list)

    async def complete(self, request: UpstreamRequest) -> FakeReply:
        self.asked.append(request)
        reply = self.answer(request)
        self.replies.append(reply)
        return reply


def event(content: str, model: str, logprob: float | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    if logprob is not None:
        choice["logprobs"] = {"content": [{"token": content, "logprob": logprob}]}
    document = {"object": "chat.completion.chunk", "model": model, "choices": [choice]}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def document(content: str, model: str, logprobs: Sequence[float] = ()) -> bytes:
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": content}}
    if logprobs:
        choice["logprobs"] = {"content": [{"token": "x", "logprob": value} for value in logprobs]}
    return json.dumps({"model": model, "choices": [choice], "usage": {"completion_tokens": 2}}).encode()


DONE = b"data: [DONE]\n\n"


def says(text: str, model: str, logprobs: Sequence[float] = ()) -> Upstream:
    """Says ``text``, word by word in a stream; with ``logprobs`` when asked for them."""

    def answer(request: UpstreamRequest) -> FakeReply:
        wanted = logprobs if json.loads(request.body).get("logprobs") else ()
        if not request.stream:
            body = document(text, model, wanted)
            return FakeReply(200, {"content-type": "application/json"}, [body])
        words = text.split()
        values = [*wanted, *[None] * len(words)]
        events = [event(word, model, value) for word, value in zip(words, values, strict=False)]
        return FakeReply(200, {"content-type": "text/event-stream"}, [*events, DONE])

    return Upstream(answer)


def replies(*pieces: Piece, status: int = 200, kind: str = "text/event-stream") -> Upstream:
    """Sends just this."""
    return Upstream(lambda _: FakeReply(status, {"content-type": kind}, pieces))


def fails(phase: str = "connect") -> Upstream:
    """Cannot be reached."""

    def answer(_: UpstreamRequest) -> FakeReply:
        raise UpstreamFailed(phase, "The upstream cannot be reached.")

    return Upstream(answer)


@contextlib.asynccontextmanager
async def gateway(
    quality: Upstream | Complete, speed: Upstream | Complete, /, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Deployment]]:
    """A running gateway over two fakes, and a client for it."""
    functions = {
        "Q8_0": quality.complete if isinstance(quality, Upstream) else quality,
        "Q4_K_M": speed.complete if isinstance(speed, Upstream) else speed,
    }
    chosen = ServeSettings(**{"quality": QUALITY, "speed": SPEED, **settings})
    async with deployed(chosen, upstreams=functions) as deployment:
        transport = httpx.ASGITransport(build_app(deployment))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client, deployment


def chat(model: str, text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def events_of(body: bytes) -> list[Any]:
    """The JSON of each event of a stream, without the last ``[DONE]``."""
    lines = [line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]
