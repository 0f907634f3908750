"""Which tier answers, and why: policy only, a function from what a request looks like to a choice with its
reason.

The order: a tier named in a header, a tier or level named as the model, the operator's rules, and for
``auto`` the evidence. Nothing here knows about sockets, queues or engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from bitladder.describe.workload import TOOLS_TAG
from bitladder.errors import UsageError

QUALITY, SPEED, AUTO = "quality", "speed", "auto"


@dataclass(frozen=True)
class Features:
    """What the router may look at."""

    model: str
    tier_header: str = ""
    """Value of ``x-bitladder-tier`` in the request."""
    tags: tuple[str, ...] = ()
    """Values of ``x-bitladder-tag``, separated by commas there."""
    key: str = ""
    """Name of the API key, never the key."""
    path: str = ""
    asked: Callable[[], str] = str
    """Gives the last user message or the prompt; a function, because most requests need no look at it."""
    gives_tools: bool = False
    """Whether the model may call tools."""


@dataclass(frozen=True)
class Rule:
    """An operator's rule: everything given must match; the first rule that matches decides."""

    tier: str
    tag: str = ""
    key: str = ""
    path: str = ""

    def matches(self, features: Features) -> bool:
        """Whether the rule speaks about this request."""
        return (
            (not self.tag or self.tag in features.tags)
            and (not self.key or self.key == features.key)
            and (not self.path or self.path == features.path)
        )

    def __str__(self) -> str:
        return " and ".join(f"{name} {value}" for name in ("tag", "key", "path") if (value := getattr(self, name)))


def parse_rule(text: str) -> Rule:
    """A rule as written on the command line: ``speed:tag=bulk`` or ``quality:key=legal,path=/v1/completions``.

    Raises:
        UsageError: the text is no rule.
    """
    tier, _, conditions = text.partition(":")
    told = dict(part.strip().partition("=")[::2] for part in conditions.split(",") if part.strip())
    if tier not in (QUALITY, SPEED) or not told or not all(told.values()) or not set(told) <= {"tag", "key", "path"}:
        raise UsageError(
            f"'{text}' is not a rule.", do="Write one like speed:tag=bulk or quality:key=legal,path=/v1/completions."
        )
    return Rule(tier, **told)


@dataclass(frozen=True)
class TagEvidence:
    """What the speed tier lost on a workload's inputs of one tag, compared pair by pair with the quality
    tier.
    """

    inputs: int
    lost: int
    gained: int = 0
    spared: bool = False
    """Whether the speed tier serves this work although it lost something: it gained as much, or other tags hold nearly
    all of the loss (``serve.evidence.tag_table``).
    """

    @property
    def needs_quality(self) -> bool:
        """Whether this work goes to the quality tier."""
        return self.lost > 0 and not self.spared

    def __str__(self) -> str:
        gained = f" and gained {self.gained}" if self.gained else ""
        return f"the speed tier lost {self.lost}{gained} of {self.inputs} inputs"


@dataclass(frozen=True)
class Guess:
    """What kind of work a text looks like: its tag, and the input of the workload that it resembles most."""

    tag: str
    input_id: str
    similarity: float


@dataclass(frozen=True)
class AutoRule:
    """What the evidence says about ``auto``; ``serve.evidence.auto_rule`` derives it."""

    tags: Mapping[str, TagEvidence] = field(default_factory=dict)
    fixed: str = ""
    """One tier for everything, when the evidence says that routing gains nothing."""
    because: str = "nothing was measured of these two tiers"
    """The reason for ``fixed``, or for the quality tier when there is no evidence."""
    guess: Callable[[str], Guess | None] | None = None
    """Classifies work that came without a tag; None when it resembles nothing known."""
    escalate: bool = False
    """Where the speed tier lost: let it try first, and judge it by its token probabilities."""


class Routing(StrEnum):
    """What a choice of tier followed from."""

    HEADER = "header"
    MODEL = "model"
    """The tier was asked for by its name."""
    LEVEL = "level"
    """A level was; no other may answer."""
    RULE = "rule"
    AUTO = "auto"


@dataclass(frozen=True)
class TierChoice:
    """A tier (or a level's name, lower case) and the reason, a phrase."""

    tier: str
    reason: str
    kind: Routing
    escalate: bool = False
    tag: str = ""
    """The kind of work that it was taken for, where that decided."""

    @property
    def may_fall_back(self) -> bool:
        """Whether another tier may answer instead: not when a level was asked for by its name."""
        return self.kind is not Routing.LEVEL


def choose(features: Features, levels: frozenset[str], rules: tuple[Rule, ...], auto: AutoRule) -> TierChoice | None:
    """The tier for a request, or None when nothing of the name asked for is served.

    ``levels`` are the served levels' names in lower case.
    """
    named = features.tier_header.strip().lower()
    if named:
        return _named(named, levels, Routing.HEADER, "named in a header of the request")
    model = features.model.lower()
    if model != AUTO:
        return _named(model, levels, Routing.MODEL, "named in the request")
    for rule in rules:
        if rule.matches(features):
            return TierChoice(rule.tier, f"rule: {rule}" if str(rule) else "rule: everything", Routing.RULE)
    return _auto(features, auto)


def _named(name: str, levels: frozenset[str], kind: Routing, reason: str) -> TierChoice | None:
    if name in (QUALITY, SPEED):
        return TierChoice(name, f"{name} {reason}", kind)
    return TierChoice(name, f"level {reason}", Routing.LEVEL) if name in levels else None


def _auto(features: Features, auto: AutoRule) -> TierChoice:
    if auto.fixed:
        return TierChoice(auto.fixed, f"auto: {auto.because}", Routing.AUTO, auto.escalate and auto.fixed == SPEED)
    if not auto.tags:
        return TierChoice(QUALITY, f"auto: {auto.because}", Routing.AUTO)
    by_tools = features.gives_tools and not features.tags
    known = [tag for tag in ((TOOLS_TAG,) if by_tools else features.tags) if tag in auto.tags]
    if known:
        # With several tags the most careful one decides.
        careful = max(known, key=lambda tag: (auto.tags[tag].needs_quality, auto.tags[tag].lost))
        return _by_tag(careful, auto, "gives tools, tag" if by_tools else "tag")
    if features.tags:
        return TierChoice(QUALITY, f"auto: no evidence for tag {features.tags[0]}", Routing.AUTO)
    guess = auto.guess(features.asked()) if auto.guess else None
    if guess is None:
        return TierChoice(QUALITY, "auto: unlike every input of your workload", Routing.AUTO)
    return _by_tag(guess.tag, auto, f"like your input {guess.input_id} ({guess.similarity:.2f}), tag")


def _by_tag(tag: str, auto: AutoRule, how: str) -> TierChoice:
    seen = auto.tags[tag]
    if not seen.needs_quality:
        return TierChoice(SPEED, f"auto: {how} {tag}: {seen}", Routing.AUTO, tag=tag)
    if auto.escalate:
        reason = f"auto: {how} {tag}: speed tier first, judged by its own probabilities"
        return TierChoice(SPEED, reason, Routing.AUTO, escalate=True, tag=tag)
    return TierChoice(QUALITY, f"auto: {how} {tag}: {seen}", Routing.AUTO, tag=tag)
