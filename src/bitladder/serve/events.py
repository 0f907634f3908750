"""Server-sent events of an upstream: where whole ones end, and what each holds.

Every event is read before it is passed on, so that garbage in the middle of a stream ends it with an error
and never reaches a client that would trip over it. What is passed on are the bytes that came.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from bitladder.engines.event_stream import BOM, Event, events, whole_events
from bitladder.serve.protocol import MESSAGES, RESPONSES, error_body, strict_json

__all__ = [
    "BOM",
    "DONE",
    "BadEvent",
    "first_event",
    "has_error",
    "read_events",
    "stream_error",
    "whole_events",
    "without_empty",
]

DONE = b"data: [DONE]\n\n"


class BadEvent(ValueError):
    """Something that is no event of ours. ``begins`` is where its event begins in what was read."""

    def __init__(self, found: str, begins: int) -> None:
        super().__init__(found)
        self.begins = begins


def read_events(data: bytes) -> Iterator[tuple[Event, dict[str, Any] | None]]:
    """The whole events of a stream that hold anything, each with its JSON object, or None for ``[DONE]``. Comments and
    events without data are skipped.

    Raises:
        BadEvent: a line without a field name that we know, or data that is no JSON object.
    """
    for event in events(data):
        if event.unknown:
            raise BadEvent("a line of the stream has no field name", event.begins)
        if event.data:
            yield event, _document(event.data, event.begins)


def _document(text: bytes, begins: int) -> dict[str, Any] | None:
    if text == b"[DONE]":
        return None
    try:
        document = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise BadEvent(f"an event of the stream is not JSON ({error})", begins) from None
    if not isinstance(document, dict):
        raise BadEvent("an event of the stream is not a JSON object", begins)
    return document


def first_event(data: bytes) -> dict[str, Any] | None:
    """The first JSON event of a stream that starts with ``data``; empty for ``[DONE]``, None while there is none yet.

    Raises:
        BadEvent: this is no stream of JSON objects.
    """
    for _, document in read_events(data):
        return document or {}
    # A line that is no field tells at once that nothing can come of it: a web page has no empty lines.
    for event in events(data[: data.rfind(b"\n") + 1] + b"\n"):
        if event.unknown:
            raise BadEvent("a line of the stream has no field name", event.begins)
    return None


def without_empty(data: bytes) -> bytes:
    """Whole events without those whose data is empty: the standard lets clients skip them, and some stumble."""
    return b"".join(data[event.begins : event.ends] for event in events(data) if event.data or not event.has_data)


def has_error(document: Mapping[str, Any]) -> bool:
    """Whether an upstream's document or event reports an error instead of (or beside) an answer. A member ``error``
    that is null, false or an empty text says that there is none.
    """
    error = document.get("error")
    return bool(error) or (error is not None and error not in ("", False) and "choices" not in document)


def stream_error(message: str, code: str, path: str = "", number: int = 0) -> bytes:
    """An event that clients of this path raise as an error; stands after ``number`` whole events."""
    body = error_body(message, code, 502, path)
    if path == RESPONSES:
        about = {"type": "error", "code": code, "message": message, "param": None, "sequence_number": number}
        body = json.dumps({**about, **json.loads(body)}).encode()
    return (b"event: error\n" if path in (MESSAGES, RESPONSES) else b"") + b"data: " + body + b"\n\n"
