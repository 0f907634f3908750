"""Two answers, word by word."""

from __future__ import annotations

from dataclasses import dataclass

from bitladder.unicode import changes, pieces


@dataclass(frozen=True)
class Segment:
    """A stretch of text: ``same``, ``removed`` (only in the reference) or ``added`` (only in the other)."""

    kind: str
    text: str


def word_diff(reference: str, other: str) -> list[Segment]:
    """The other text with its differences from the reference, in reading order.

    Whitespace counts, but does not hold a change together: "a b" to "x y" is one change, not two around a common space.
    """
    before, after = pieces(reference), pieces(other)
    steps = []
    for kind, old, new in changes(before, after):
        steps += [("same", after[new])] if kind == "equal" else [("removed", before[old]), ("added", after[new])]
    return _merged(steps)


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
