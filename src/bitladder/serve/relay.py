"""From an upstream's reply to an answer worth sending: checked before its first byte, complete or clearly
not.

A document is read whole before any of it is sent. A stream is read up to its first event, then passed on as
it arrives, cut only between events, so that an error can be told as an event of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from bitladder.serve.backends import Reply, UpstreamFailed
from bitladder.serve.escalation import documents, is_sure, logprobs_of, score, without_logprobs
from bitladder.serve.protocol import first_event, has_error, whole_events
from bitladder.serve.settings import Escalation
from bitladder.units import MiB

MAX_DOCUMENT = 64 * MiB
_MAX_EVENT = 4 * MiB
_DATED = re.compile(r"-\d{4}-?\d{2}-?\d{2}|:latest")
_NOT_SUPPORTED = 501  # llama.cpp's word for what it was not started for; another tier cannot do it either
DONE = b"data: [DONE]\n\n"


@dataclass
class Answer:
    """An answer ready to be sent. ``stream`` is None for a document, whose bytes are then all in ``head``."""

    status: int
    content_type: str
    head: bytes
    stream: AsyncIterator[bytes] | None = None
    tokens: int = 0
    """Completion tokens of a document, as the upstream counted them."""
    extra: tuple[tuple[bytes, bytes], ...] = ()
    """Further header fields to pass on."""


@dataclass(frozen=True)
class Unsure:
    """The speed tier's answer did not reach the threshold; ``lowest`` is its score."""

    lowest: float


def same_model(expected: str, told: str) -> bool:
    """Whether a reply's model name is the one we count on: equal, or the same with a date or ``:latest``
    added.
    """
    return told == expected or (told.startswith(expected) and bool(_DATED.fullmatch(told[len(expected) :])))


def check_model(document: dict[str, Any], expected: str) -> None:
    """Refuse an answer of another model. A reply that names none is let through: there is nothing to compare.

    Raises:
        UpstreamFailed: phase ``wrong model``.
    """
    told = document.get("model")
    if isinstance(told, str) and told and not same_model(expected, told):
        found = f"The upstream answered as '{told[:80]}' instead of '{expected}'."
        raise UpstreamFailed("wrong model", found)


async def read_answer(reply: Reply, expected: str, *, stream: bool) -> Answer:
    """Read as much of a reply as is needed to know that it is one.

    Errors in the 400s belong to the client and are passed on, and so does 501.

    Raises:
        UpstreamFailed: a server error, garbage, a stream for a document or the reverse, another model, or the
            reply broke off before it was known.
    """
    content_type = reply.headers.get("content-type", "application/json")
    if not (200 <= reply.status < 300 or 400 <= reply.status < 500 or reply.status == _NOT_SUPPORTED):
        raise UpstreamFailed("status", f"The upstream answered with status {reply.status}.")
    is_stream = content_type.startswith("text/event-stream")
    if reply.status < 300 and is_stream is not stream:
        # A client that waits for the one kind takes the other for an empty answer.
        raise UpstreamFailed("garbage", f"The upstream answered with {content_type[:60]}, which was not asked for.")
    if not is_stream or reply.status >= 400:
        return await _read_document(reply, content_type, expected)
    pieces = reply.chunks()
    head = b""
    async for piece in pieces:
        head += piece
        event = _first_event(head)
        if event is not None:
            if has_error(event):
                raise UpstreamFailed("status", "The upstream began its stream with an error.")
            check_model(event, expected)
            return Answer(reply.status, content_type, b"", _whole_events(head, pieces))
        if len(head) > _MAX_EVENT:
            raise UpstreamFailed("garbage", f"The stream's first {len(head)} bytes hold no event.")
    raise UpstreamFailed("broken", f"The stream ended after {len(head)} bytes without an event.")


def _first_event(head: bytes) -> dict[str, Any] | None:
    try:
        return first_event(head)
    except (ValueError, RecursionError) as error:
        raise UpstreamFailed("garbage", f"The upstream's stream is not one: {error}.") from None


async def _read_document(reply: Reply, content_type: str, expected: str) -> Answer:
    body = b"".join([piece async for piece in _bounded(reply.chunks())])
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UpstreamFailed("garbage", f"The upstream answered {len(body)} bytes that are not a JSON object.")
    if reply.status < 300:
        if has_error(document):
            raise UpstreamFailed("status", "The upstream answered with an error under status 200.")
        check_model(document, expected)
    usage = document.get("usage")
    tokens = usage.get("completion_tokens", 0) if isinstance(usage, dict) else 0
    counted = tokens if isinstance(tokens, int) and tokens > 0 else 0
    later = reply.headers.get("retry-after", "")
    extra = ((b"retry-after", later.encode()),) if later.isdigit() else ()
    return Answer(reply.status, content_type, body, tokens=counted, extra=extra)


async def _bounded(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > MAX_DOCUMENT:
            raise UpstreamFailed("garbage", f"The upstream's document is larger than {MAX_DOCUMENT} bytes.")
        yield piece


async def _whole_events(head: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The stream in whole events; raises UpstreamFailed when it ends without ``[DONE]``."""
    held, last = head, b""
    cut = whole_events(held)
    if cut:
        last, held = held[:cut], held[cut:]
        yield last
    async for piece in pieces:
        data = held + piece if held else piece
        cut = whole_events(data)
        if cut == len(data):
            last, held = data, b""
            yield data
        elif cut:
            last, held = data[:cut], data[cut:]
            yield last
        else:
            held = data
            if len(held) > _MAX_EVENT:
                raise UpstreamFailed("garbage", f"{len(held)} bytes of the stream hold no whole event.")
    if b"[DONE]" not in last[-32:]:
        raise UpstreamFailed("broken", "The upstream's stream ended before it was done.")


async def judge(answer: Answer, escalation: Escalation, *, strip: bool) -> Answer | Unsure:
    """Read the start of an answer (or all of it) and keep it only when every token seen was sure enough.

    ``strip``: the client did not ask for log-probabilities, so it gets none. Answers without any (tool
    calls on some engines) are unsure.

    Raises:
        UpstreamFailed: the stream broke off, or is no stream of JSON.
    """
    if answer.status >= 300:
        return answer
    if answer.stream is None:
        document = json.loads(answer.head)
        lowest = score(logprobs_of(document), escalation.window)
        if not is_sure(lowest, escalation.threshold):
            return Unsure(lowest)
        head = without_logprobs(document) if strip else answer.head
        return Answer(answer.status, answer.content_type, head, tokens=answer.tokens)
    held: list[bytes] = []
    seen: list[float] = []
    async for events in answer.stream:
        held.append(_stripped(events) if strip else events)
        seen += [value for document in _documents(events) for value in logprobs_of(document)]
        lowest = score(seen, escalation.window)
        if seen and not is_sure(lowest, escalation.threshold):
            return Unsure(lowest)
        if escalation.window is not None and len(seen) >= escalation.window:
            break
    if not seen:
        return Unsure(score(seen))
    return Answer(answer.status, answer.content_type, b"", _resume(held, answer.stream, strip=strip))


async def _resume(held: list[bytes], rest: AsyncIterator[bytes], *, strip: bool) -> AsyncIterator[bytes]:
    yield b"".join(held)
    async for events in rest:
        yield _stripped(events) if strip else events


def _documents(events: bytes) -> list[dict[str, Any]]:
    try:
        return list(documents(events))
    except (ValueError, RecursionError) as error:
        raise UpstreamFailed("garbage", f"The upstream's stream is not one: {error}.") from None


def _stripped(events: bytes) -> bytes:
    """Events without their log-probabilities."""
    out = b"".join(b"data: " + without_logprobs(document) + b"\n\n" for document in _documents(events))
    return out + DONE if b"[DONE]" in events[-32:] else out
