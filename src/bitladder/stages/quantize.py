"""Everything that one `quantize` call asks for: GGUF levels, folded levels, checkpoints, from one walk and one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.errors import UnknownArchitecture, UsageError
from bitladder.levels import CheckpointLevel, FeedbackLevel, FoldedLevel, Level, Needs, RecipeLevel
from bitladder.progress import Progress
from bitladder.stages.calibration import (
    AUTO,
    NONE,
    calibration_texts,
    importance_file,
    importance_of,
    token_windows,
)
from bitladder.stages.forecast import building_need, job
from bitladder.stages.job import Journal
from bitladder.stages.known_files import kept_by_evidence

if TYPE_CHECKING:
    from bitladder.describe.text import Document
    from bitladder.files.gguf import GgufFile
    from bitladder.files.imatrix import ImportanceMatrix
    from bitladder.files.sources import Source
    from bitladder.kernels import Effort
    from bitladder.kernels.awq import Fold
    from bitladder.levels.products import Product
    from bitladder.records.calibration import CalibrationReport, CheckpointReport
    from bitladder.records.level_file import LevelFile
    from bitladder.stages.calibrate import Calibrated
    from bitladder.stages.calibration import Importance

CPU = "cpu"
_PROMPT_CHARACTERS = 600


@dataclass(frozen=True)
class Asked:
    """Levels by what they become, in the order asked for."""

    files: tuple[RecipeLevel, ...]
    folded: tuple[FoldedLevel, ...]
    checkpoints: tuple[CheckpointLevel, ...]
    fitted: tuple[FeedbackLevel, ...] = ()

    @property
    def weighed(self) -> bool:
        """Whether an importance matrix changes anything."""
        return bool(self.folded) or any(level.needs is Needs.IMPORTANCE for level in self.files)


@dataclass(frozen=True)
class Built:
    """What was written, and what it was calibrated on."""

    files: list[LevelFile] = field(default_factory=list)
    checkpoints: list[CheckpointReport] = field(default_factory=list)
    calibration: CalibrationReport | None = None


def sort_levels(levels: Sequence[Level]) -> Asked:
    """Levels by their kinds."""
    return Asked(
        tuple(level for level in levels if isinstance(level, RecipeLevel)),
        tuple(level for level in levels if isinstance(level, FoldedLevel)),
        tuple(level for level in levels if isinstance(level, CheckpointLevel)),
        tuple(level for level in levels if isinstance(level, FeedbackLevel)),
    )


def build_levels(
    model: str,
    levels: Sequence[Level],
    out: Path,
    *,
    imatrix: str = AUTO,
    texts: Sequence[Path] = (),
    effort: Effort = "good",
    threads: int,
    device: str = CPU,
    split_max_bytes: int | None = None,
    force: bool = False,
    journal: Journal | None = None,
    progress: Progress,
) -> Built:
    """Write a model at some levels.

    Args:
        model: A file, folder or name that ``files.sources`` finds.
        levels: Of any kinds.
        out: The folder to write into.
        imatrix: A file, ``auto`` (made here, where a level's bytes depend on it) or ``none``.
        texts: The user's calibration texts.
        effort: How long to search for scales.
        threads: Of everything.
        device: Where walks compute and scales of GGUF levels are searched for: cpu, or as torch names it.
        split_max_bytes: Cut GGUF levels into parts.
        force: Replace files that are not the same level of the same source.
        journal: Told before what work will take, and after what it took.
        progress: Told where it is.

    Raises:
        UsageError: folding was asked for together with no importance matrix, or a level would take the place of a
            file of another kind or source.
        NothingFits: too little memory or disk, before anything is written.
        BadInput, BadWeights, OutputError: as the stages say.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.sources import resolve

    asked = sort_levels(levels)
    _refuse(asked, imatrix, split_max_bytes, device)
    journal = journal or Journal()
    found = resolve(model, progress)
    with GgufFile.open(found.path) as source:
        _refuse_overwriting(source, asked, out, split_max_bytes, force=force)
        source.hash_ahead()  # while the rest is imported, which takes as long as hashing a small model
        from bitladder.files.probe import probe_machine
        from bitladder.plan.preflight import require
        from bitladder.stages.write_levels import quantize_levels

        every: list[Level] = [*asked.files, *asked.folded]
        need = building_need(source, every, out, effort=effort, threads=threads)
        require(need, probe_machine(out))  # before a walk takes its minutes
        journal.warn(*found.warnings)
        calibrated = calibrate_levels(
            source, found, asked, out, imatrix=imatrix, texts=texts, threads=threads, device=device, force=force,
            journal=journal, progress=progress,
        )  # fmt: skip
        importance = _importance(source, asked, imatrix, texts, calibrated, threads, device, journal, progress)
        written: list[LevelFile] = []
        with job(need, journal, out) if every else nullcontext():
            for folds, recipes in _passes(asked, calibrated):
                written += quantize_levels(
                    source, recipes, out, importance=importance, folds=folds, effort=effort, threads=threads,
                    device=device, split_max_bytes=split_max_bytes, force=force, is_kept=kept_by_evidence(journal),
                    progress=progress,
                )  # fmt: skip
        if asked.fitted:
            from bitladder.stages.recipe import fitted_level
        for level in asked.fitted:
            fitted = fitted_level(
                source, level, out, texts=texts, effort=effort, threads=threads, device=device, force=force,
                journal=journal, progress=progress,
            )  # fmt: skip
            written.append(fitted.file)
    if calibrated is None:
        return Built(written)
    return Built(written, calibrated.checkpoints, calibrated.report)


def _refuse(asked: Asked, imatrix: str, split_max_bytes: int | None, device: str) -> None:
    """Options that cannot be, told before any work is done; raises UsageError, BadInput or BadFile."""
    refuse_unweighed(asked.folded, imatrix)
    if imatrix not in (AUTO, NONE):
        from bitladder.files.imatrix import read_imatrix

        read_imatrix(Path(imatrix))
    refuse_unheard(asked.fitted, imatrix, split_max_bytes)
    if device != CPU:
        from bitladder.kernels.gpu import check_device

        check_device(device)


def _refuse_overwriting(source: GgufFile, asked: Asked, out: Path, split: int | None, *, force: bool) -> None:
    """Files whose names are known beforehand, before a walk takes its minutes; raises UsageError."""
    from bitladder.files.level_files import draft_level, refuse_overwriting

    named = [(level.recipe, level.name) for level in asked.files]
    named += [(level.recipe, level.name) for level in asked.folded]
    drafts = [draft_level(source.model, recipe, out, label=name, split_max_bytes=split) for recipe, name in named]
    refuse_overwriting([header.path for header in source.headers], drafts, lambda: source.sha256, force=force)


def refuse_unweighed(folded: Sequence[FoldedLevel], imatrix: str) -> None:
    """Refuse folding without an importance matrix; raises UsageError."""
    if folded and imatrix == NONE:
        raise UsageError(
            f"{folded[0].name} was asked for with --imatrix none.",
            means="Its scales come from the same activations, and are made for packing with an importance matrix.",
            do=f"Leave out --imatrix none, or ask for {folded[0].recipe}.",
        )


def refuse_unheard(fitted: Sequence[FeedbackLevel], imatrix: str, split_max_bytes: int | None = None) -> None:
    """Refuse options that fitted levels would not heed; raises UsageError."""
    given = {f"--imatrix {imatrix}": imatrix != AUTO, "--split-max-size": split_max_bytes is not None}
    option = next((option for option, is_given in given.items() if is_given), None)
    if not fitted or option is None:
        return
    raise UsageError(
        f"{fitted[0]} was asked for with {option}.",
        means="Fitted levels take their statistics from the calibration text, and are made as one file.",
        do=f"Leave out {option}, or ask for the others in a call of their own.",
    )


def _passes(asked: Asked, calibrated: Calibrated | None) -> list[tuple[Mapping[str, Fold] | None, list[str]]]:
    """Passes over the weights: one for all plain levels, one for each folded level, whose weights are its own."""
    passes: list[tuple[Mapping[str, Fold] | None, list[str]]] = []
    if asked.files:
        passes.append((None, [level.recipe for level in asked.files]))
    if calibrated is not None:
        passes += [(calibrated.folds[level.name], [level.recipe]) for level in asked.folded]
    return passes


def calibrate_levels(
    source: GgufFile,
    found: Source,
    asked: Asked,
    out: Path,
    *,
    imatrix: str = AUTO,
    texts: Sequence[Path] = (),
    measured_on: Sequence[Document] = (),
    threads: int,
    device: str = CPU,
    force: bool | None = None,
    folders: Sequence[Path] = (),
    journal: Journal,
    progress: Progress,
) -> Calibrated | None:
    """What comes of one walk over the calibration text: checkpoints, scales of folded levels, and the importance matrix
    where one is wanted beside them. None where no level asks for more than an importance matrix.

    Args:
        source: The model.
        found: Where it came from: its name, and the folder whose tokenizer checkpoints get.
        asked: The levels.
        out: Where checkpoint folders are written.
        imatrix: A file, ``auto`` or ``none``.
        texts: The user's calibration texts.
        measured_on: Texts that levels will be measured on, which calibration must not have seen; by default those
            that ship.
        threads: Of everything.
        device: Where the walk computes.
        force: As ``build_levels``; None where the user has no say.
        folders: Where else checkpoint levels may lie already.
        journal: Told what the walk will take, and what it took.
        progress: Told where it is.

    Raises:
        UsageError, NothingFits, BadInput, BadWeights, OutputError, UnknownArchitecture: as ``Calibration`` says.
    """
    if not asked.folded and not asked.checkpoints:
        return None
    from bitladder.files.texts import shipped_texts
    from bitladder.levels.products import ImportanceVectors
    from bitladder.stages.calibrate import Calibration, Reading
    from bitladder.walk.checkpoint_walk import Settings

    documents = calibration_texts(texts)
    wanted: list[Product] = [*asked.checkpoints, *asked.folded]
    if imatrix == AUTO and asked.weighed and not importance_file(source, documents).exists():
        wanted.append(ImportanceVectors())
    reading = Reading(
        token_windows(source, documents),
        documents,
        measuring=token_windows(source, measured_on or shipped_texts()),
        prompts=_prompts(source, documents) if asked.checkpoints else {},
    )
    work = Calibration(
        source, wanted, reading, out_dir=out, name=found.label, checkpoint=found.checkpoint,
        settings=Settings(threads=threads, device=device), force=force, folders=folders,
        is_kept=kept_by_evidence(journal),
    )  # fmt: skip
    with job(work.need, journal, out) if work.need is not None else nullcontext():
        calibrated = work.run(progress)
    if calibrated.importance is not None:
        _keep(source, documents, calibrated.importance)
    return calibrated


def _importance(
    source: GgufFile,
    asked: Asked,
    imatrix: str,
    texts: Sequence[Path],
    calibrated: Calibrated | None,
    threads: int,
    device: str,
    journal: Journal,
    progress: Progress,
) -> Importance | None:
    """The importance matrix that levels are weighed by; none, with a word, for a family that cannot be walked."""
    if imatrix == AUTO and not asked.weighed:
        return None
    if calibrated is not None and calibrated.importance is not None:
        return calibrated.importance.vectors()
    try:
        return importance_of(
            source, imatrix, texts=texts, threads=threads, device=device, journal=journal, progress=progress
        )
    except UnknownArchitecture as error:
        journal.warn(f"Levels are made without an importance matrix: {error.found}")
        return None


def _keep(source: GgufFile, documents: Sequence[Document], matrix: ImportanceMatrix) -> None:
    from bitladder.files.imatrix import write_imatrix

    path = importance_file(source, documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_imatrix(path, matrix)


def _prompts(source: GgufFile, documents: Sequence[Document]) -> dict[str, list[int]]:
    """Texts that a written tokenizer must read as the source's engine does: the starter workload's, and the beginning
    of every calibration text."""
    from bitladder.engines.base import Launch
    from bitladder.engines.registry import start
    from bitladder.files.workloads import STARTER, load_workload

    asked = [str(message["content"]) for one in load_workload(STARTER).inputs for message in one.messages]
    prompts = [*asked, *(document.text[:_PROMPT_CHARACTERS] for document in documents)]
    with start(Launch(source.path, n_ctx=64, threads=1)) as engine:
        return {prompt: list(engine.tokenize(prompt, add_special=True)) for prompt in dict.fromkeys(prompts)}
