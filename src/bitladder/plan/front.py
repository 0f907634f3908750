"""The Pareto front over size, speed and loss."""

from __future__ import annotations

import math
from collections.abc import Iterable


def pareto(points: Iterable[tuple[str, float, float, float]]) -> tuple[str, ...]:
    """Names of the points that no other beats: at most its size, at least its speed, at most its loss, and
    better in one.

    Each point is ``(name, bytes, tokens_per_s, loss)``. A speed of NaN is unknown: such a point is compared
    by size and loss alone. A loss that is not finite keeps a point off the front: nothing is known in its
    favour.
    """
    known = [point for point in points if math.isfinite(point[3])]
    return tuple(name for name, *own in known if not any(_beats(other, own) for _, *other in known))


def _beats(other: list[float], own: list[float]) -> bool:
    """``other`` is nowhere worse than ``own``, and somewhere better."""
    speeds_known = not (math.isnan(other[1]) or math.isnan(own[1]))
    gains = [own[0] - other[0], own[2] - other[2]] + ([other[1] - own[1]] if speeds_known else [])
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)
