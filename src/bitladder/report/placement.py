"""Where the names in a chart go: each takes the nearest place that is free. The page's ``placement.js`` is the same.

A drawing has y downwards; boxes are ``(left, top, right, bottom)`` in the drawing's units, text is 12 units high.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Box = tuple[float, float, float, float]
CHARACTER = 7.6
"""Width of a character: capitals and underscores, which names of levels are made of, are wide."""
BOLD = 8.2
"""Width of a character of the chosen levels' names, which are bold."""
BESIDE = 11
"""From the middle of a mark to a name beside it."""
LINE = 14
"""Height of a line of text."""
FURTHEST = 8 * LINE
"""How far above or below its mark a name may stand."""


class Place(NamedTuple):
    """Where a text may stand: its anchor point, ``start``, ``middle`` or ``end``, and what it covers."""

    x: float
    y: float
    anchor: str
    box: Box


def place_of(x: float, y: float, anchor: str, wide: float) -> Place:
    """A text of this width whose baseline is at ``y``."""
    left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    return Place(x, y, anchor, (left, y - 11, left + wide, y + 3))


def places_around(x: float, y: float, wide: float) -> Iterator[Place]:
    """Places around a mark, the nearest first: beside it, then line by line above and below, further aside last."""
    rises = [rise for step in range(0, FURTHEST + 1, LINE) for rise in ((-step, step) if step else (0,))]
    for aside in (BESIDE, 4 * BESIDE):
        for rise in rises:
            yield place_of(x + aside, y + 4 + rise, "start", wide)
            yield place_of(x - aside, y + 4 + rise, "end", wide)
            if rise:
                yield place_of(x, y + 4 + rise, "middle", wide)


def first_free(places: Iterable[Place], taken: Sequence[Box], area: Box) -> tuple[Place, bool]:
    """The first place inside the area that covers nothing taken, and True; else the one that covers least."""
    best: tuple[float, Place] | None = None
    for place in places:
        cost = 50 * _outside(place.box, area) + sum(_overlap(place.box, other) for other in taken)
        if cost == 0:
            return place, True
        if best is None or cost < best[0]:
            best = cost, place
    assert best is not None  # there is at least one place
    return best[1], False


def _outside(box: Box, area: Box) -> float:
    return max(0.0, area[0] - box[0], area[1] - box[1], box[2] - area[2], box[3] - area[3])


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0
