"""The files of a run: one for each level, each with the name its evidence is kept under."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.levels import FeedbackLevel, FileLevel, RecipeLevel
from bitladder.progress import LevelNews, Progress, tell
from bitladder.stages.quantize import method_name, quantize_levels
from bitladder.steps.jobs import building_need, job
from bitladder.steps.journal import Journal
from bitladder.steps.known_files import kept_by_evidence
from bitladder.steps.recipes import fitted_level
from bitladder.store.recorded import Subject

if TYPE_CHECKING:
    from bitladder.files.gguf import GgufFile
    from bitladder.kernels import Effort
    from bitladder.records.level_file import LevelFile
    from bitladder.steps.calibrated import Importance


def ladder_files(
    source: GgufFile,
    wanted: Sequence[FileLevel],
    out: Path,
    *,
    importance: Importance | None,
    effort: Effort,
    threads: int,
    folders: Sequence[Path] = (),
    device: str = "cpu",
    journal: Journal,
    progress: Progress,
) -> dict[Subject, LevelFile]:
    """A file for each level, in the order asked for; those that are there already are not made again.

    Args:
        source: the model.
        wanted: recipes, and levels with error feedback.
        out: the folder to write into.
        importance: weighs the errors of GGUF levels; fitted ones take their statistics from the calibration text.
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
    plain = [level for level in wanted if isinstance(level, RecipeLevel)]
    for one in plain:
        tell(progress, LevelNews(one.name, "being written"))
    need = building_need(source, plain, out, folders=folders, effort=effort, threads=threads)
    with job(need, journal, out) if plain else nullcontext():
        files = quantize_levels(
            source, [one.recipe for one in plain], out, importance=importance, effort=effort, threads=threads,
            device=device, folders=folders, is_kept=kept_by_evidence(journal), progress=progress,
        )  # fmt: skip
    for file in files:
        tell(progress, LevelNews(file.level, "written", file_bytes=file.bytes))
    journal.reuse("files", [file.level for file in files if file.reused])
    method = method_name(effort, importance)
    built = {Subject(source.sha256, file.level, made=method): file for file in files}
    for level in wanted:
        if isinstance(level, FeedbackLevel):
            subject, file = _fitted(source, level, out, effort, threads, device, folders, journal, progress)
            built[subject] = file
    names = [level.name for level in wanted]
    return {subject: built[subject] for subject in sorted(built, key=lambda subject: names.index(subject.level))}


def _fitted(
    source: GgufFile,
    level: FeedbackLevel,
    out: Path,
    effort: Effort,
    threads: int,
    device: str,
    folders: Sequence[Path],
    journal: Journal,
    progress: Progress,
) -> tuple[Subject, LevelFile]:
    """The file of a level whose codes are chosen with error feedback, under the name it was asked for by."""
    tell(progress, LevelNews(level.name, "being written"))
    made = fitted_level(
        source, level, out, effort=effort, threads=threads, device=device, folders=folders, journal=journal,
        progress=progress,
    )  # fmt: skip
    file = replace(made.file, level=level.name)
    tell(progress, LevelNews(level.name, "written", file_bytes=file.bytes))
    journal.reuse("files", [level.name] if file.reused else [])
    types = hashlib.sha256(repr(sorted(made.recipe.qtypes.items())).encode()).hexdigest()[:16]
    return Subject(source.sha256, level.name, made=f"{made.method}, types {types}"), file
