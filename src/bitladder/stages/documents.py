"""A ladder's fidelity measured document by document: what a run left of each is taken, the rest measured.

Scores of documents are kept in the cache, so the next run of the same model, under any bound or none, begins where this
one ended; figures of the whole text are evidence.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bitladder.errors import UnknownArchitecture
from bitladder.files.kept_array import KeptArray
from bitladder.plan.schedule import Kind
from bitladder.progress import LevelNews
from bitladder.records.fidelity import Fidelity, Way
from bitladder.stages.engine_way import announce, way_for
from bitladder.stages.measure import Ways
from bitladder.stages.speeds import LEAST_ROUNDS
from bitladder.stats.sequential import spent

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitladder.describe.windows import Window
    from bitladder.describe.workload import Input
    from bitladder.records.decision import Decision
    from bitladder.store.recorded import Subject
    from bitladder.walk.head import TokenScores

    Scored = tuple[TokenScores, TokenScores]
    Decide = Callable[[Sequence[Fidelity]], Decision]


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


class Documents:
    """Fidelity of some levels, which grows document by document."""

    def __init__(self, ways: Ways, subjects: Sequence[Subject], wanted: Material) -> None:
        """
        Args:
            ways: measures, against the reference that it names.
            subjects: the levels, each file once.
            wanted: the documents, in the order in which they are taken.

        Raises:
            UnknownArchitecture: neither the walk nor the engine can go.
        """
        self._ways, self._material = ways, wanted
        self._subjects = {one.level: one for one in subjects}
        self._scores: dict[str, list[Scored]] = {name: [] for name in self._subjects}
        self._ends: dict[str, list[int]] = {name: [] for name in self._subjects}
        self._way = way_for(ways.job.source) if subjects else Way.WALK
        self._announced = False
        self.whole = self._stored()
        """Of levels that runs have measured on the whole text."""

    @property
    def total(self) -> int:
        """How many documents there are to measure on; 0 without levels."""
        return len(self._material.units) if self._subjects else 0

    @property
    def unfinished(self) -> list[str]:
        """Levels of whose fidelity not everything is evidence."""
        return [name for name in self._subjects if name not in self.whole]

    @property
    def anything(self) -> bool:
        """Whether anything is known of a level."""
        return bool(self.whole) or any(self._scores.values())

    def ready(self) -> dict[str, int]:
        """How many documents' scores earlier runs left of each level."""
        found = {}
        for name in self.unfinished:
            there = (self._array(name, unit).is_there() for unit in self._material.units)
            found[name] = sum(1 for _ in itertools.takewhile(bool, there))
        return found

    def fidelities(self, last: Collection[str] = ()) -> list[Fidelity]:
        """What is known now. ``last``: levels that are not known well enough, and that no look follows of."""
        return [
            self.whole[name] if name in self.whole else self._fidelity(name, last=name in last)
            for name, scores in self._scores.items()
            if scores or name in self.whole
        ]

    def _stored(self) -> dict[str, Fidelity]:
        """What runs have measured on the whole text, its units in the order of the looks."""
        if not self._subjects:
            return {}
        ways, places = self._ways, self._material.places
        digest, found = ways.job.text_key(ways.texts), {}
        for name, subject in self._subjects.items():
            stored = ways.recorded.fidelity(subject, digest, ways.reference, way=self._way)
            if stored is not None and len(stored.unit_kl) == len(stored.unit_tokens) == len(places):
                found[name] = self._in_order(stored)
        ways.job.journal.reuse("fidelity", list(found))
        return found

    def _in_order(self, measured: Fidelity) -> Fidelity:
        """Figures of the whole text with its units in the order of the looks, not the text's."""
        places = self._material.places
        return replace(
            measured,
            unit_kl=tuple(measured.unit_kl[place] for place in places),
            unit_tokens=tuple(measured.unit_tokens[place] for place in places),
        )

    def _fidelity(self, name: str, *, last: bool) -> Fidelity:
        from bitladder.stages.fidelity import fidelity
        from bitladder.walk.head import TokenScores

        own, beside = zip(*self._scores[name], strict=True)
        windows = [window for unit in self._material.units[: len(own)] for window in unit]
        share = coverage(self._ends[name], len(self._material.units), last=last)
        joined = TokenScores.joined(own), TokenScores.joined(beside)
        return replace(fidelity(name, *joined, windows, coverage=share), way=self._way)

    def measure(self, levels: Sequence[str], start: int, stop: int) -> bool:
        """Measure levels on documents ``start`` to ``stop``: scores that are kept are taken, the others measured
        together. Whether any had to be measured. Raises whatever a user can meet."""
        units = self._material.units[start:stop]
        found = {name: self._kept(name, units) for name in levels}
        missing = [name for name, scores in found.items() if scores is None]
        for name in missing:
            self._ways.job.progress.on_level(LevelNews(name, "measuring"))
        if missing:
            subjects = [self._subjects[name] for name in missing]
            windows = [window for unit in units for window in unit]

            def measured(way: Way, refusal: UnknownArchitecture | None) -> list[Scored]:
                if way is Way.ENGINE and not self._announced:
                    announce(self._ways.job, "Fidelity is measured", refusal)
                    self._announced = True
                self._way = way
                return list(self._ways.scored(subjects, windows, way))

            ends = np.cumsum([sum(window.scored for window in unit) for unit in units])
            for name, (own, beside) in zip(missing, self._ways.tried(measured), strict=True):
                found[name] = list(zip(own.split(ends), beside.split(ends), strict=True))
                self._keep(name, units, found[name] or [])
        for name, scores in found.items():
            self._scores[name] += scores or []
            self._ends[name].append(stop)
        if stop == len(self._material.units):
            self._store_finished(levels)
        return bool(missing)

    def _store_finished(self, levels: Sequence[str]) -> None:
        """Figures of the whole text are evidence, in the order of the text and with the intervals of these looks: a
        later run takes them as they are."""
        from bitladder.stages.fidelity import fidelity
        from bitladder.walk.head import TokenScores

        windows = self._ways.job.windows(self._ways.texts)
        place = {id(window): at for at, window in enumerate(windows)}
        for name in levels:
            parts: list[Scored | None] = [None] * len(windows)
            for unit, (own, beside) in zip(self._material.units, self._scores[name], strict=True):
                ends = np.cumsum([window.scored for window in unit])
                for window, one, other in zip(unit, own.split(ends), beside.split(ends), strict=True):
                    parts[place[id(window)]] = one, other
            pairs = [part for part in parts if part is not None]
            joined = TokenScores.joined([pair[0] for pair in pairs]), TokenScores.joined([pair[1] for pair in pairs])
            digest = self._ways.job.text_key(self._ways.texts)
            share = coverage(self._ends[name], len(self._material.units), last=False)
            found = replace(fidelity(name, *joined, windows, coverage=share), way=self._way)
            self.whole[name] = self._in_order(found)
            self._ways.recorded.keep_fidelity(self._subjects[name], digest, found, self._ways.reference)

    def _array(self, name: str, unit: Sequence[Window]) -> KeptArray:
        """f64[6, tokens] of a level and a document: KL, log-likelihood and likeliest token, then the reference's."""
        from bitladder.describe.windows import tokens_hash
        from bitladder.files.folders import cache_folder
        from bitladder.store.evidence import canonical
        from bitladder.store.recorded import protocol

        subject = canonical(self._subjects[name].key)
        return KeptArray(cache_folder("scores"), self._ways.against, subject, tokens_hash(unit), protocol(self._way))

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
