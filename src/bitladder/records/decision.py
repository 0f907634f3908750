"""The choice, with the reason for each level."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What became of one level.

    ``status``: ``quality tier``, ``speed tier``, ``both tiers``, ``meets the bar``, ``fails the bar``, ``cannot tell``,
    ``does not fit`` or ``reference``.
    """

    level: str
    status: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """A quality tier and a speed tier that fit the machine, or None where no level qualifies."""

    bar: str
    quality: str | None
    speed: str | None
    verdicts: tuple[Verdict, ...]
    summary: str
