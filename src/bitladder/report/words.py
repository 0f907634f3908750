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
    """The other text with its differences from the reference, in reading order; whitespace counts as
    itself."""
    before, after = _TOKEN.findall(reference), _TOKEN.findall(other)
    if max(len(before), len(after)) > LONGEST:
        return _common_ends(before, after)
    segments: list[Segment] = []
    for operation, i, j, k, m in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if operation == "equal":
            segments.append(Segment("same", "".join(after[k:m])))
            continue
        if i < j:
            segments.append(Segment("removed", "".join(before[i:j])))
        if k < m:
            segments.append(Segment("added", "".join(after[k:m])))
    return segments


def _common_ends(before: list[str], after: list[str]) -> list[Segment]:
    """Common start, one difference, common end."""
    shorter = min(len(before), len(after))
    start = next((n for n in range(shorter) if before[n] != after[n]), shorter)
    end = next((n for n in range(shorter - start) if before[-1 - n] != after[-1 - n]), shorter - start)
    parts = (
        Segment("same", "".join(after[:start])),
        Segment("removed", "".join(before[start : len(before) - end])),
        Segment("added", "".join(after[start : len(after) - end])),
        Segment("same", "".join(after[len(after) - end :])),
    )
    return [part for part in parts if part.text]
