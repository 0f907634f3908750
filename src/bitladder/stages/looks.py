"""A ladder measured look by look, within a time: what ``plan.schedule`` says comes next is done, kept and judged.

Nothing is lost at any stop: scores of documents are kept in the cache, answers and speeds in the evidence, so the next
run of the same model, under any bound or none, begins where this one ended. Time is the machine's monotonic clock: a
clock that is set, and hours in which the machine sleeps, change nothing.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bitladder.errors import BitladderError, UnknownArchitecture
from bitladder.files.kept_array import KeptArray
from bitladder.plan.schedule import LEAST, Kind, Piece, Seen, next_piece
from bitladder.progress import LevelNews, Progress
from bitladder.records.fidelity import Fidelity, Way
from bitladder.stages.ask import UNKNOWN_SPEED, Asker, LevelToAsk, name_of
from bitladder.stages.engine_way import way_for
from bitladder.stages.forecast import corrected_seconds, walking_need
from bitladder.stages.measure import Ways
from bitladder.stages.speeds import LEAST_ROUNDS, measure_in_turns, speeds_in_turns
from bitladder.stats.sequential import Standing, spent, standing
from bitladder.units import human_duration

if TYPE_CHECKING:
    from pathlib import Path

    from bitladder.describe.windows import Window
    from bitladder.describe.workload import Input
    from bitladder.files.gguf import GgufFile
    from bitladder.records.evaluation import Answer, LevelAnswers, Speed
    from bitladder.records.plan import LevelPlan
    from bitladder.store.recorded import Subject
    from bitladder.walk.head import TokenScores

    Scored = tuple[TokenScores, TokenScores]

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


@dataclass(frozen=True)
class Material:
    """What there is to look at, in the order in which it is taken."""

    units: tuple[tuple[Window, ...], ...]
    """Documents, each of its windows; of a single document its windows one by one."""
    places: tuple[int, ...]
    """Where each unit stands in the text."""
    inputs: tuple[Input, ...]

    @property
    def totals(self) -> dict[Kind, int]:
        """How much of each kind."""
        return {Kind.DOCUMENTS: len(self.units), Kind.INPUTS: len(self.inputs), Kind.ROUNDS: LEAST_ROUNDS}


def material(windows: Sequence[Window], inputs: Sequence[Input]) -> Material:
    """Documents and inputs in an order that hashes of them fix: as good as random, and the same in every run."""
    from bitladder.describe.windows import tokens_hash
    from bitladder.describe.workload import question_hash

    documents: dict[str, list[Window]] = {}
    for window in windows:
        documents.setdefault(window.document, []).append(window)
    whole = list(documents.values()) if len(documents) > 1 else [[window] for window in windows]
    places = sorted(range(len(whole)), key=lambda place: tokens_hash(whole[place]))
    ordered = sorted(inputs, key=lambda one: question_hash(one, 0.0, 0))
    return Material(tuple(tuple(whole[place]) for place in places), tuple(places), tuple(ordered))


def coverage(ends: Sequence[int], total: int, *, last: bool) -> float:
    """Of the intervals of a level that was looked at when it had these numbers of ``total`` documents.

    ``last``: it was not its own evidence that ended the looking, so all that is left of the error rate may be spent.
    """
    before = spent(ends[-2] / total) if len(ends) > 1 else 0.0
    return 1 - ((0.05 if last else spent(ends[-1] / total)) - before)


class Costs:
    """Predicts pieces of work: formulas, corrected by what pieces of a kind took so far."""

    def __init__(self, wanted: Material, source: GgufFile, plan: Sequence[LevelPlan], reference: str) -> None:
        """``plan``: sizes and predicted speeds of the levels; ``reference`` is measured beside them."""
        self._material, self._source, self._reference = wanted, source, reference
        self._plan = {one.level: one for one in plan}
        self._factors: dict[Kind, float] = {}

    def __call__(self, piece: Piece) -> float:
        """Seconds, with a margin."""
        return MARGIN * self._factors.get(piece.kind, 1.0) * self._formula(piece)

    def learn(self, piece: Piece, seconds: float) -> None:
        """A piece took so long. Later pieces count as much as all before."""
        found = seconds / max(self._formula(piece), 1e-9)
        before = self._factors.get(piece.kind)
        self._factors[piece.kind] = found if before is None else math.sqrt(found * before)

    def shortest_look(self, levels: Sequence[str]) -> float:
        """Seconds that the least look at some levels takes, at every kind of evidence."""
        totals = self._material.totals if levels else dict.fromkeys(Kind, 0)
        pieces = [Piece(kind, tuple(levels), 0, min(LEAST[kind], totals[kind])) for kind in Kind if totals[kind]]
        return sum(map(self, pieces))

    def _formula(self, piece: Piece) -> float:
        if piece.kind is Kind.DOCUMENTS:
            windows = [window for unit in self._material.units[piece.start : piece.stop] for window in unit]
            return corrected_seconds(walking_need(self._source, windows, piece.levels))
        tokens = _ROUND_TOKENS * (piece.stop - piece.start)
        if piece.kind is Kind.INPUTS:
            asked = self._material.inputs[piece.start : piece.stop]
            tokens = round(_SHARE_OF_MOST * sum(one.most_tokens * (1 + len(one.turns)) for one in asked))
        return sum(_engine_seconds(self._plan.get(name), tokens) for name in (self._reference, *piece.levels))


_START_S, _READ_BYTES_S, _ASSUMED_TOKENS_S = 1.5, 1e9, 10.0
"""Starting an engine beside reading its file, and decoding where nothing is predicted."""
_SHARE_OF_MOST = 0.3
"""Of the tokens that answers may have: most end before, and several are computed together."""
_ROUND_TOKENS = 100
"""Decoded tokens that a round of speed is worth, with its prompt."""


def _engine_seconds(level: LevelPlan | None, tokens: int) -> float:
    """An engine started and asked so many tokens, one request at a time."""
    if level is None:
        return _START_S + tokens / _ASSUMED_TOKENS_S
    rate = level.speed.decode.value if level.speed else _ASSUMED_TOKENS_S
    return _START_S + level.file_bytes / _READ_BYTES_S + tokens / rate


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
        self._subjects = {one.level: one for one in subjects if one.level not in self._twins}
        self._scores: dict[str, list[Scored]] = {name: [] for name in self._subjects}
        self._ends: dict[str, list[int]] = {name: [] for name in self._subjects}
        self._answers: dict[str, dict[tuple[str, int], Answer]] = {name: {} for name in self._contenders}
        self._speeds: dict[str, Speed] = {}
        self._way = way_for(ways.job.source) if subjects else Way.WALK
        self._whole = self._stored()
        self._seen = {
            one.level: Seen(one.level, documents=0 if one.level in self._to_measure else wanted.totals[Kind.DOCUMENTS])
            for one in files
            if one.level not in self._twins
        }
        self.costs = Costs(wanted, ways.job.source, plan, self.reference)
        self._ready = {Kind.DOCUMENTS: self._ready_documents(), Kind.INPUTS: self._ready_inputs(), Kind.ROUNDS: {}}

    @property
    def seen(self) -> list[Seen]:
        """How far each level is; levels that are others byte for byte are not among them."""
        return list(self._seen.values())

    @property
    def totals(self) -> dict[Kind, int]:
        """How much there is of each kind."""
        return self._material.totals if self._subjects else self._material.totals | {Kind.DOCUMENTS: 0}

    @property
    def has_something(self) -> bool:
        """Whether anything was measured of a level."""
        return bool(self._whole) or any(self._scores.values()) or any(one.inputs for one in self.seen)

    def next_piece(self, still_open: set[str], left: float) -> Piece | None:
        """What comes next (``plan.schedule``)."""
        named = {self._twins.get(level, level) for level in still_open}
        return next_piece(self.seen, self.totals, named, self._cost, left)

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
        fidelities = [
            self._whole[name] if name in self._whole else self._fidelity(name, last=name in last)
            for name, scores in self._scores.items()
            if scores or name in self._whole
        ]
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

    @property
    def _to_measure(self) -> set[str]:
        """Levels of whose fidelity not everything is known."""
        return self._subjects.keys() - self._whole.keys()

    def _stored(self) -> dict[str, Fidelity]:
        """What runs have measured on the whole text, its units in the order of the looks."""
        if not self._subjects:
            return {}
        ways, places = self._ways, self._material.places
        digest, found = ways.job.text_key(ways.texts), {}
        for name, subject in self._subjects.items():
            stored = ways.recorded.fidelity(subject, digest, ways.reference, way=self._way)
            if stored is not None and len(stored.unit_kl) == len(stored.unit_tokens) == len(places):
                found[name] = replace(
                    stored,
                    unit_kl=tuple(stored.unit_kl[place] for place in places),
                    unit_tokens=tuple(stored.unit_tokens[place] for place in places),
                )
        ways.job.journal.reuse("fidelity", list(found))
        return found

    def _cost(self, piece: Piece) -> float:
        """Seconds of a piece, of which only what earlier runs did not leave is to be done."""
        ready = self._ready[piece.kind]
        missing = tuple(name for name in piece.levels if ready.get(name, 0) < piece.stop)
        if not missing and ready.get(self.reference, piece.stop) >= piece.stop:
            return 0.0
        return self.costs(replace(piece, levels=missing))

    def _ready_documents(self) -> dict[str, int]:
        """How many documents' scores earlier runs left of each level."""
        found = {}
        for name in self._to_measure:
            there = (self._array(name, unit).is_there() for unit in self._material.units)
            found[name] = sum(1 for _ in itertools.takewhile(bool, there))
        return found

    def _ready_inputs(self) -> dict[str, int]:
        """How many inputs earlier runs asked each contender."""
        wanted, found = self._material.inputs, {}
        for name in (self.reference, *self._seen):
            stored = self._asker.stored(self._contenders[name])
            there = (stored is None or one.id in stored for one in wanted)
            found[name] = sum(1 for _ in itertools.takewhile(bool, there))
        return found

    def _fidelity(self, name: str, *, last: bool) -> Fidelity:
        from bitladder.stages.fidelity import fidelity
        from bitladder.walk.head import TokenScores

        own, beside = zip(*self._scores[name], strict=True)
        windows = [window for unit in self._material.units[: len(own)] for window in unit]
        share = coverage(self._ends[name], len(self._material.units), last=last)
        joined = TokenScores.joined(own), TokenScores.joined(beside)
        return replace(fidelity(name, *joined, windows, coverage=share), way=self._way)

    def _measure(self, piece: Piece) -> bool:
        """Scores of the documents of a piece: those that are kept, the others measured together."""
        units = self._material.units[piece.start : piece.stop]
        found = {name: self._kept(name, units) for name in piece.levels}
        missing = [name for name, scores in found.items() if scores is None]
        for name in missing:
            self._asker.work.progress.on_level(LevelNews(name, "measuring"))
        if missing:
            subjects = [self._subjects[name] for name in missing]
            windows = [window for unit in units for window in unit]

            def measured(way: Way, _: UnknownArchitecture | None) -> list[Scored]:
                self._way = way
                return list(self._ways.scored(subjects, windows, way))

            ends = np.cumsum([sum(window.scored for window in unit) for unit in units])
            for name, (own, beside) in zip(missing, self._ways.tried(measured), strict=True):
                found[name] = list(zip(own.split(ends), beside.split(ends), strict=True))
                self._keep(name, units, found[name] or [])
        for name, scores in found.items():
            self._scores[name] += scores or []
            self._ends[name].append(piece.stop)
            self._seen[name] = replace(self._seen[name], documents=piece.stop)
        self._store_finished(piece)
        return bool(missing)

    def _store_finished(self, piece: Piece) -> None:
        """Figures of the whole text are those of a run without a bound, and kept as such."""
        if piece.stop < len(self._material.units):
            return
        from bitladder.stages.fidelity import fidelity
        from bitladder.walk.head import TokenScores

        windows = self._ways.job.windows(self._ways.texts)
        place = {id(window): at for at, window in enumerate(windows)}
        for name in piece.levels:
            parts: list[Scored | None] = [None] * len(windows)
            for unit, (own, beside) in zip(self._material.units, self._scores[name], strict=True):
                ends = np.cumsum([window.scored for window in unit])
                for window, one, other in zip(unit, own.split(ends), beside.split(ends), strict=True):
                    parts[place[id(window)]] = one, other
            pairs = [part for part in parts if part is not None]
            joined = TokenScores.joined([pair[0] for pair in pairs]), TokenScores.joined([pair[1] for pair in pairs])
            digest = self._ways.job.text_key(self._ways.texts)
            found = replace(fidelity(name, *joined, windows), way=self._way)
            self._ways.recorded.keep_fidelity(self._subjects[name], digest, found, self._ways.reference)

    def _array(self, name: str, unit: Sequence[Window]) -> KeptArray:
        """f64[6, tokens] of a level and a document: KL, log-likelihood and likeliest token, then the reference's."""
        from bitladder.describe.windows import tokens_hash
        from bitladder.files.folders import cache_folder
        from bitladder.store.evidence import canonical
        from bitladder.store.recorded import protocol

        reference = self._ways.reference
        against = self._ways.job.source.sha256 if reference is None else canonical(reference.key)
        subject = canonical(self._subjects[name].key)
        return KeptArray(cache_folder("scores"), against, subject, tokens_hash(unit), protocol(self._way))

    def _kept(self, name: str, units: Sequence[Sequence[Window]]) -> list[Scored] | None:
        """Scores of documents that an earlier run left, if it left all of them."""
        from bitladder.walk.head import TokenScores

        scores = []
        for unit in units:
            rows = self._array(name, unit).load()
            if rows is None or rows.shape != (6, sum(window.scored for window in unit)) or not np.isfinite(rows).all():
                return None
            own, beside = (TokenScores(part[0], part[1], part[2].astype(np.int64)) for part in (rows[:3], rows[3:]))
            scores.append((own, beside))
        return scores

    def _keep(self, name: str, units: Sequence[Sequence[Window]], scores: Sequence[Scored]) -> None:
        for unit, pair in zip(units, scores, strict=True):
            rows = [row for one in pair for row in (one.kl, one.nll, one.top1.astype(np.float64))]
            self._array(name, unit).save(np.stack(rows))

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
