"""Server-sent events as bytes: where whole ones end, and what each holds (WHATWG HTML, section 9.2.6).

Lines end with LF or CR LF, never with the other characters that Python counts as line ends: U+2028, U+0085 and their
like stand raw in the text of an answer. The third line end of the standard, CR alone, is written by no engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

BOM = b"\xef\xbb\xbf"
_OTHER_FIELDS = (b":", b"event:", b"id:", b"retry:")


class Event(NamedTuple):
    """One event, or a comment that stands alone, and where it stands in what was read."""

    data: bytes
    """Its ``data:`` lines, joined by line ends; empty when it has none, or only empty ones."""
    begins: int
    ends: int
    unknown: bytes
    """Its first line that is no field of the standard; empty when there is none."""
    has_data: bool
    """Whether it has a ``data:`` line at all."""


def events(stream: bytes) -> Iterator[Event]:
    """The whole events of a stream, in order. What follows the last empty line is not looked at."""
    begins = at = 0
    lines: list[bytes] = []
    unknown, seen = b"", False
    for raw in stream.split(b"\n")[:-1]:
        at += len(raw) + 1
        line = raw[:-1] if raw.endswith(b"\r") else raw
        if not line:
            if seen:
                data = lines[0] if len(lines) == 1 else b"\n".join(lines)
                yield Event(data.strip(), begins, at, unknown, bool(lines))
            begins, lines, unknown, seen = at, [], b"", False
            continue
        seen = True
        if line.startswith(b"data:"):
            lines.append(line[5:])
        elif line == b"data":
            lines.append(b"")
        elif not unknown and not line.startswith(_OTHER_FIELDS):
            unknown = line


def whole_events(stream: bytes) -> int:
    """How many bytes of ``stream`` are whole events: where its last empty line ends."""
    if stream.endswith(b"\n\n"):
        return len(stream)
    plain, carriage = stream.rfind(b"\n\n"), stream.rfind(b"\n\r\n")
    return max(plain + 2 if plain >= 0 else 0, carriage + 3 if carriage >= 0 else 0)
