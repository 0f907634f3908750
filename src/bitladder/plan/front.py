"""The Pareto front over size, speed and loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Standpoint(NamedTuple):
    """A level by what it takes and gives."""

    name: str
    bytes: int
    tokens_per_s: float
    """NaN: not known; it is compared by size and loss alone."""
    loss: float
    """Not finite: nothing is known in its favour, and it stays off the front."""


def pareto(points: Iterable[Standpoint]) -> tuple[str, ...]:
    """Names of the points that no other beats: at most its size, at least its speed, at most its loss, and
    better in one."""
    known = [point for point in points if math.isfinite(point.loss)]
    return tuple(point.name for point in known if not any(_beats(other, point) for other in known))


def _beats(other: Standpoint, own: Standpoint) -> bool:
    """``other`` is nowhere worse than ``own``, and somewhere better."""
    faster = other.tokens_per_s - own.tokens_per_s
    gains = [own.bytes - other.bytes, own.loss - other.loss, *([] if math.isnan(faster) else [faster])]
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)
