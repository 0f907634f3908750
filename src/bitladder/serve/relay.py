"""From an upstream's reply to an answer worth sending: checked before its first byte, complete or clearly
not.

A document is read whole before any of it is sent. A stream is read up to its first event, then passed on as
it arrives, every event checked, cut only between events, so that an error can be told as an event of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from bitladder.serve.backends import Reply, UpstreamFailed
from bitladder.serve.escalation import is_sure, logprobs_of, score, without_logprobs
from bitladder.serve.events import DONE, BadEvent, first_event, has_error, read_events, whole_events
from bitladder.serve.settings import Escalation
from bitladder.units import MiB

MAX_DOCUMENT = 64 * MiB
_MAX_EVENT = 4 * MiB
_DATED = re.compile(r"-\d{4}-?\d{2}-?\d{2}|:latest")
_NOT_SUPPORTED = 501  # llama.cpp's word for what it was not started for; another tier cannot do it either


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


def check_answer(document: dict[str, Any], expected: str) -> None:
    """Refuse what is no answer, or one of another model. A reply that names none is let through: there is nothing
    to compare.

    Raises:
        UpstreamFailed: phase ``garbage`` or ``wrong model``.
    """
    choices = document.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UpstreamFailed("garbage", "The upstream's choices are not a list of objects.")
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
            check_answer(event, expected)
            return Answer(reply.status, content_type, b"", _checked(_whole_events(head, pieces), expected))
        if len(head) > _MAX_EVENT:
            raise UpstreamFailed("garbage", f"The stream's first {len(head)} bytes hold no event.")
    raise UpstreamFailed("broken", f"The stream ended after {len(head)} bytes without an event.")


def _first_event(head: bytes) -> dict[str, Any] | None:
    try:
        return first_event(head)
    except BadEvent as error:
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
        if not any(isinstance(document.get(name), list) for name in ("choices", "data")):
            raise UpstreamFailed("garbage", "The upstream's document holds neither choices nor embeddings.")
        check_answer(document, expected)
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
    """The stream in whole events."""
    held = head
    cut = whole_events(held)
    if cut:
        yield held[:cut]
        held = held[cut:]
    async for piece in pieces:
        data = held + piece if held else piece
        cut = whole_events(data)
        if cut == len(data):
            held = b""
            yield data
        elif cut:
            held = data[cut:]
            yield data[:cut]
        else:
            held = data
            if len(held) > _MAX_EVENT:
                raise UpstreamFailed("garbage", f"{len(held)} bytes of the stream hold no whole event.")


async def _checked(stream: AsyncIterator[bytes], expected: str) -> AsyncIterator[bytes]:
    """Whole events up to and with ``[DONE]``, after each was read.

    Raises:
        UpstreamFailed: an event is garbage, an error or another model's, after what came before it was given; or
            the stream ended without ``[DONE]``.
    """
    done = False
    async for events in stream:
        if done:
            continue  # to the end of the reply, so that its connection can be used again
        good, done, failure = _good_part(events, expected)
        if done:
            yield events[:good] + DONE
        elif good:
            yield events if good == len(events) else events[:good]
        if failure is not None:
            raise failure
    if not done:
        raise UpstreamFailed("broken", "The upstream's stream ended before it was done.")


def _good_part(events: bytes, expected: str) -> tuple[int, bool, UpstreamFailed | None]:
    """Bytes of ``events`` before ``[DONE]`` or the first bad event, whether it was ``[DONE]``, and what is bad."""
    begins = 0
    try:
        for begins, document in read_events(events):
            if document is None:
                return begins, True, None
            if has_error(document):
                return begins, False, UpstreamFailed("status", f"The upstream reported an error{_words(document)}.")
            check_answer(document, expected)
    except BadEvent as error:
        return error.begins, False, UpstreamFailed("garbage", f"The upstream sent garbage: {error}.")
    except UpstreamFailed as failure:
        return begins, False, failure
    return len(events), False, None


def _words(document: dict[str, Any]) -> str:
    """What the upstream says about its error, if anything."""
    error = document["error"]
    said = error.get("message") if isinstance(error, dict) else error
    return f": {said[:200].rstrip('.')}" if isinstance(said, str) and said else ""


async def judge(answer: Answer, escalation: Escalation, *, strip: bool) -> Answer | Unsure:
    """Read the start of an answer (or all of it) and keep it only when every token seen was sure enough.

    ``strip``: the client did not ask for log-probabilities, so it gets none. Answers without any (tool
    calls on some engines) are unsure.

    Raises:
        UpstreamFailed: the stream broke off, or an event of it is bad.
    """
    if answer.status >= 300:
        return answer
    if answer.stream is None:
        document = json.loads(answer.head)
        lowest = score(_logprobs(document), escalation.window)
        if not is_sure(lowest, escalation.threshold):
            return Unsure(lowest)
        head = without_logprobs(document) if strip else answer.head
        return Answer(answer.status, answer.content_type, head, tokens=answer.tokens)
    held: list[bytes] = []
    seen: list[float] = []
    async for events in answer.stream:
        held.append(_stripped(events) if strip else events)
        seen += [value for _, document in read_events(events) if document for value in _logprobs(document)]
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


def _logprobs(document: dict[str, Any]) -> list[float]:
    try:
        return logprobs_of(document)
    except ValueError as error:
        raise UpstreamFailed("garbage", f"The upstream sent {error}.") from None


def _stripped(events: bytes) -> bytes:
    """Events without their log-probabilities."""
    documents = (document for _, document in read_events(events) if document is not None)
    out = b"".join(b"data: " + without_logprobs(document) + b"\n\n" for document in documents)
    return out + DONE if events.endswith(DONE) else out
