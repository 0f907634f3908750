"""Which key each measurement is stored under, and the records as they come back.

A level that Bitladder makes is named by what determines its bytes: source, recipe, method and version. Any other
file is named by its own hash. Change one of these, the text, or the engine, and the measurement is made anew.

Rows of the kind ``file`` tie such a name to the hash of the one file that was measured under it, and say where that
file lies. A file that should be the same and is not (edited since, or made where sums come in another order) is another
subject, named by its hash. What was measured under one name of a file is found under every other: a level whose bytes
are another's is not measured again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from bitladder import __version__
from bitladder.describe.cache_types import CacheTypes, split_name
from bitladder.files.engine_package import ENGINE, engine_version
from bitladder.records.decision import Decision
from bitladder.records.endpoint import Fingerprint
from bitladder.records.evaluation import Answer, Speed
from bitladder.records.fidelity import Fidelity, Way
from bitladder.records.level_file import StoredFile
from bitladder.records.reading import from_json
from bitladder.records.speculation import SpeculationReport, SpeculationResult
from bitladder.store.evidence import Evidence

T = TypeVar("T")

WALK_PROTOCOL = "512-token windows, second half scored, float32, intervals allow for the worst once more"

_FILES = "files told apart by their hashes"
"""Before, of two files of one name each could have the other's figures: what was stored then is not taken."""


def protocol(way: Way) -> str:
    """All that figures depend on besides the files and the text: how they are measured, and by which engine."""
    if way is Way.WALK:
        return WALK_PROTOCOL
    if way is Way.DEPLOYED:
        return (
            f"the same tokens behind contexts of several lengths, 16-bit cache of the reference, llama.cpp of {ENGINE} "
            f"{engine_version()} on the CPU, {_FILES}, intervals allow for the worst once more"
        )
    return (
        f"512-token windows, second half scored, llama.cpp of {ENGINE} {engine_version()} on the CPU, {_FILES}, "
        "intervals allow for the worst once more"
    )


@dataclass(frozen=True)
class Subject:
    """What was measured. ``made`` is the method a level was made by; ``file`` the hash of a file made elsewhere."""

    source: str
    level: str
    made: str = ""
    file: str = ""
    cache: str = ""
    """Types of its KV cache where it is run with another than llama.cpp's own; ``level`` names them, too."""

    @property
    def key(self) -> dict[str, Any]:
        """The part of a key that names the weights, and the cache that they are run with."""
        cache = {"cache": self.cache} if self.cache else {}
        if self.file:
            return {"source": self.source, "file": self.file, **cache}
        level = split_name(self.level)[0] if self.cache else self.level
        return {"source": self.source, "level": level, "method": self.made, "bitladder": __version__, **cache}

    @property
    def bare(self) -> Subject:
        """The weights by themselves, whatever cache they are run with."""
        return replace(self, level=split_name(self.level)[0], cache="") if self.cache else self

    def with_cache(self, cache: CacheTypes) -> Subject:
        """The same weights run with this cache."""
        if cache.is_default:
            return self
        return replace(self, level=cache.named(self.level), cache=str(cache))


@dataclass(frozen=True)
class Remote:
    """A model behind an address, and the fingerprint it is known by (``engines.fingerprint``)."""

    base_url: str
    model: str
    fingerprint: str = ""

    @property
    def key(self) -> dict[str, Any]:
        """The part of a key that names the model."""
        return {"endpoint": self.base_url, "model": self.model, "fingerprint": self.fingerprint}

    def known_as(self, fingerprint: Fingerprint) -> Remote:
        """The same with this fingerprint; one that does not repeat itself has none that could be told again."""
        return replace(self, fingerprint=fingerprint.digest if fingerprint.repeats else "")


@dataclass(frozen=True)
class StoredDecision:
    """The decision of a run, with where and when it was made."""

    decision: Decision
    run: Path
    """The run's record, run.json; it may be gone, or another's by now."""
    created: str = ""
    """When the run ended, as its record says it; ISO 8601."""
    machine: str = ""
    """``files.measured.machine_key`` of the machine decided for; empty in rows of earlier versions."""


_MEASUREMENTS = ("fidelity", "speed", "answer")


class Recorded:
    """The evidence store in terms of records."""

    def __init__(self, store: Evidence) -> None:
        self._store = store
        self._first_with: dict[str, str] = {}

    @staticmethod
    def _fidelity_key(subject: Subject, text: str, reference: Subject | None, way: Way) -> dict[str, Any]:
        against = {} if reference is None else {"reference": reference.key}
        return {**subject.key, **against, "text": text, "protocol": protocol(way)}

    def fidelity(
        self, subject: Subject, text: str, reference: Subject | None = None, *, way: Way = Way.WALK
    ) -> Fidelity | None:
        """A stored fidelity, under the name the caller uses for the level; against the source by default."""
        for name in self._names(subject):
            found = self._read(Fidelity, "fidelity", self._fidelity_key(name, text, reference, way))
            if found is not None:
                return replace(found, level=subject.level)
        return None

    def keep_fidelity(self, subject: Subject, text: str, fidelity: Fidelity, reference: Subject | None = None) -> None:
        """Store a fidelity under the way it was measured; ``text`` is the text's hash."""
        self._store.put("fidelity", self._fidelity_key(subject, text, reference, fidelity.way), fidelity)

    def answer(self, subject: Subject | Remote, question: str, engine: Mapping[str, Any]) -> Answer | None:
        """A stored answer to a question (its hash) through an engine with these settings."""
        return self._read(Answer, "answer", {**subject.key, "question": question, "engine": dict(engine)})

    def answers(
        self, subject: Subject | Remote, questions: Sequence[str], engine: Mapping[str, Any]
    ) -> dict[str, Answer]:
        """The stored answers among those to the questions, by question."""
        found: dict[str, Answer] = {}
        for name in [subject] if isinstance(subject, Remote) else self._names(subject):
            missing = [question for question in questions if question not in found]
            stored = ((question, self.answer(name, question, engine)) for question in missing)
            found |= {question: answer for question, answer in stored if answer is not None}
        return found

    def keep_answer(self, subject: Subject | Remote, question: str, engine: Mapping[str, Any], answer: Answer) -> None:
        """Store an answer."""
        self._store.put("answer", {**subject.key, "question": question, "engine": dict(engine)}, answer)

    def forget_answer(self, subject: Subject | Remote, question: str, engine: Mapping[str, Any]) -> None:
        """Take an answer back: it turned out to be another model's."""
        self._store.put("answer", {**subject.key, "question": question, "engine": dict(engine)}, None)

    def fingerprint(self, remote: Remote) -> Fingerprint | None:
        """By which the model behind an address was last known."""
        return self._read(Fingerprint, "endpoint", {"endpoint": remote.base_url, "model": remote.model})

    def keep_fingerprint(self, remote: Remote, fingerprint: Fingerprint) -> None:
        """Store by what the model behind an address is known from now on."""
        self._store.put("endpoint", {"endpoint": remote.base_url, "model": remote.model}, fingerprint)

    def speed(self, subject: Subject | Remote, engine: Mapping[str, Any]) -> Speed | None:
        """A stored speed, measured on this machine (the engine's settings name its processor)."""
        names = [subject] if isinstance(subject, Remote) else self._names(subject)
        stored = (self._read(Speed, "speed", {**one.key, "engine": dict(engine)}) for one in names)
        return next((speed for speed in stored if speed is not None), None)

    def keep_speed(self, subject: Subject | Remote, engine: Mapping[str, Any], speed: Speed) -> None:
        """Store a speed."""
        self._store.put("speed", {**subject.key, "engine": dict(engine)}, speed)

    def keep_speculation(
        self, file: str, kind: str, workload: str, engine: Mapping[str, Any], report: SpeculationReport
    ) -> None:
        """Store what one way to guess gains for a file (its hash) on a workload's: a report with one result."""
        key = _guess_key(file, kind, report.results[0].draft_sha256, workload, engine)
        self._store.put("speculation", key, report)

    def speculation(
        self, file: str, kind: str, draft: str, workload: str, engine: Mapping[str, Any]
    ) -> SpeculationReport | None:
        """What is known of one way to guess for a file, by a draft's hash, on a workload's."""
        report = self._read(SpeculationReport, "speculation", _guess_key(file, kind, draft, workload, engine))
        return report if report is not None and len(report.results) == 1 else None

    def speculations(self, file: str, *, cpu: str, threads: int, kv: str = "") -> list[SpeculationResult]:
        """What is known of guesses for a file on such a processor with so many threads and such a KV cache (empty:
        llama.cpp's own), newest first."""
        rows = self._store.find("speculation", file=file)
        found = ((_record(SpeculationReport, row.value), row.key) for row in rows)
        return [
            result
            for report, key in found
            if report
            and isinstance(own := key.get("engine"), Mapping)
            and (own.get("cpu"), own.get("threads"), own.get("kv", "")) == (cpu, threads, kv)
            for result in report.results
        ]

    def keep_file(self, subject: Subject, file: StoredFile) -> None:
        """Store which file the measurements of a subject are of, and where it lies; each place is a row."""
        self._store.put("file", {**subject.key, "level": file.level, "sha256": file.sha256, "path": file.path}, file)

    def files(self, source: str, level: str | None = None) -> list[StoredFile]:
        """Measured files of a model, or of one of its levels, the newest first; they may have changed since."""
        wanted = {} if level is None else {"level": level}
        return self._files(source=source, **wanted)

    def files_at(self, path: Path) -> list[StoredFile]:
        """Files that were measured and lay at this place, the newest first."""
        return self._files(path=str(path))

    def every_file(self) -> list[StoredFile]:
        """Measured files of all models, the newest first; they may have changed since."""
        return self._files()

    def _files(self, **partial: str) -> list[StoredFile]:
        """Files whose row's key holds these values; rows that are no files of ours (imported ones may be) are none."""
        rows = ((_record(StoredFile, row.value), row.key) for row in self._store.find("file", **partial))
        return [file for file, key in rows if file and (file.sha256, file.path) == (key.get("sha256"), key.get("path"))]

    def hash_of(self, subject: Subject) -> str | None:
        """Hash of the file that the measurements of a subject are of; None when that was never stored."""
        keys = self._store.keys("file", **subject.key)
        return str(keys[0]["sha256"]) if keys else None

    def have_same_weights(self, sha256: str, first: str) -> None:
        """A file's weights are another's, byte for byte, whatever their headers call them: what holds of one holds of
        both, as long as this is open."""
        self._first_with[sha256] = self._first_with.get(first, first)

    def one_of_each(self, subjects: Iterable[Subject]) -> dict[Subject, Subject]:
        """Subject -> the first of those that are the same file or have its weights, run with the same cache; itself
        where nothing is known of its file."""
        first: dict[tuple[str, str], Subject] = {}
        files = {one: one.file or self.hash_of(one.bare) for one in subjects}
        files = {one: self._first_with.get(sha256, sha256) if sha256 else sha256 for one, sha256 in files.items()}
        return {one: first.setdefault((sha256, one.cache), one) if sha256 else one for one, sha256 in files.items()}

    def _names(self, subject: Subject) -> Iterator[Subject]:
        """A subject, then the other names that its file was measured under by this version."""
        yield subject
        sha256 = subject.file or self.hash_of(subject.bare)
        if not sha256:
            return
        others = [Subject(subject.source, subject.level, file=sha256, cache=subject.cache)]
        for key in self._store.keys("file", source=subject.source, sha256=sha256):
            if key.get("bitladder") == __version__:
                level, made = str(key.get("level")), str(key.get("method"))
                others.append(Subject(subject.source, level, made=made, cache=subject.cache))
        yield from (one for one in dict.fromkeys(others) if one.key != subject.key)

    def points_to(self, sha256: str) -> bool:
        """Whether anything stored is about the file with this hash, be it only where it lies."""
        return bool(self._store.keys("file", sha256=sha256)) or self._measured_as({"file": sha256})

    def is_measured(self, sha256: str) -> bool:
        """Whether something was measured on the file with this hash."""
        places = self._store.keys("file", sha256=sha256)
        names = [{name: one for name, one in key.items() if name not in ("sha256", "path")} for key in places]
        return any(map(self._measured_as, [{"file": sha256}, *(name for name in names if "file" not in name)]))

    def _measured_as(self, key: Mapping[str, Any]) -> bool:
        return any(self._store.keys(kind, **key) for kind in _MEASUREMENTS)

    def keep_decision(self, source: str, stored: StoredDecision) -> None:
        """Store the latest decision for a model and a bar, and where the run's record lies."""
        value = replace(stored, run=stored.run.resolve())
        self._store.put("decision", {"source": source, "bar": stored.decision.bar}, value)

    def decisions(self, source: str) -> list[StoredDecision]:
        """The decisions of runs of a model, the newest first, under any bar."""
        return [stored for _, stored in self._decisions(source=source)]

    def every_decision(self) -> dict[str, list[StoredDecision]]:
        """The decisions of all runs by the hash of their model, the newest first."""
        found: dict[str, list[StoredDecision]] = {}
        for source, stored in self._decisions():
            found.setdefault(source, []).append(stored)
        return found

    def _decisions(self, **partial: str) -> list[tuple[str, StoredDecision]]:
        rows = [(row, _record(StoredDecision, row.value)) for row in self._store.find("decision", **partial)]
        return [
            (str(row.key.get("source", "")), replace(stored, created=stored.created or row.created))
            for row, stored in rows
            if stored
        ]

    def _read(self, kind: type[T], name: str, key: Mapping[str, Any]) -> T | None:
        return _record(kind, self._store.get(name, key))


def _record(kind: type[T], value: Any) -> T | None:
    """A stored record; None where none was found, or what cannot be one (it was imported, or is of another version):
    it is measured anew then, and stored in its place."""
    try:
        return None if value is None else from_json(kind, value)
    except ValueError:
        return None


def _guess_key(file: str, kind: str, draft: str, workload: str, engine: Mapping[str, Any]) -> dict[str, Any]:
    return {"file": file, "speculate": kind, "draft": draft, "workload": workload, "engine": dict(engine)}
