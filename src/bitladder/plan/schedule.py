"""Which piece of work comes next when a decision must be there in time: from what has been looked at to the next look.

Every level gets a short look at each kind of evidence first: a few documents, a few inputs, a round of speed; a level
that the first of these rule out gets no look at the others. Then time
goes where a tier is still open, kind by kind, the one of which least was seen first; levels that are clearly in or out
get no more. Documents and inputs are taken in one fixed random order, the same for all levels, so what two levels were
both measured on is always the beginning of it. Their number grows fourfold from look to look, so there are few looks,
and intervals pay little for them (``stats.sequential.spent``).

A piece is begun only when its predicted cost fits into the time that is left; a smaller one is tried where it does not.
Where there is no time to look at all levels at once, some are looked at, spread over the ladder, and the others as
soon as that has shown how long it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bitladder.plan.bar import parse_bar
from bitladder.records.decision import Decision, Loss, Status

SHARE_TRUSTED = 0.95
"""A pair of tiers that so many resamples of the evidence choose is settled."""


class Kind(StrEnum):
    """What there is evidence of."""

    DOCUMENTS = "documents"
    INPUTS = "inputs"
    ROUNDS = "rounds"


LEAST = {Kind.DOCUMENTS: 2, Kind.INPUTS: 4, Kind.ROUNDS: 1}
"""Units below which a look shows nothing: one document has no interval."""
FIRST_SHARE = 0.25
"""Of all units, in the first look."""
FIRST_DOCUMENTS = 6
"""In the first look, at least, where there are so many: intervals of three decide nothing (``docs/log.md``)."""
MOST_BEFORE_ALL = 2 / 3
"""Of all units, that a look short of them may take: a pass for the few that are left costs more than it saves."""
GROWTH = 4
"""What has been seen after a look, over what had been before: each look passes over the model's layers and starts
engines anew, so few are best."""
LOOK_SHARE = 0.5
"""Of the time left, that a first look at one kind of evidence may take."""


@dataclass(frozen=True)
class Seen:
    """How many units of each kind a level was measured on: always the first ones of the order."""

    level: str
    documents: int = 0
    inputs: int = 0
    rounds: int = 0

    def of(self, kind: Kind) -> int:
        """Units of a kind."""
        return int(getattr(self, kind))


@dataclass(frozen=True)
class Piece:
    """Units ``start`` to ``stop`` of a kind, on these levels."""

    kind: Kind
    levels: tuple[str, ...]
    start: int
    stop: int


_SHOWN_BY_ANSWERS = ("no loss", "passes", "recall")
"""What of a bar only answers can show to hold; "no known loss" holds without them."""

Cost = Callable[[Piece], float]
"""Predicted seconds."""


def looks(kind: Kind, total: int) -> tuple[int, ...]:
    """How many units have been seen after each look, the first one's to all: ``(6, 12)`` of twelve; of rounds one,
    then all."""
    if kind is Kind.ROUNDS:
        return tuple(dict.fromkeys((1, total))) if total else ()
    ends: list[int] = []
    end = max(FIRST_DOCUMENTS if kind is Kind.DOCUMENTS else LEAST[kind], math.ceil(FIRST_SHARE * total))
    while end <= MOST_BEFORE_ALL * total:
        ends.append(end)
        end *= GROWTH
    return (*ends, total) if total else ()


def next_piece(
    seen: Sequence[Seen],
    totals: Mapping[Kind, int],
    still_open: Collection[str],
    cost: Cost,
    left: float,
    *,
    closed: Collection[str] = (),
) -> Piece | None:
    """The next piece of work; None when nothing open is left, or nothing that fits into ``left`` seconds.

    Args:
        seen: the levels.
        totals: units there are of each kind.
        still_open: levels whose place may change.
        cost: predicts a piece.
        left: seconds, infinite where there is no bound.
        closed: levels that cannot be chosen any more, of which what was not looked at yet is not.
    """
    for kind in Kind:
        first = looks(kind, totals[kind])[:1]
        fresh = [one.level for one in seen if first and one.of(kind) == 0 and one.level not in closed]
        # Without its losses nothing is known of a level: for these all the time may go.
        shares = (LOOK_SHARE, 1.0) if kind is Kind.DOCUMENTS else (LOOK_SHARE,)
        # As far as the others were looked at: what the reference does there is known.
        aim = min((one.of(kind) for one in seen if one.of(kind)), default=math.inf)
        looks_at = (_first_look(kind, fresh, int(min(aim, first[0])), cost, share * left) for share in shares if fresh)
        if piece := next((look for look in looks_at if look), None):
            return piece
    by_share = sorted(Kind, key=lambda kind: _share(kind, seen, totals, still_open))
    for kind in by_share:
        behind = [one for one in seen if one.level in still_open and 0 < one.of(kind) < totals[kind]]
        if not behind:
            continue
        start = min(one.of(kind) for one in behind)
        stop = next(end for end in looks(kind, totals[kind]) if end > start)
        names = [one.level for one in behind if one.of(kind) == start]
        if piece := _affordable(kind, names, start, stop, cost, left):
            return piece
    return None


def open_levels(decision: Decision, sizes: Mapping[str, int]) -> set[str]:
    """Levels whose place may still change: the tiers themselves, which are what is deployed; those of other pairs that
    resamples choose; and those of which it cannot be told whether they hold the bar, unless they are larger than a
    quality tier without a loss that can be told. ``sizes``: bytes by level."""
    found = _named(decision)
    lossless = {one.level for one in decision.verdicts if one.loss is Loss.NOT_SEEN}
    limit = sizes.get(decision.quality or "", math.inf) if decision.quality in lossless else math.inf
    unknown = (one.level for one in decision.verdicts if one.status is Status.UNKNOWN)
    return found | {level for level in unknown if sizes.get(level, 0) < limit}


def worth_asking(decision: Decision, sizes: Mapping[str, int]) -> set[str]:
    """Levels whose answers may change the decision: those that this or another run would name, which answers may veto;
    and the open ones where answers may show that they hold the bar. ``sizes``: bytes by level."""
    by_answers = any(clause.metric in _SHOWN_BY_ANSWERS for clause in parse_bar(decision.bar).clauses)
    return open_levels(decision, sizes) if by_answers else _named(decision)


def _named(decision: Decision) -> set[str]:
    """The tiers, and those of other pairs that resamples choose where the pair is not settled."""
    first, *others = decision.certainty or (None,)
    found = {decision.quality, decision.speed}
    if first is not None and first.share < SHARE_TRUSTED:
        found |= {name for pair in others if pair for name in (pair.quality, pair.speed)}
    return {level for level in found if level is not None}


def holding(decision: Decision) -> set[str]:
    """Levels that are known to hold the bar: those that tiers are chosen of."""
    return {one.level for one in decision.verdicts if one.status.holds and one.status is not Status.REFERENCE}


def contending(decision: Decision) -> set[str]:
    """Levels that may still be chosen, for all that is known of them, so that their speeds matter: those that hold the
    bar, and those of which that cannot be told."""
    out = (Status.REFERENCE, Status.FAILS, Status.DOES_NOT_FIT)
    return {one.level for one in decision.verdicts if one.status not in out}


_FAR = 10.0
"""Times the limit: documents differ in KL by far less."""


def far_off(bar: str, losses: Mapping[str, float]) -> set[str]:
    """Levels whose mean KL is so far above the bar's limit that more documents will not bring it under, wherever the
    interval of a few of them ends: no time goes into their speeds and answers. ``losses``: nats by level."""
    limits = [clause.value for clause in parse_bar(bar).clauses if clause.metric == "kl"]
    return {level for level, loss in losses.items() if limits and loss > _FAR * min(limits)}


def _share(kind: Kind, seen: Sequence[Seen], totals: Mapping[Kind, int], still_open: Collection[str]) -> float:
    """Of the units of a kind, seen of the open level of which least was."""
    return min((one.of(kind) / totals[kind] for one in seen if one.level in still_open and totals[kind]), default=1.0)


def _affordable(kind: Kind, levels: Sequence[str], start: int, stop: int, cost: Cost, left: float) -> Piece | None:
    """The piece, or the longest beginning of it that fits into the time."""
    least = start + 1 if start else LEAST[kind]
    for end in range(stop, min(least, stop) - 1, -1):
        piece = Piece(kind, tuple(levels), start, end)
        if cost(piece) <= left:
            return piece
    return None


def _first_look(kind: Kind, levels: Sequence[str], stop: int, cost: Cost, seconds: float) -> Piece | None:
    """At all levels, a short one where there is no time for a longer, else at some of them."""
    if piece := _affordable(kind, levels, 0, stop, cost, seconds):
        return piece
    least = min(LEAST[kind], stop)
    some = spread(levels, lambda chosen: cost(Piece(kind, tuple(chosen), 0, least)), seconds)
    return Piece(kind, some, 0, least) if some else None


def spread(levels: Sequence[str], cost: Callable[[Sequence[str]], float], seconds: float) -> tuple[str, ...]:
    """As many levels as a look at all of them has time for, evenly spread over the ladder, the smallest always among
    them; none where there is no time for that one alone.

    Args:
        levels: from the largest to the smallest.
        cost: predicted seconds of all that a look at some levels takes.
        seconds: there are.
    """
    for count in range(len(levels), 0, -1):
        places = {round(len(levels) - 1 - step * (len(levels) - 1) / max(1, count - 1)) for step in range(count)}
        chosen = tuple(level for place, level in enumerate(levels) if place in places)
        if cost(chosen) <= seconds:
            return chosen
    return ()
