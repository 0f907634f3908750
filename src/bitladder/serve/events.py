"""Server-sent events of an upstream: where whole ones end, and what each holds.

Every event is read before it is passed on, so that garbage in the middle of a stream ends it with an error
and never reaches a client that would trip over it. What is passed on are the bytes that came.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from bitladder.serve.protocol import error_body

DONE = b"data: [DONE]\n\n"
_OTHER_FIELDS = (b":", b"event:", b"id:", b"retry:")


class BadEvent(ValueError):
    """Something that is no event of ours. ``begins`` is where its event begins in what was read."""

    def __init__(self, found: str, begins: int) -> None:
        super().__init__(found)
        self.begins = begins


def read_events(data: bytes) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """What every event holds whose ``data:`` line is complete, each with the place where the event begins: a JSON
    object, or None for ``[DONE]``.

    Comments, ``event:``, ``id:`` and ``retry:`` lines are skipped. An event has one ``data:`` line, as all
    OpenAI-compatible engines write them.

    Raises:
        BadEvent: a line without a field name that we know, or data that is no JSON object.
    """
    begins = at = 0
    for raw in data.split(b"\n")[:-1]:
        at += len(raw) + 1
        line = raw.rstrip(b"\r")
        if not line:
            begins = at
        elif line.startswith(b"data:"):
            yield begins, _document(line[5:].strip(), begins)
        elif not line.startswith(_OTHER_FIELDS):
            raise BadEvent("a line of the stream has no field name", begins)


def _document(text: bytes, begins: int) -> dict[str, Any] | None:
    if text == b"[DONE]":
        return None
    try:
        document = json.loads(text)
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
    return None


def has_error(document: Mapping[str, Any]) -> bool:
    """Whether an upstream's document or event reports an error instead of (or beside) an answer."""
    return bool(document.get("error")) or ("error" in document and "choices" not in document)


def whole_events(data: bytes) -> int:
    """How many bytes of ``data`` are whole events of a stream: where its last empty line ends."""
    if data.endswith(b"\n\n"):
        return len(data)
    plain, carriage = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(plain + 2 if plain >= 0 else 0, carriage + 4 if carriage >= 0 else 0)


def stream_error(message: str, code: str) -> bytes:
    """An event that OpenAI clients raise as an error; stands after a whole event."""
    return b"data: " + error_body(message, code, 502) + b"\n\n"
