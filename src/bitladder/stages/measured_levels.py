"""Steps about files: find what a deployment needs.

The latest run of a model decides what is served, and it names files by their hashes. Those very files are looked for
where the run left them, where evidence says they lie, and under any name beside them. A level that is nowhere is built
as it was built then. Whatever is served, `TierFile.standing` says what evidence there is of the file itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bitladder.describe.cache_types import F16_CACHE, CacheTypes
from bitladder.errors import BadInput
from bitladder.progress import Progress
from bitladder.records.decision import Decision
from bitladder.records.level_file import FileStanding, LevelFile, StoredFile
from bitladder.stages.calibration import importance_of
from bitladder.stages.job import Build, Job, Work, opened
from bitladder.stages.known_files import (
    files_made_from,
    find_file,
    identified,
    importance_again,
    known_folders,
    model_sha256,
)
from bitladder.stages.projector import projector_of
from bitladder.stages.serve import served_level

if TYPE_CHECKING:
    from bitladder.kernels import Effort
    from bitladder.records.run import RunRecord
    from bitladder.store.recorded import Recorded, StoredDecision

_SHOWN = 12
"""Digits of a hash in a sentence."""


@dataclass(frozen=True)
class TierFile:
    """A level ready to be served. ``memory_bytes`` is what it takes with its context."""

    level: str
    path: Path
    sha256: str
    memory_bytes: int
    standing: FileStanding = FileStanding.UNMEASURED
    note: str = ""
    """What the operator should know of the file, where it is not the measured one."""
    projector: Path | None = None
    """What takes in pictures and sounds for it."""


@dataclass(frozen=True)
class LatestRun:
    """The newest run of a model that was decided for this machine."""

    decision: Decision
    created: str
    """ISO 8601."""
    path: Path
    """Where its record was written."""
    record: RunRecord | None
    """None where nothing is there any more, or another run's."""

    @property
    def sentence(self) -> str:
        """Which run it is, and when it was made."""
        gone = "" if self.record else ", whose record is gone: the name 'auto' has no evidence to go by"
        chose = "" if self.decision.quality else " It chose no level."
        return f"The run of {self.created} ({self.path}){gone}.{chose}"

    def is_about(self, level: str, sha256: str) -> bool:
        """Whether the run measured this very file as this level."""
        return bool(sha256) and self.decision.files.get(level) == sha256


def latest_run(model: str, progress: Progress) -> LatestRun | None:
    """The newest run of a model on this machine; None when there is none."""
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    with opened(model, Work(progress=progress)) as job, Evidence.open() as store:
        sha256 = job.source.sha256
        stored = Recorded(store).decisions(sha256)
    return latest_of(stored, sha256)


def latest_of(stored: Iterable[StoredDecision], source: str) -> LatestRun | None:
    """The first of a model's decisions, newest first, that was made for this machine or whose record is here."""
    from bitladder.files.measured import machine_key
    from bitladder.files.probe import probe_machine

    here = machine_key(probe_machine())
    for one in stored:
        record = _record_of(one.run, source, one.created if one.machine else "")
        if record is not None or one.machine == here:
            return LatestRun(one.decision, record.created if record else one.created, one.run, record)
    return None


def _record_of(path: Path, source: str, created: str) -> RunRecord | None:
    """The record of a run, if it is still there: of this model, and of this time where that is known."""
    from bitladder.report import read_run

    try:
        record = read_run(path)
    except BadInput:
        return None
    return record if record.source.sha256 == source and created in ("", record.created) else None


def tier_file(
    model: str,
    what: str,
    run: LatestRun | None = None,
    *,
    n_ctx: int,
    out: Path | None = None,
    work: Work,
    cache: CacheTypes = F16_CACHE,
) -> TierFile:
    """``what`` as a file to serve: a GGUF file, or a level of the model, which is built when it is nowhere.

    Args:
        model: a file, folder or name that ``files.sources`` finds; not looked at where ``what`` is a file.
        what: a path, or a level's name.
        run: the latest run of the model, whose files are meant by the levels' names.
        n_ctx: tokens of a request.
        out: the folder to build into; ``<name>-ladder`` by default.
        work: of building.
        cache: types of the KV cache that it is run with; a part of its level's name.

    Raises:
        UnknownLevel: neither a file nor a level.
        UsageError: the model was not trained for such a context.
        BadInput: a level that is gone cannot be built as it was, since its importance matrix is gone, too.
    """
    from bitladder.plan.ladder import check_context
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    with Evidence.open() as store:
        recorded = Recorded(store)
        if Path(what).is_file():
            return _with_cache(_named_file(Path(what), run, recorded, n_ctx, work.progress), run, n_ctx, cache)
        with opened(model, work, warn=False) as job:
            search = _Search(job, run, recorded, out or Path(f"{job.found.label}-ladder"))
            level = search.level_named(what)
            check_context(job.source.model, n_ctx)  # refused before anything is built
            path = search.path_of(level)
            projector = projector_of(job.found, job.journal, job.progress)
            file = _described(level, path, search.wanted(level), recorded, n_ctx, work.progress, projector)
            return _with_cache(file, run, n_ctx, cache)


def _with_cache(file: TierFile, run: LatestRun | None, n_ctx: int, cache: CacheTypes) -> TierFile:
    """The same file run with another cache: another deployment of the level, with another need of memory. What was
    measured holds for it where the run measured it so."""
    if cache.is_default:
        return file
    from bitladder.stages.serve import memory_by_slots

    (memory,), (usual,) = (memory_by_slots(file.path, n_ctx, (1,), each) for each in (cache, F16_CACHE))
    named = replace(file, level=cache.named(file.level), memory_bytes=file.memory_bytes + memory - usual)
    if file.standing is not FileStanding.MEASURED or (run is not None and run.is_about(named.level, file.sha256)):
        return named
    note = f"{named.level}: the file was measured, and not with a KV cache of {cache}."
    return replace(named, standing=FileStanding.UNMEASURED, note=note)


def _named_file(path: Path, run: LatestRun | None, recorded: Recorded, n_ctx: int, progress: Progress) -> TierFile:
    """A file that the user names; a level of the run when it is that very file."""
    sha256 = model_sha256(path, progress)
    levels = (level for level, known in (run.decision.files if run else {}).items() if known == sha256)
    before = [file.sha256 for file in recorded.files_at(path.resolve())]
    return _described(next(levels, path.stem), path, before[0] if before else "", recorded, n_ctx, progress)


def _described(
    level: str,
    path: Path,
    wanted: str,
    recorded: Recorded,
    n_ctx: int,
    progress: Progress,
    projector: Path | None = None,
) -> TierFile:
    """A file with what evidence says of it. ``wanted``: hash of the measured file that it stands for; may be empty.
    ``projector``: the model's, where none lies beside the file."""
    from bitladder.files.beside import projector_beside
    from bitladder.files.gguf import GgufFile
    from bitladder.files.probe import probe_machine
    from bitladder.plan.ladder import file_memory

    sha256 = model_sha256(path, progress)
    with GgufFile.open(path) as opened:
        memory = file_memory(opened.model, probe_machine(), n_ctx=n_ctx)
    projector = projector_beside(path) or projector
    memory += projector.stat().st_size if projector else 0
    measured = recorded.is_measured(sha256)
    changed = bool(wanted) and sha256 != wanted
    standing = FileStanding.MEASURED if measured else FileStanding.CHANGED if changed else FileStanding.UNMEASURED
    note = ""
    if changed:
        rest = "It was measured by itself." if measured else "What was measured does not hold for it."
        note = (
            f"{level}: {path} (SHA-256 {sha256[:_SHOWN]}...) is not the file that was measured ({wanted[:_SHOWN]}...). "
            f"{rest}"
        )
    elif not measured:
        note = f"{level}: {path} (SHA-256 {sha256[:_SHOWN]}...) was never measured: there is no evidence about it."
    return TierFile(level, path, sha256, memory, standing, note, projector)


@dataclass(frozen=True)
class _Search:
    """Where the file of a level is looked for, and how it is built when it is nowhere."""

    job: Job
    run: LatestRun | None
    recorded: Recorded
    out: Path

    def level_named(self, text: str) -> str:
        """A level of the run or of the ladder, in its own spelling; raises UnknownLevel."""
        return self.own if text.strip().lower() == self.own.lower() else served_level(text).name

    @property
    def own(self) -> str:
        """The level that the model itself is."""
        from bitladder.stages.run_facts import level_of

        return level_of(self.job.source.model)

    def wanted(self, level: str) -> str:
        """Hash of the file that is meant: the latest run's, else the one measured last; empty when there is none."""
        decided = self.run.decision.files.get(level) if self.run else None
        return decided or next((file.sha256 for file in self.recorded.files(self.job.source.sha256, level)), "")

    def _known(self, level: str) -> list[StoredFile]:
        """Every place of the file that is meant, the newest first."""
        wanted = self.wanted(level)
        return [file for file in self.recorded.files(self.job.source.sha256, level) if file.sha256 == wanted]

    def path_of(self, level: str) -> Path:
        """The file of a level."""
        if level == self.own:
            return self.job.source.path
        there = next(self._lying(level), None)
        return there or self._build(level).path

    def _lying(self, level: str) -> Iterator[Path]:
        """Files that will do, the best first: the measured one, then what stands in its place, then any that says of
        itself that it is this level of this model."""
        known = self._known(level)
        places = [Path(file.path) for file in known]
        if known:
            found = find_file(known[0].sha256, known[0].bytes, places, self.folders, self.job.progress)
            if found is not None:
                yield found
        made_here = files_made_from(self.job.source, level, self.folders)
        yield from (path for path in places if path.resolve() in {one.resolve() for one in made_here})
        if not known:
            yield from made_here

    @property
    def folders(self) -> Sequence[Path]:
        """The run's own, those of measured files, and the one to build into."""
        own = [self.run.path.parent] if self.run else []
        return [*own, *known_folders(self.recorded, self.job.source.sha256), self.out]

    def _build(self, level: str) -> LevelFile:
        """Make a level as it was made when it was measured, or as a run would make it."""
        from bitladder.stages.ladder_files import ladder_files
        from bitladder.stages.quantize import calibrate_levels, sort_levels

        job, build, wanted = self.job, Build(out=self.out), served_level(level)
        levels = sort_levels([wanted])
        known = next(iter(self._known(level)), None)
        if known is not None:
            making = known.making
            job = replace(job, threads=making.threads)
            build = replace(build, imatrix=making.imatrix, effort=cast("Effort", making.effort))
            job.journal.say(f"{level} is built again as it was for the measurements: its file is nowhere.")
            importance = importance_again(job, build, known)
        else:
            importance = importance_of(job, build) if levels.use_importance else None
        calibrated = calibrate_levels(job, levels, build)
        built = ladder_files(job, [wanted], build, importance=importance, calibrated=calibrated)
        (file,) = built.values()
        if known is not None and model_sha256(file.path, job.progress) == known.sha256:
            identified(built, known.making, self.recorded, job)
        return file
