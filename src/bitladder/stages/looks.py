"""A ladder measured look by look, within a time: what ``plan.schedule`` says comes next is done, kept and judged.

Nothing is lost at any stop: scores of documents are kept in the cache, answers and speeds in the evidence, so the next
run of the same model, under any bound or none, begins where this one ended. Time is the machine's monotonic clock: a
clock that is set, and hours in which the machine sleeps, change nothing.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitladder.errors import BitladderError
from bitladder.plan.schedule import LEAST, Kind, Piece, Seen, next_piece
from bitladder.progress import LevelNews, Progress
from bitladder.records.fidelity import Fidelity
from bitladder.stages.ask import UNKNOWN_SPEED, Asker, LevelToAsk, name_of
from bitladder.stages.documents import Documents, Material
from bitladder.stages.forecast import corrected_seconds, rate_of_reading, walking_need
from bitladder.stages.measure import Ways
from bitladder.stages.speeds import LEAST_ROUNDS, measure_in_turns, speeds_in_turns
from bitladder.stats.sequential import Standing, standing
from bitladder.units import human_duration

if TYPE_CHECKING:
    from pathlib import Path

    from bitladder.files.gguf import GgufFile
    from bitladder.records.evaluation import Answer, LevelAnswers, Speed
    from bitladder.records.plan import LevelPlan
    from bitladder.store.recorded import Subject

MARGIN = 1.25
"""What a piece is allowed to take over its prediction before it would end too late."""
RESERVED_S, RESERVED_SHARE, RESERVED_DECISIONS = 2.0, 0.03, 3.0
"""Of the time, for the last decision and the report: at least so many times what a decision took on the way."""


class TimeIsUp(Exception):
    """The time is over, in the middle of a piece of work."""


class TooLittleTime(BitladderError):
    """The time that a run is given is too short for one look at the smallest level."""

    exit_code = 2


class Countdown(Progress):
    """Progress of a run that must end in time: shows the time of the whole run, and ends whatever works on when it is
    over."""

    def __init__(self, inner: Progress, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """``seconds`` from ``begin`` on, None where they are not known yet (``allow``); before, and after ``end``, it
        passes on what it is told."""
        self._inner, self._clock = inner, clock
        self._began: float | None = None
        self._watched = False
        self.seconds, self._reserved = math.inf, RESERVED_S
        if seconds is not None:
            self.allow(seconds)

    def allow(self, seconds: float) -> None:
        """So many seconds from ``begin`` on."""
        self.seconds, self._reserved = seconds, max(RESERVED_S, RESERVED_SHARE * seconds)

    def begin(self) -> None:
        """The time runs from now on."""
        self._began = self._clock()

    def watch(self) -> None:
        """From now on whatever works is ended when the time is over."""
        self._watched = True

    def reserve(self, seconds: float) -> None:
        """Keep at least so much for what follows the last piece of work."""
        self._reserved = max(self._reserved, seconds)

    def end(self) -> None:
        """What is still to do may be finished."""
        self._began, self._watched = None, False

    @property
    def passed(self) -> float:
        """Seconds since it began; 0 before."""
        return 0.0 if self._began is None else self._clock() - self._began

    @property
    def usable(self) -> float:
        """Seconds of the time that may be worked."""
        return self.seconds - self._reserved

    @staticmethod
    def whole(seconds: float) -> float:
        """The shortest time of which so many seconds may be worked."""
        return max(seconds + RESERVED_S, seconds / (1 - RESERVED_SHARE))

    @property
    def left(self) -> float:
        """Seconds that may still be worked."""
        return self.usable - self.passed

    def __call__(self, what: str, done: float, total: float) -> None:
        """As ``Progress``, of the whole run where the time runs; raises ``TimeIsUp``."""
        if self._began is None or math.isinf(self.seconds):
            self._inner(what, done, total)
            return
        self._inner(what, min(self.passed, self.seconds), self.seconds)
        self._check()

    def on_level(self, news: LevelNews) -> None:
        """As ``Progress``; raises ``TimeIsUp``."""
        self._inner.on_level(news)
        self._check()

    def _check(self) -> None:
        if self._watched and self.left < 0:
            raise TimeIsUp


@dataclass(frozen=True)
class Evidence:
    """What a decision is made from."""

    fidelities: list[Fidelity]
    answers: list[LevelAnswers]
    """The reference's first."""


class Costs:
    """Predicts pieces of work: formulas, corrected by what pieces of a kind took so far."""

    def __init__(self, wanted: Material, source: GgufFile, plan: Sequence[LevelPlan], reference: str) -> None:
        """``plan``: sizes and predicted speeds of the levels; ``reference`` is measured beside them."""
        self._material, self._source, self._reference = wanted, source, reference
        self._plan = {one.level: one for one in plan}
        self._factors: dict[Kind, float] = {}
        self._walked: set[tuple[int, int]] = set()
        """Documents that the reference has been measured on: a walk over the same ones takes the levels alone."""

    def __call__(self, piece: Piece) -> float:
        """Seconds, with a margin."""
        return MARGIN * self._factors.get(piece.kind, 1.0) * self._formula(piece)

    def learn(self, piece: Piece, seconds: float) -> None:
        """A piece took so long. Later pieces count as much as all before."""
        found = seconds / max(self._formula(piece), 1e-9)
        if piece.kind is Kind.DOCUMENTS:
            self._walked.add((piece.start, piece.stop))
        before = self._factors.get(piece.kind)
        self._factors[piece.kind] = found if before is None else math.sqrt(found * before)

    def shortest_look(self, levels: Sequence[str], kinds: Iterable[Kind] = Kind) -> float:
        """Seconds that the least look at some levels takes, at every kind of evidence or at these."""
        totals = self._material.totals if levels else dict.fromkeys(Kind, 0)
        pieces = [Piece(kind, tuple(levels), 0, min(LEAST[kind], totals[kind])) for kind in kinds if totals[kind]]
        return sum(map(self, pieces))

    def losses(self, levels: Sequence[str]) -> float:
        """Seconds that the least look at the losses of some levels takes."""
        return self.shortest_look(levels, (Kind.DOCUMENTS,))

    def _formula(self, piece: Piece) -> float:
        if piece.kind is Kind.DOCUMENTS:
            windows = [window for unit in self._material.units[piece.start : piece.stop] for window in unit]
            beside = (piece.start, piece.stop) not in self._walked
            return corrected_seconds(walking_need(self._source, windows, piece.levels, beside=beside))
        tokens = _ROUND_TOKENS * (piece.stop - piece.start)
        if piece.kind is Kind.INPUTS:
            asked = self._material.inputs[piece.start : piece.stop]
            tokens = round(_SHARE_OF_MOST * sum(one.most_tokens * (1 + len(one.turns)) for one in asked))
        return sum(self._engine_seconds(name, tokens) for name in (self._reference, *piece.levels))

    def _engine_seconds(self, name: str, tokens: int) -> float:
        """An engine started and asked so many tokens, one request at a time."""
        level = self._plan.get(name)
        file_bytes = level.file_bytes if level else sum(tensor.nbytes for tensor in self._source.model.tensors)
        token_s = 1 / level.speed.decode.value if level and level.speed else _TOKEN_S + file_bytes / rate_of_reading()
        return _START_S + file_bytes / _READ_BYTES_S + tokens * token_s


_START_S, _READ_BYTES_S, _TOKEN_S = 1.5, 1e9, 0.004
"""Starting an engine beside reading its file; a token beside reading the weights, where no speed is predicted."""
_SHARE_OF_MOST = 0.3
"""Of the tokens that answers may have: most end before, and several are computed together."""
_ROUND_TOKENS = 100
"""Decoded tokens that a round of speed is worth, with its prompt."""


class Looks:
    """Evidence of a ladder, which grows piece by piece."""

    def __init__(
        self,
        asker: Asker,
        ways: Ways,
        subjects: Sequence[Subject],
        contenders: Sequence[LevelToAsk | Path],
        plan: Sequence[LevelPlan],
        wanted: Material,
    ) -> None:
        """
        Args:
            asker: asks and judges.
            ways: measures fidelity, against the reference that it names.
            subjects: whose fidelity is measured.
            contenders: who answers, the reference first.
            plan: sizes and predicted speeds.
            wanted: what there is to look at.
        """
        self._asker, self._ways, self._material = asker, ways, wanted
        self._contenders = {name_of(one): one for one in contenders}
        self.reference = name_of(contenders[0])
        recorded = ways.recorded
        files = [one.subject for one in contenders[1:] if isinstance(one, LevelToAsk)]
        same = recorded.one_of_each(files)
        self._twins = {one.level: first.level for one, first in same.items() if one != first}
        self._documents = Documents(ways, [one for one in subjects if one.level not in self._twins], wanted)
        self._answers: dict[str, dict[tuple[str, int], Answer]] = {name: {} for name in self._contenders}
        self._speeds: dict[str, Speed] = {}
        unfinished = self._documents.unfinished
        self._seen = {
            one.level: Seen(one.level, documents=0 if one.level in unfinished else wanted.totals[Kind.DOCUMENTS])
            for one in files
            if one.level not in self._twins
        }
        self.costs = Costs(wanted, ways.job.source, plan, self.reference)
        self._ready = {Kind.DOCUMENTS: self._documents.ready(), Kind.INPUTS: self._ready_inputs(), Kind.ROUNDS: {}}

    @property
    def seen(self) -> list[Seen]:
        """How far each level is; levels that are others byte for byte are not among them."""
        return list(self._seen.values())

    @property
    def totals(self) -> dict[Kind, int]:
        """How much there is of each kind."""
        return self._material.totals | {Kind.DOCUMENTS: self._documents.total}

    @property
    def has_something(self) -> bool:
        """Whether anything was measured of a level."""
        return self._documents.anything or any(one.inputs for one in self.seen)

    def next_piece(self, still_open: set[str], left: float, closed: set[str]) -> Piece | None:
        """What comes next (``plan.schedule``)."""
        wanted, unwanted = ({self._twins.get(level, level) for level in some} for some in (still_open, closed))
        return next_piece(self.seen, self.totals, wanted, self._cost, left, closed=unwanted)

    def do(self, piece: Piece) -> None:
        """Do a piece of work.

        Raises:
            TimeIsUp: in the middle of it; what was finished counts, the rest is kept for the next run.
            BitladderError: whatever a user can meet.
        """
        began = time.monotonic()
        worked = {Kind.DOCUMENTS: self._measure, Kind.INPUTS: self._ask, Kind.ROUNDS: self._time}[piece.kind](piece)
        if worked:
            self.costs.learn(piece, time.monotonic() - began)

    def evidence(self, still_open: set[str] | None = None) -> Evidence:
        """What is known now. ``still_open``: the levels that are not known well enough at the end, when no look
        follows; None while others may."""
        last = {self._twins.get(level, level) for level in still_open or ()}
        fidelities = self._documents.fidelities(last)
        answered: list[LevelAnswers] = []
        for name in self._contenders:
            first = self._twins.get(name, name)
            speed, replies = self._speeds.get(first, UNKNOWN_SPEED), self._answers[first]
            answered.append(self._asker.judged(name, replies.values(), speed, answered[0] if answered else None))
        known = {one.level: one for one in fidelities}
        copies = [replace(known[first], level=twin) for twin, first in self._twins.items() if first in known]
        return Evidence([*fidelities, *copies], answered)

    def news(self, evidence: Evidence) -> None:
        """Tell what is known of each level."""
        tell = self._asker.work.progress.on_level
        for one in evidence.fidelities:
            tell(LevelNews(one.level, f"{one.units} {one.unit}s", kl_mean=one.kl_mean))
        for level in evidence.answers:
            passes, rate = sum(answer.passed for answer in level.answers), level.speed.decode_tokens_per_s
            if level.answers:
                tell(LevelNews(level.level, passes=passes, inputs=len(level.answers), tokens_per_s=rate))

    def remaining(self, still_open: set[str]) -> str:
        """What more time would be spent on, with how much of it; empty where nothing is left to look at."""
        names = sorted(
            {self._twins.get(level, level) for level in still_open} & set(self._seen),
            key=list(self._seen).index,
        )
        parts, seconds = [], 0.0
        for kind in (Kind.DOCUMENTS, Kind.INPUTS):
            behind = [name for name in names if self._seen[name].of(kind) < self.totals[kind]]
            if behind:
                start = min(self._seen[name].of(kind) for name in behind)
                piece = Piece(kind, tuple(behind), start, self.totals[kind])
                seconds += self.costs(piece) / MARGIN
                parts.append(f"{piece.stop - start} more {kind.value}")
        if not parts:
            return ""
        return f"{', '.join(names)}: {' and '.join(parts)} that there are, about {human_duration(seconds)} more time"

    def _cost(self, piece: Piece) -> float:
        """Seconds of a piece, of which only what earlier runs did not leave is to be done."""
        ready = self._ready[piece.kind]
        missing = tuple(name for name in piece.levels if ready.get(name, 0) < piece.stop)
        if not missing and ready.get(self.reference, piece.stop) >= piece.stop:
            return 0.0
        return self.costs(replace(piece, levels=missing))

    def _ready_inputs(self) -> dict[str, int]:
        """How many inputs earlier runs asked each contender."""
        wanted, found = self._material.inputs, {}
        for name in (self.reference, *self._seen):
            stored = self._asker.stored(self._contenders[name])
            there = (stored is None or one.id in stored for one in wanted)
            found[name] = sum(1 for _ in itertools.takewhile(bool, there))
        return found

    def _measure(self, piece: Piece) -> bool:
        """Fidelity of the levels on the documents of a piece."""
        worked = self._documents.measure(piece.levels, piece.start, piece.stop)
        for name in piece.levels:
            self._seen[name] = replace(self._seen[name], documents=piece.stop)
        return worked

    def _ask(self, piece: Piece) -> bool:
        """Answers of the reference and the levels to the inputs of a piece."""
        inputs, worked = self._material.inputs[piece.start : piece.stop], False
        for name in (self.reference, *piece.levels):
            contender = self._contenders[name]
            work = self._asker.work
            work.progress(f"workload: {name}", piece.start, len(self._material.inputs))
            replies = self._asker.replies(contender, inputs=inputs)
            worked = worked or not replies.stored
            self._answers[name] |= {(answer.input_id, answer.sample): answer for answer in replies.answers}
            if name in self._seen:
                self._seen[name] = replace(self._seen[name], inputs=piece.stop)
        return worked

    def _time(self, piece: Piece) -> bool:
        """Rounds of speed: one for a first look, then as many as tell the open levels apart."""
        work = self._asker.work
        own = self._contenders[self.reference]
        named = [self.reference] if isinstance(own, LevelToAsk) and piece.start == 0 else []
        asked = [self._contenders[name] for name in (*named, *piece.levels)]
        levels = [one for one in asked if isinstance(one, LevelToAsk)]
        worked = True
        if piece.stop < LEAST_ROUNDS:
            speeds = measure_in_turns([level.path for level in levels], work, most=piece.stop)
        else:
            speeds, stored = speeds_in_turns(levels, self._asker.recorded, work)
            worked = not stored
        self._speeds |= {level.subject.level: speed for level, speed in zip(levels, speeds, strict=True)}
        for name in piece.levels:
            self._seen[name] = replace(self._seen[name], rounds=piece.stop)
        return worked


def undecided_on_passes(bar: str, answers: Sequence[LevelAnswers], wanted: Material) -> set[str]:
    """Levels of which a bar on passes needs more inputs: all of them, unless its loss is bounded and evidence that may
    be looked at any time (``stats.sequential``) has shown on which side of it a level lies. ``answers``: the
    reference's first.
    """
    from bitladder.plan.bar import parse_bar
    from bitladder.stages.evaluate import pass_shares

    clauses = [one for one in parse_bar(bar).clauses if one.metric in ("passes", "no loss")]
    before, found = pass_shares(answers[0].answers), set()
    for level in answers[1:]:
        after = pass_shares(level.answers)
        losses = [after[one.id] - before[one.id] for one in wanted.inputs if one.id in after and one.id in before]
        for clause in clauses:
            bounded = clause.relative and not clause.tag and 0 < clause.value < 1
            if not bounded or standing(losses, clause.value) is Standing.OPEN:
                found.add(level.level)
    return found
