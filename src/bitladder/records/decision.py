"""The choice, with the reason for each level."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from bitladder.records import OPTIONAL, Real


class Status(StrEnum):
    """What became of a level."""

    REFERENCE = "reference"
    QUALITY = "quality tier"
    SPEED = "speed tier"
    BOTH = "both tiers"
    MEETS = "meets the bar"
    FAILS = "fails the bar"
    UNKNOWN = "cannot tell"
    DOES_NOT_FIT = "does not fit"

    @property
    def holds(self) -> bool:
        """Whether the level is known to hold the bar; the reference does."""
        return self not in (Status.FAILS, Status.UNKNOWN, Status.DOES_NOT_FIT)

    @property
    def tier(self) -> str:
        """``quality``, ``speed``, ``both``, or empty for a level in no tier."""
        return {Status.QUALITY: "quality", Status.SPEED: "speed", Status.BOTH: "both"}.get(self, "")


class Loss(StrEnum):
    """What is known of a level's loss. A loss that cannot be seen and one known to be bad are different things."""

    NONE = "none"
    """The reference itself."""
    NOT_SEEN = "not told from zero"
    MEASURABLE = "measurable"
    BAD = "known bad"
    UNKNOWN = "not known"


class TagStatus(StrEnum):
    """What one kind of work lost."""

    NONE_SEEN = "no loss seen"
    SEEN = "loss seen"
    """On too few inputs to be sure."""
    KNOWN = "loss known"


class Outcome(StrEnum):
    """What the evidence says of the bar, all levels together."""

    MET = "met"
    """Some level holds it."""
    NOT_MET = "not met"
    """Every level is known not to."""
    UNKNOWN = "cannot tell"
    """Evidence is missing."""


class Pairing(StrEnum):
    """How the tiers live on the machine."""

    NO_CHOICE = ""
    ONE_LEVEL = "one level"
    TOGETHER = "together"
    SWAP = "swap"


@dataclass(frozen=True)
class Verdict:
    """What became of one level, and why."""

    level: str
    status: Status
    reason: str
    loss: Loss = Loss.UNKNOWN


@dataclass(frozen=True)
class TagVerdict:
    """What one kind of work lost at one level, on the inputs that carry the tag."""

    level: str
    tag: str
    inputs: int
    lost: int
    gained: int
    loss_low: Real
    loss_high: Real
    """95% interval of the loss in pass rate, as a share: 0.04 is four points."""
    status: TagStatus


@dataclass(frozen=True)
class Certainty:
    """How often a pair of tiers is chosen when the evidence is drawn anew."""

    quality: str | None
    speed: str | None
    share: Real
    """Of the resamples, 0 to 1."""


@dataclass(frozen=True)
class TierGuesses:
    """What a tier guesses tokens ahead with, because it surely pays (``plan.speculation``)."""

    level: str
    guesses: str
    """``ngram``, ``mtp`` or ``draft:FILE``."""
    ratio: Real
    """Time without over time with guesses, on the run's inputs; with its 95% interval."""
    low: Real
    high: Real
    draft_sha256: str = ""


@dataclass(frozen=True)
class Decision:
    """A quality tier and a speed tier that fit the machine, or None where no level qualifies."""

    bar: str
    quality: str | None
    speed: str | None
    verdicts: tuple[Verdict, ...]
    summary: str
    outcome: Outcome = Outcome.MET
    pair: Pairing = Pairing.NO_CHOICE
    front: tuple[str, ...] = ()
    """Levels that no other level beats in size, speed and loss at once, largest first."""
    tags: tuple[TagVerdict, ...] = ()
    next: tuple[str, ...] = ()
    """What to measure next, where the evidence is not enough."""
    certainty: tuple[Certainty, ...] = ()
    """The pair chosen first, then others that resamples of the evidence chose, the most frequent first."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the file behind each level that lies on disk: the decision is about these files and no others."""
    speculate: tuple[TierGuesses, ...] = field(default=(), metadata=OPTIONAL)
    """Of the tiers for which guessing ahead pays; the others decode one token after the other."""
