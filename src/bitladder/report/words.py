"""Two answers, word by word."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

_TOKEN = re.compile(r"\s+|\w+|[^\w\s]", re.UNICODE)
LONGEST = 4000
"""Tokens. Matching is quadratic; beyond this, the common ends are kept and the middle is called different."""


@dataclass(frozen=True)
class Segment:
    """A stretch of text: ``same``, ``removed`` (only in the reference) or ``added`` (only in the other)."""

    kind: str
    text: str


def word_diff(reference: str, other: str) -> list[Segment]:
    """The other text with its differences from the reference, in reading order.

    Whitespace counts, but does not hold a change together: "a b" to "x y" is one change, not two around a common space.
    """
    before, after = _TOKEN.findall(reference), _TOKEN.findall(other)
    if max(len(before), len(after)) > LONGEST:
        return _merged(_common_ends(before, after))
    steps = []
    for operation, i, j, k, m in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        steps += [("same", after[k:m])] if operation == "equal" else [("removed", before[i:j]), ("added", after[k:m])]
    return _merged(steps)


def _common_ends(before: list[str], after: list[str]) -> list[tuple[str, list[str]]]:
    """Common start, one difference, common end."""
    shorter = min(len(before), len(after))
    start = next((n for n in range(shorter) if before[n] != after[n]), shorter)
    end = next((n for n in range(shorter - start) if before[-1 - n] != after[-1 - n]), shorter - start)
    return [
        ("same", after[:start]),
        ("removed", before[start : len(before) - end]),
        ("added", after[start : len(after) - end]),
        ("same", after[len(after) - end :]),
    ]


def _merged(steps: list[tuple[str, list[str]]]) -> list[Segment]:
    """Neighbours of one kind as one segment; what was removed stands before what was added in its place."""
    segments: list[Segment] = []
    change = {"removed": "", "added": ""}
    space = ""  # common whitespace after a change: part of it if another change follows

    def close(text: str) -> None:
        segments.extend(Segment(kind, changed) for kind, changed in change.items() if changed)
        change.update(removed="", added="")
        if text:
            segments.append(Segment("same", text))

    for kind, tokens in steps:
        text = "".join(tokens)
        if kind != "same" and text:
            change = {name: changed + space for name, changed in change.items()}
            change[kind] += text
            space = ""
        elif text.isspace() and any(change.values()):
            space += text
        elif text:
            close(space + text)
            space = ""
    close(space)
    return segments
