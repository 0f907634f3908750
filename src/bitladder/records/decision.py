"""The choice, with the reason for each level."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """What became of one level.

    ``status``: ``quality tier``, ``speed tier``, ``both tiers``, ``meets the bar``, ``fails the bar``,
    ``cannot tell``, ``does not fit`` or ``reference``.
    """

    level: str
    status: str
    reason: str
    loss: str = "not known"
    """What is known of the loss: ``none`` (the reference itself), ``not told from zero``, ``measurable``,
    ``known bad`` or ``not known``. A loss that cannot be seen and one known to be bad are different
    things."""


@dataclass(frozen=True)
class TagVerdict:
    """What one kind of work lost at one level, on the inputs that carry the tag.

    ``status``: ``no loss seen``, ``loss seen`` (too few inputs to be sure) or ``loss known``.
    """

    level: str
    tag: str
    inputs: int
    lost: int
    gained: int
    loss_low: float
    loss_high: float
    """95% interval of the loss in pass rate, as a share: 0.04 is four points."""
    status: str


@dataclass(frozen=True)
class Decision:
    """A quality tier and a speed tier that fit the machine, or None where no level qualifies."""

    bar: str
    quality: str | None
    speed: str | None
    verdicts: tuple[Verdict, ...]
    summary: str
    outcome: str = "met"
    """``met``: some level holds the bar; ``not met``: every level is known not to; ``cannot tell``: evidence
    is missing."""
    pair: str = ""
    """How the tiers live on the machine: ``together``, ``swap``, ``one level`` or empty when there is no
    choice."""
    front: tuple[str, ...] = ()
    """Levels that no other level beats in size, speed and loss at once, largest first."""
    tags: tuple[TagVerdict, ...] = ()
    next: tuple[str, ...] = ()
    """What to measure next, where the evidence is not enough."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the file behind each level that lies on disk: the decision is about these files and no others."""
