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
from typing import Any, NamedTuple

from bitladder.engines import event_stream
from bitladder.engines.names import same_model
from bitladder.serve.backends import Reply, UpstreamFailed
from bitladder.serve.dialects import DIALECTS, Dialect
from bitladder.serve.escalation import is_sure, logprobs_of, score, without_logprobs
from bitladder.serve.events import (
    BOM,
    DONE,
    BadEvent,
    first_event,
    read_events,
    whole_events,
    without_empty,
)
from bitladder.serve.protocol import CHAT, error_body, strict_json
from bitladder.serve.settings import Escalation
from bitladder.units import MiB

MAX_DOCUMENT = 64 * MiB
_MAX_EVENT = 4 * MiB
_EMPTY_DATA = re.compile(rb"(?:^|\n)data:?[ \t]*\r?\n")
_MAX_MESSAGE, _MAX_CODE = 2000, 64
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_CANNOT_SEE = re.compile(
    r"(image|audio|video|multimodal).*not support|not support.*(image|audio|video|multimodal)", re.IGNORECASE
)
_INVALID_REQUEST = "invalid_request_error"
_OF_THE_KEY = (401, 402, 407)
_NOT_SUPPORTED = 501  # llama.cpp's word for what it was not started for; another tier cannot do it either


@dataclass
class Relayed:
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


def check_answer(document: dict[str, Any], expected: str, dialect: Dialect = DIALECTS[CHAT]) -> None:
    """Refuse what is no answer, or one of another model. A reply that names none is let through: there is nothing
    to compare.

    Raises:
        UpstreamFailed: phase ``garbage`` or ``wrong model``.
    """
    choices = document.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UpstreamFailed("garbage", "The upstream's choices are not a list of objects.")
    told = dialect.model(document)
    if not isinstance(told, str | None):
        raise UpstreamFailed("garbage", "The upstream's model is not a name.")
    if told and not same_model(expected, told):
        found = f"The upstream answered as '{told[:80]}' instead of '{expected}'."
        raise UpstreamFailed("wrong model", found)


async def read_answer(
    reply: Reply, expected: str, *, stream: bool, secret: str = "", path: str = CHAT, client_path: str = ""
) -> Relayed:
    """Read as much of a reply as is needed to know that it is one.

    Errors in the 400s belong to the client and are passed on in the gateway's own shape, and so does 501. Those about
    the key are ours, as the gateway's key was sent; ``secret``, should an error repeat it, is blotted out.
    A 500 that calls itself an invalid request is a 400, as is llama.cpp's for an image that its model cannot see.

    Args:
        reply: what came back.
        expected: the model that must have answered.
        stream: whether a stream was asked for.
        secret: the key that was sent.
        path: what was asked.
        client_path: what the client asked, when that was something else; errors are worded for it.

    Raises:
        UpstreamFailed: a server error, garbage, a stream for a document or the reverse, another model, or the
            reply broke off before it was known.
    """
    content_type = reply.headers.get("content-type", "application/json")
    if not 200 <= reply.status < 300:
        return await _read_error(reply, secret, client_path or path)
    dialect = DIALECTS[path]
    is_stream = content_type.startswith("text/event-stream")
    if is_stream is not stream:
        # A client that waits for the one kind takes the other for an empty answer.
        raise UpstreamFailed("garbage", f"The upstream answered with {content_type[:60]}, which was not asked for.")
    if not is_stream:
        return await _read_document(reply, content_type, expected, dialect)
    pieces = reply.chunks()
    head = b""
    async for piece in pieces:
        head = (head + piece).removeprefix(BOM)
        event = _first_event(head)
        if event is not None:
            if dialect.is_error(event):
                raise UpstreamFailed("status", "The upstream began its stream with an error.")
            check_answer(event, expected, dialect)
            checked = _checked(_whole_events(head, pieces), expected, secret, dialect)
            return Relayed(reply.status, content_type, b"", checked)
        if len(head) > _MAX_EVENT:
            raise UpstreamFailed("garbage", f"The stream's first {len(head)} bytes hold no event.")
    if _is_done(head):
        checked = _checked(_whole_events(head, pieces), expected, secret, dialect)
        return Relayed(reply.status, content_type, b"", checked)
    raise UpstreamFailed("broken", f"The stream ended after {len(head)} bytes without an event.")


def _first_event(head: bytes) -> dict[str, Any] | None:
    try:
        return first_event(head)
    except BadEvent as error:
        raise UpstreamFailed("garbage", f"The upstream's stream is not one: {error}.") from None


async def _read_document(reply: Reply, content_type: str, expected: str, dialect: Dialect) -> Relayed:
    body = b"".join([piece async for piece in _bounded(reply.chunks())])
    try:
        document = strict_json(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UpstreamFailed("garbage", f"The upstream answered {len(body)} bytes that are not a JSON object.")
    if dialect.is_error(document):
        raise UpstreamFailed("status", f"The upstream answered with an error under status 200{_words(document, '')}.")
    if not dialect.is_answer(document):
        raise UpstreamFailed("garbage", f"The upstream's document holds none of: {', '.join(dialect.answers)}.")
    check_answer(document, expected, dialect)
    return Relayed(reply.status, content_type, body, tokens=dialect.tokens(document))


async def _read_error(reply: Reply, secret: str, path: str) -> Relayed:
    """An upstream's error that belongs to the client.

    Raises:
        UpstreamFailed: it is the upstream's own, or the gateway's.
    """
    failed = UpstreamFailed("status", f"The upstream answered with status {reply.status}.")
    if not (400 <= reply.status < 600) or reply.status in _OF_THE_KEY:
        raise failed
    error = _error_of(b"".join([piece async for piece in _bounded(reply.chunks())]))
    message, kind, code = (_clean(text, secret) for text in error)
    status = reply.status
    if status >= 500 and status != _NOT_SUPPORTED:
        if kind != _INVALID_REQUEST and not _CANNOT_SEE.search(message):
            raise failed
        status, code = 400, "bad_request"
    message = message[:_MAX_MESSAGE] or f"The upstream refused this with status {status}."
    later = reply.headers.get("retry-after", "")
    extra = ((b"retry-after", later.encode()),) if later.isascii() and later.isdigit() and len(later) < 10 else ()
    body = error_body(message, code[:_MAX_CODE] or f"upstream_{status}", status, path)
    return Relayed(status, "application/json", body, extra=extra)


def _error_of(body: bytes) -> tuple[str, str, str]:
    """Message, type and code of an upstream's error in any of the usual shapes; empty where there is none.

    Raises:
        UpstreamFailed: phase ``garbage``, it is no JSON object.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UpstreamFailed("garbage", f"The upstream refused with {len(body)} bytes that are not a JSON object.")
    error = document.get("error") or document
    about = error if isinstance(error, dict) else {"message": error}
    message = next((about[name] for name in ("message", "detail") if about.get(name)), "")
    found = (message if isinstance(message, str) else json.dumps(message), about.get("type"), about.get("code"))
    message, kind, code = (item if isinstance(item, str) else "" for item in found)
    return message, kind, code or kind


def _clean(text: str, secret: str) -> str:
    """A foreign text in one line, without our key."""
    return _CONTROL.sub(" ", text.replace(secret, "***") if secret else text).strip()


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
    if _is_done(held):
        yield DONE


def _is_done(rest: bytes) -> bool:
    """Whether what a stream ended with says that it is done, though no empty line follows."""
    return [event.data for event in event_stream.events(rest + b"\n\n") if event.has_data][-1:] == [b"[DONE]"]


async def _checked(stream: AsyncIterator[bytes], expected: str, secret: str, dialect: Dialect) -> AsyncIterator[bytes]:
    """Whole events up to and with the one that ends an answer (``[DONE]``), after each was read.

    Raises:
        UpstreamFailed: an event is garbage, an error or another model's, after what came before it was given; or
            the stream ended without its end.
    """
    done = False
    async for piece in stream:
        if done:
            continue  # to the end of the reply, so that its connection can be used again
        good, done, failure = _good_part(piece, expected, secret, dialect)
        passed = piece if good == len(piece) else piece[:good]
        if _EMPTY_DATA.search(passed):
            passed = without_empty(passed)
        if done:
            yield passed if dialect.ends else passed + DONE
        elif passed:
            yield passed
        if failure is not None:
            raise failure
    if not done:
        raise UpstreamFailed("broken", "The upstream's stream ended before it was done.")


class _Checked(NamedTuple):
    """How much of a piece of a stream may be passed on."""

    good: int
    """Bytes before ``[DONE]`` or the first bad event, or up to the end of another event that ends the answer."""
    done: bool
    """Whether the answer ends there."""
    failure: UpstreamFailed | None
    """What is bad there."""


def _good_part(data: bytes, expected: str, secret: str, dialect: Dialect) -> _Checked:
    """Look through whole events, up to the end, the one that ends the answer or the first bad one."""
    begins = 0
    try:
        for event, document in read_events(data):
            begins = event.begins
            if document is None:
                return _Checked(begins, done=not dialect.ends, failure=_too_early() if dialect.ends else None)
            if dialect.is_error(document):
                said = _words(document, secret)
                return _Checked(begins, False, UpstreamFailed("status", f"The upstream reported an error{said}."))
            check_answer(document, expected, dialect)
            if document.get("type") in dialect.ends:
                return _Checked(event.ends, done=True, failure=None)
    except BadEvent as error:
        return _Checked(error.begins, False, UpstreamFailed("garbage", f"The upstream sent garbage: {error}."))
    except UpstreamFailed as failure:
        return _Checked(begins, False, failure)
    return _Checked(len(data), False, None)


def _too_early() -> UpstreamFailed:
    return UpstreamFailed("broken", "The upstream's stream ended before its answer was done.")


def _words(document: dict[str, Any], secret: str) -> str:
    """What the upstream says about its error, if anything."""
    inner = document.get("response")
    error = document.get("error") or (inner if isinstance(inner, dict) else {}).get("error") or document
    said = error.get("message") if isinstance(error, dict) else error
    text = _clean(said, secret) if isinstance(said, str) else ""
    return f": {text[:200].rstrip('.')}" if text else ""


async def judge(answer: Relayed, escalation: Escalation, *, strip: bool) -> Relayed | Unsure:
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
        return Relayed(answer.status, answer.content_type, head, tokens=answer.tokens)
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
    return Relayed(answer.status, answer.content_type, b"", _resume(held, answer.stream, strip=strip))


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
