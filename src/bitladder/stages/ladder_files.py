"""The files of a run: one for each level, each with the name its evidence is kept under."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.levels import CheckpointLevel, FeedbackLevel, FoldedLevel, Level, RecipeLevel
from bitladder.progress import LevelNews, Progress, tell
from bitladder.records.level_file import LevelFile
from bitladder.stages.forecast import building_need, job
from bitladder.stages.job import Journal
from bitladder.stages.known_files import kept_by_evidence
from bitladder.stages.recipe import fitted_level
from bitladder.stages.write_levels import method_name, quantize_levels
from bitladder.store.recorded import Subject

if TYPE_CHECKING:
    from bitladder.files.gguf import GgufFile
    from bitladder.kernels import Effort
    from bitladder.kernels.awq import Fold
    from bitladder.stages.calibrate import Calibrated
    from bitladder.stages.calibration import Importance


def ladder_files(
    source: GgufFile,
    wanted: Sequence[Level],
    out: Path,
    *,
    importance: Importance | None,
    calibrated: Calibrated | None = None,
    effort: Effort,
    threads: int,
    folders: Sequence[Path] = (),
    device: str = "cpu",
    journal: Journal,
    progress: Progress,
) -> dict[Subject, LevelFile]:
    """A file (or folder) for each level, in the order asked for; those that are there already are not made again.

    Args:
        source: the model.
        wanted: levels of any kinds.
        out: the folder to write into.
        importance: weighs the errors of GGUF levels; fitted ones take their statistics from the calibration text.
        calibrated: the scales of folded levels among ``wanted``, and the checkpoints (``calibrate_levels``).
        effort: how long to search for scales.
        threads: of everything.
        folders: where else levels may lie already, under any name.
        device: where scales are searched for and fitted levels walked, as torch names it.
        journal: told what work will take and what it took.
        progress: told how each level stands.

    Raises:
        NothingFits: too little memory or disk, before anything is written.
        BadWeights, OutputError: as the stages say.
    """
    making = _Making(source, out, importance, effort, threads, device, folders, journal, progress)
    built = making.recipes([level for level in wanted if isinstance(level, RecipeLevel)])
    for level in wanted:
        if isinstance(level, FoldedLevel):
            assert calibrated is not None  # by contract
            built |= making.folded(level, calibrated)
        elif isinstance(level, FeedbackLevel):
            built |= making.fitted(level)
        elif isinstance(level, CheckpointLevel):
            assert calibrated is not None
            built |= making.checkpoint(level, calibrated)
    names = [level.name for level in wanted]
    return {subject: built[subject] for subject in sorted(built, key=lambda subject: names.index(subject.level))}


@dataclass(frozen=True)
class _Making:
    """How the files of one call are made; each kind of level has its method, which says under which name evidence
    of the file is kept."""

    source: GgufFile
    out: Path
    importance: Importance | None
    effort: Effort
    threads: int
    device: str
    folders: Sequence[Path]
    journal: Journal
    progress: Progress

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
        for level in levels:
            tell(self.progress, LevelNews(level.name, "being written"))
        need = building_need(
            self.source, levels, self.out, folders=self.folders, effort=self.effort, threads=self.threads
        )
        with job(need, self.journal, self.out):
            files = quantize_levels(
                self.source, recipes, self.out, importance=self.importance, folds=folds, effort=self.effort,
                threads=self.threads, device=self.device, folders=self.folders,
                is_kept=kept_by_evidence(self.journal), progress=self.progress,
            )  # fmt: skip
        method = method_name(self.effort, self.importance, folds)
        return self._written(files, method)

    def fitted(self, level: FeedbackLevel) -> dict[Subject, LevelFile]:
        """Codes are chosen with error feedback; the file is called by the name that was asked for."""
        tell(self.progress, LevelNews(level.name, "being written"))
        made = fitted_level(
            self.source, level, self.out, effort=self.effort, threads=self.threads, device=self.device,
            folders=self.folders, journal=self.journal, progress=self.progress,
        )  # fmt: skip
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
            tell(self.progress, LevelNews(file.level, "written", file_bytes=file.bytes))
        self.journal.reuse("files", [file.level for file in files if file.reused])
        return {Subject(self.source.sha256, file.level, made=method): file for file in files}
