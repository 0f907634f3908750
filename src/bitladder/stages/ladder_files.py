"""The files of a run: one for each level, each with the name its evidence is kept under."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.levels import CheckpointLevel, FeedbackLevel, FoldedLevel, Level, RecipeLevel
from bitladder.progress import LevelNews
from bitladder.records.level_file import LevelFile
from bitladder.stages.forecast import building_need, forecast
from bitladder.stages.job import Build, Job
from bitladder.stages.known_files import kept_by_evidence
from bitladder.stages.write_levels import method_name, quantize_levels
from bitladder.store.recorded import Subject

if TYPE_CHECKING:
    from bitladder.kernels.awq import Fold
    from bitladder.stages.calibrate import Calibrated
    from bitladder.stages.calibration import Importance


def ladder_files(
    job: Job,
    levels: Sequence[Level],
    build: Build,
    *,
    importance: Importance | None,
    calibrated: Calibrated | None = None,
) -> dict[Subject, LevelFile]:
    """A file (or folder) for each level, in the order asked for; those that are there already are not made again.

    Args:
        job: the model.
        levels: of any kinds.
        build: where to, and how.
        importance: weighs the errors of GGUF levels; fitted ones take their statistics from the calibration text.
        calibrated: the scales of folded levels among ``levels``, and the checkpoints (``calibrate_levels``).

    Raises:
        NothingFits: too little memory or disk, before anything is written.
        BadWeights, OutputError: as the stages say.
    """
    making = _Making(job, build, importance)
    built = making.recipes([level for level in levels if isinstance(level, RecipeLevel)])
    for level in levels:
        if isinstance(level, FoldedLevel):
            assert calibrated is not None  # by contract
            built |= making.folded(level, calibrated)
        elif isinstance(level, FeedbackLevel):
            built |= making.fitted(level)
        elif isinstance(level, CheckpointLevel):
            assert calibrated is not None
            built |= making.checkpoint(level, calibrated)
    names = [level.name for level in levels]
    return {subject: built[subject] for subject in sorted(built, key=lambda subject: names.index(subject.level))}


@dataclass(frozen=True)
class _Making:
    """How the files of one call are made; each kind of level has its method, which says under which name evidence
    of the file is kept."""

    job: Job
    build: Build
    importance: Importance | None

    def recipes(self, levels: Sequence[RecipeLevel]) -> dict[Subject, LevelFile]:
        """All of them in one pass over the weights."""
        return self._quantized(levels, [level.recipe for level in levels], None)

    def folded(self, level: FoldedLevel, calibrated: Calibrated) -> dict[Subject, LevelFile]:
        """A pass of its own: its weights are its own."""
        return self._quantized([level], [level.recipe], calibrated.folds[level.name])

    def _quantized(
        self, levels: Sequence[RecipeLevel | FoldedLevel], recipes: Sequence[str], folds: Mapping[str, Fold] | None
    ) -> dict[Subject, LevelFile]:
        if not levels:
            return {}
        job, build = self.job, self.build
        for level in levels:
            job.progress.on_level(LevelNews(level.name, "being written"))
        need = building_need(job, levels, build)
        with forecast(need, job.journal, build.out):
            files = quantize_levels(
                job.source, recipes, build.out, importance=self.importance, folds=folds, effort=build.effort,
                threads=job.threads, device=job.device, executor=job.executor, warn=job.journal.warn,
                split_max_bytes=build.split_max_bytes, force=build.force,
                folders=build.folders, is_kept=kept_by_evidence(job.journal),
                requantize=build.requantize and folds is None, progress=job.progress,
            )  # fmt: skip
        method = method_name(build.effort, self.importance, folds)
        return self._written(files, method)

    def fitted(self, level: FeedbackLevel) -> dict[Subject, LevelFile]:
        """Codes are chosen with error feedback; the file is called by the name that was asked for."""
        self.job.progress.on_level(LevelNews(level.name, "being written"))
        from bitladder.stages.recipe import fitted_level  # brings the report's words, for these levels alone

        made = fitted_level(self.job, level, self.build)
        types = hashlib.sha256(repr(sorted(made.recipe.qtypes.items())).encode()).hexdigest()[:16]
        return self._written([replace(made.file, level=level.name)], f"{made.method}, types {types}")

    def checkpoint(self, level: CheckpointLevel, calibrated: Calibrated) -> dict[Subject, LevelFile]:
        """The folder that calibrating left."""
        report = next(one for one in calibrated.checkpoints if one.level == level.name)
        reused = level.name in calibrated.kept
        file = LevelFile(level.name, Path(report.path), report.bytes, report.bpw, report.seconds, reused)
        return self._written([file], f"calibrated as {calibrated.fingerprints[level.name]}")

    def _written(self, files: Sequence[LevelFile], method: str) -> dict[Subject, LevelFile]:
        for file in files:
            self.job.progress.on_level(LevelNews(file.level, "written", file_bytes=file.bytes))
        self.job.journal.reuse("files", [file.level for file in files if file.reused])
        return {Subject(self.job.source.sha256, file.level, made=method): file for file in files}
