"""Everything that one `quantize` call asks for: GGUF levels, folded levels, checkpoints, from one walk and one pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.errors import UsageError
from bitladder.levels import CheckpointLevel, FeedbackLevel, FileLevel, FoldedLevel, Level, Needs, RecipeLevel
from bitladder.stages.calibration import (
    calibration_texts,
    given_importance,
    importance_file,
    importance_of,
    tuning_windows,
)
from bitladder.stages.forecast import building_need, forecast
from bitladder.stages.job import AUTO, CPU, NONE, Build, Job, Work, opened
from bitladder.stages.known_files import kept_by_evidence
from bitladder.stages.projector import deliver_projector

if TYPE_CHECKING:
    from bitladder.describe.model import Model
    from bitladder.describe.text import Document
    from bitladder.describe.windows import Window
    from bitladder.files.gguf import GgufFile
    from bitladder.files.imatrix import ImportanceMatrix
    from bitladder.levels.products import Product
    from bitladder.records.calibration import CalibrationReport, CheckpointReport
    from bitladder.records.level_file import LevelFile
    from bitladder.stages.calibrate import Calibrated
    from bitladder.stages.calibration import Importance

_PROMPT_CHARACTERS = 600


@dataclass(frozen=True)
class SortedLevels:
    """Levels by their kinds, in the order asked for."""

    files: tuple[RecipeLevel, ...]
    folded: tuple[FoldedLevel, ...]
    checkpoints: tuple[CheckpointLevel, ...]
    fitted: tuple[FeedbackLevel, ...] = ()

    @property
    def use_importance(self) -> bool:
        """Whether an importance matrix changes anything."""
        return bool(self.folded) or any(level.needs is Needs.IMPORTANCE for level in self.files)


@dataclass(frozen=True)
class Built:
    """What was written, and what it was calibrated on."""

    files: list[LevelFile] = field(default_factory=list)
    checkpoints: list[CheckpointReport] = field(default_factory=list)
    calibration: CalibrationReport | None = None
    projector: Path | None = None
    """What takes in pictures and sounds, beside the levels; None where the model has none, or none can be made."""


def sort_levels(levels: Sequence[Level], imatrix: str = AUTO, split_max_bytes: int | None = None) -> SortedLevels:
    """Levels by their kinds.

    Raises:
        UsageError: folding was asked for together with no importance matrix, or fitted levels with an option that they
            do not follow.
    """
    found = SortedLevels(
        tuple(level for level in levels if isinstance(level, RecipeLevel)),
        tuple(level for level in levels if isinstance(level, FoldedLevel)),
        tuple(level for level in levels if isinstance(level, CheckpointLevel)),
        tuple(level for level in levels if isinstance(level, FeedbackLevel)),
    )
    if found.folded and imatrix == NONE:
        raise UsageError(
            f"{found.folded[0].name} was asked for with --imatrix none.",
            means="Its scales come from the same activations, and are made for packing with an importance matrix.",
            do=f"Leave out --imatrix none, or ask for {found.folded[0].recipe}.",
        )
    options = {f"--imatrix {imatrix}": imatrix != AUTO, "--split-max-size": split_max_bytes is not None}
    option = next((option for option, is_given in options.items() if is_given), None)
    if found.fitted and option is not None:
        raise UsageError(
            f"{found.fitted[0]} was asked for with {option}.",
            means="Fitted levels take their statistics from the calibration text, and are made as one file.",
            do=f"Leave out {option}, or ask for the others in a call of their own.",
        )
    return found


def build_levels(model: str, levels: Sequence[Level], build: Build, work: Work) -> Built:
    """Write a model at some levels.

    Args:
        model: A file, folder or name that ``files.sources`` finds.
        levels: Of any kinds.
        build: Where to, and how.
        work: Threads, device, and whom to tell.

    Raises:
        UsageError: options that exclude each other, or a level would take the place of a file of another kind or
            source.
        NothingFits: too little memory or disk, before anything is written.
        BadInput, BadWeights, OutputError: as the stages say.
    """
    asked = sort_levels(levels, build.imatrix, build.split_max_bytes)
    if build.tuning:
        _refuse_tuning(asked)
    given = None if build.imatrix in (AUTO, NONE) else Path(build.imatrix)
    if given is not None:
        from bitladder.files.imatrix import read_imatrix

        read_imatrix(given)
    if work.device != CPU:
        from bitladder.kernels.gpu import check_device

        check_device(work.device)
    if (straight := _straight(model, asked, build, work)) is not None:
        return straight
    with opened(model, work) as job:
        if asked.files or asked.folded or asked.fitted:
            job.require_tokenizer()
        _refuse_overwriting(job.source, asked, build)
        if given is not None:
            given_importance(job.source, given)
        if asked.fitted:
            from bitladder.stages.recipe import refuse_fitted

            for level in asked.fitted:
                refuse_fitted(job.source, level)
        job.source.hash_ahead()  # while the rest is imported, which takes as long as hashing a small model
        from bitladder.files.probe import probe_machine
        from bitladder.plan.preflight import require
        from bitladder.stages.ladder_files import ladder_files

        files: list[Level] = [*asked.files, *asked.folded]
        # What is wrong is said before a walk takes its minutes.
        require(building_need(job, files, build), probe_machine(build.out))
        if build.tuning:
            tuning_windows(job, job.windows(calibration_texts(job, build.calibration)), build)
        if (said := _stand_ins(job.source.model, [*asked.files, *asked.folded, *asked.fitted])) is not None:
            job.journal.warn(said)
        calibrated = calibrate_levels(job, asked, build)
        importance = _importance(job, asked, build, calibrated)
        made = ladder_files(job, [*files, *asked.fitted], build, importance=importance, calibrated=calibrated)
        projector = deliver_projector(job.found, build.out, job.journal, job.progress) if made else None
    if calibrated is None:
        return Built(list(made.values()), projector=projector)
    return Built(list(made.values()), calibrated.checkpoints, calibrated.report, projector)


def _stand_ins(model: Model, levels: Sequence[FileLevel]) -> str | None:
    """Where rows do not divide into the blocks of a level's type, another takes its place, and the level is larger than
    its name says."""
    from bitladder.formats.blocks import QTYPES
    from bitladder.formats.recipes import RECIPES, is_quantizable, without_blocks

    told: list[str] = []
    rows, blocks = set[int](), set[int]()
    for level in levels:
        if level.recipe is None:
            continue
        qtype = RECIPES[level.recipe].qtype
        if short := without_blocks(model.tensors, qtype):
            told.append(f"{level.name} ({len(short)} of {sum(map(is_quantizable, model.tensors))} matrices)")
            rows.update(tensor.shape[-1] for tensor in short)
            blocks.add(QTYPES[qtype].block_size)
    if not told:
        return None
    widths, sizes = (" and ".join(map(str, sorted(some))) for some in (rows, blocks))
    return (
        f"Rows of {widths} weights do not divide into blocks of {sizes}: larger types take their place in "
        f"{', '.join(told)}."
    )


def _refuse_tuning(asked: SortedLevels) -> None:
    """Raises UsageError where a level has nothing that is tuned."""
    named = [level.name for level in (*asked.files, *asked.folded)]
    forms = {one.name: one.format.forms for one in asked.checkpoints}  # none yet of a mix that is still to be chosen
    named += [name for name, own in forms.items() if own and not any(form.tunable for form in own)]
    if named:
        raise nothing_tuned(named)


def nothing_tuned(names: Sequence[str]) -> UsageError:
    """What is said where none of some levels, or schemes, has anything that is tuned."""
    return UsageError(
        f"--tune does nothing for {', '.join(names)}.",
        means="Scales are tuned of levels with error feedback (GPTQ-Q4_K_M, bpw4.25), and of checkpoints of whole "
        "numbers with 16-bit scales (GPTQ, AWQ, W4A16, MLX-4bit).",
        do="Name such levels, or leave --tune out.",
    )


def _straight(model: str, asked: SortedLevels, build: Build, work: Work) -> Built | None:
    """What a checkpoint folder becomes without being converted or walked, where all that is asked for can be."""
    from bitladder.files.sources import checkpoint_folder

    found = checkpoint_folder(model)
    if found is None or build.tuning or not asked.checkpoints or asked.files or asked.folded or asked.fitted:
        return None
    from bitladder.stages.straight import goes_straight, plain_checkpoint, write_straight

    folder, label = found
    plain = plain_checkpoint(folder, label) if goes_straight(asked.checkpoints, work) else None
    if plain is None:
        return None
    return Built(checkpoints=write_straight(plain, label, asked.checkpoints, build, work))


def _refuse_overwriting(source: GgufFile, asked: SortedLevels, build: Build) -> None:
    """Files whose names are known beforehand, before a walk takes its minutes; raises UsageError."""
    from bitladder.files.level_files import draft_level, refuse_overwriting

    levels: list[FileLevel] = [*asked.files, *asked.folded, *asked.fitted]
    drafts = [
        draft_level(source.model, level.recipe, build.out, label=level.name, split_max_bytes=build.split_max_bytes)
        for level in levels
        if level.recipe is not None  # a file of so many bits is called by those that it comes to
    ]
    inputs = [header.path for header in source.headers]
    refuse_overwriting(inputs, drafts, lambda: source.sha256, force=build.force)


def calibrate_levels(
    job: Job, levels: SortedLevels, build: Build, *, windows: Sequence[Window] | None = None
) -> Calibrated | None:
    """What comes of one walk over the calibration text: checkpoints, scales of folded levels, and the importance matrix
    where one is wanted beside them. None where no level asks for more than an importance matrix.

    Args:
        job: the model.
        levels: by their kinds.
        build: where to, and how.
        windows: of the calibration text, those to read, where others are held out to measure on; all by default.

    Raises:
        UsageError, NothingFits, BadInput, BadWeights, OutputError, UnknownArchitecture: as ``Calibration`` says.
    """
    if not levels.folded and not levels.checkpoints:
        return None
    job.require_layers()
    from bitladder.files.texts import shipped_texts
    from bitladder.levels.products import ImportanceVectors
    from bitladder.report.recipe import tuning_line
    from bitladder.stages.calibrate import Calibration, Reading, tunes
    from bitladder.stages.schemes import with_schemes
    from bitladder.walk.checkpoint_walk import Settings
    from bitladder.walk.products import half_for

    source, documents = job.source, calibration_texts(job, build.calibration)
    beside: list[Product] = [*levels.folded]
    together = build.imatrix == AUTO and build.importance_text == build.calibration
    if together and levels.use_importance and not importance_file(job, documents).exists():
        beside.append(ImportanceVectors())
    whole = job.windows(documents)
    reading = Reading(
        whole if windows is None else windows,
        documents,
        measuring=job.windows(build.measured_on or shipped_texts()) if windows is None else (),
        prompts=_prompts(job, documents) if levels.checkpoints else {},
        tuning=tuning_windows(job, whole, build),
        text_key=job.text_key(documents),
    )

    def planned(wanted: Sequence[Product]) -> Calibration:
        return Calibration(
            source, wanted, reading, out_dir=build.out, name=job.found.label, checkpoint=job.found.checkpoint,
            settings=Settings(threads=job.threads, device=job.device, half=half_for(job.executor)), force=build.force,
            folders=build.folders, is_kept=kept_by_evidence(job.journal), executor=job.executor, warn=job.journal.warn,
        )  # fmt: skip

    known = [level for level in levels.checkpoints if level.format.forms]
    if known and len(known) < len(levels.checkpoints):
        planned(known)  # what is wrong with them is said before a mix is weighed
    checkpoints = [with_schemes(job, level, build) for level in levels.checkpoints]
    for level in checkpoints:
        if build.tuning and not tunes(level, reading):
            job.journal.warn(f"{level.name} is not tuned: none of the schemes chosen for it has scales that are.")
    walk = planned([*checkpoints, *beside])
    with forecast(walk.need, job.journal, build.out) if walk.need is not None else nullcontext():
        calibrated = walk.run(job.progress)
    for name, tuning in calibrated.tuned.items():
        job.journal.say(f"{name}: {tuning_line(tuning)}")
    if calibrated.importance is not None:
        _keep(job, documents, calibrated.importance)
    return calibrated


def _importance(job: Job, asked: SortedLevels, build: Build, calibrated: Calibrated | None) -> Importance | None:
    """The importance matrix that levels are made with, where one changes anything."""
    if build.imatrix == AUTO and not asked.use_importance:
        return None
    if calibrated is not None and calibrated.importance is not None:
        return calibrated.importance.vectors()
    return importance_of(job, build)


def _keep(job: Job, documents: Sequence[Document], matrix: ImportanceMatrix) -> None:
    from bitladder.files.imatrix import write_imatrix

    path = importance_file(job, documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_imatrix(path, matrix)


def _prompts(job: Job, documents: Sequence[Document]) -> dict[str, list[int]]:
    """Texts that a written tokenizer must read as the source's does: the starter workload's, and the beginning of every
    calibration text."""
    from bitladder.files.workloads import STARTER, load_workload

    starters = [str(message["content"]) for one in load_workload(STARTER).inputs for message in one.messages]
    prompts = list(dict.fromkeys([*starters, *(document.text[:_PROMPT_CHARACTERS] for document in documents)]))
    return dict(zip(prompts, job.tokens(prompts), strict=True))
