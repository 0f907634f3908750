"""Steps of `bitladder recipe`: weigh the tensors once, choose types for a budget, write the file, prove it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.errors import BitladderError, UsageError
from bitladder.files.outputs import check_folder
from bitladder.levels import FeedbackLevel
from bitladder.records.recipe import FittedLevel, Recipe, SensitivityTable
from bitladder.stages.calibration import tuning_windows
from bitladder.stages.forecast import forecast, walking_need, with_tuning
from bitladder.stages.job import Build, CalibrationPart, Job, Journal, Work, opened
from bitladder.stages.known_files import kept_by_evidence
from bitladder.stages.projector import deliver_projector, projector_of
from bitladder.stages.weighing import GgufStorage, RecipeTexts, keep_table, recipe_texts, weighed_tensors
from bitladder.units import human_bytes

if TYPE_CHECKING:
    from bitladder.describe.rates import PoolRates
    from bitladder.describe.windows import Window
    from bitladder.files.gguf import GgufFile
    from bitladder.plan.recipe import Limits
    from bitladder.records.fidelity import Fidelity

_TRIES = 2
"""Files made again for --kl when one loses more than was asked for, or much less."""
AIM = 0.92
"""Share of the loss asked for that recipes are chosen for: few files of error feedback lose what was
predicted to the last percent, and one that loses less needs no second try."""
_NEAR = 0.8
"""Share of the loss asked for from which a file is not made smaller any more."""


@dataclass(frozen=True)
class RecipeResult:
    """What came of one call: the recipe, the file if one was written, and its KL divergence on held-out text."""

    recipe: Recipe
    table_error: float
    """Typical relative error of predicted against measured KL, over whole recipes of codes to nearest."""
    fitted: FittedLevel | None = None
    held_out: Fidelity | None = None


@dataclass(frozen=True)
class RecipeRequest:
    """What the user wants: limits, or a level by name, and where the file is written."""

    wish: Limits
    level: str | None = None
    fits: bool = False
    """Choose the budget so that the model fits this machine with its context."""
    n_ctx: int | None = None
    """Tokens of that context; None: as `usable_context`."""
    build: Build | None = None
    """Where the file is written, and how; None: the recipe alone is wanted."""
    texts: Sequence[CalibrationPart] = ()
    """As ``Build`` has them."""


def make_recipe(model: str, request: RecipeRequest, work: Work) -> RecipeResult:
    """Choose a type for every tensor, and with ``request.build`` write the file and measure it on held-out text.

    Raises:
        NothingFits: a limit cannot be met, or there is too little memory or disk.
        UsageError: no limit was given, or one above the source.
        BadInput, BadWeights, UnknownArchitecture: the model cannot be weighed on this text.
    """
    with opened(model, work) as job:
        job.require_tokenizer()
        result = recipe_of(job, request)
        if request.build is not None and result.fitted is not None:
            deliver_projector(job.found, request.build.out, job.journal, job.progress)
        return result


def recipe_of(job: Job, request: RecipeRequest) -> RecipeResult:
    """As ``make_recipe``, of a model that is open already."""
    from bitladder.formats.recipes import level_named
    from bitladder.plan.recipe import wants_low

    source = job.source
    if request.level is None:
        request = replace(request, wish=_bounded(job, request))
    else:
        level_named(request.level)  # a name that is none is refused before any work
    job.require_layers()
    build = request.build
    if request.fits and _is_whole(source, request.wish):
        job.journal.warn(
            f"{job.found.label} fits this machine as it is, in {human_bytes(source.model.tensor_bytes)}: nothing is to "
            "be chosen, and no file is written."
        )
        return RecipeResult(read_recipe(source.path), float("nan"))
    if build is not None:
        check_folder(build.out)
    if request.level is not None and build is None:
        return RecipeResult(named_recipe(source, request.level), float("nan"))
    parts = recipe_texts(job, request.texts, build)
    if request.level is not None and build is not None:
        return _written(job, named_recipe(source, request.level), parts, build)
    storage = GgufStorage(job, low=wants_low(source.model, request.wish))
    table, kept = weighed_tensors(job, parts, request.texts, storage)
    recipe = _chosen(source, table, request.wish)
    if build is None:
        return RecipeResult(recipe, table.error)

    def write(table: SensitivityTable, recipe: Recipe) -> RecipeResult:
        return replace(_written(job, recipe, parts, build), table_error=table.error)

    result = write(table, recipe)
    if request.wish.kl is None:
        return result
    wish = request.wish
    return held(
        request.wish.kl, result, table, kept, lambda table: write(table, _chosen(source, table, wish)), job.journal
    )


def held(
    kl: float,
    result: RecipeResult,
    table: SensitivityTable,
    kept: Path,
    make: Callable[[SensitivityTable], RecipeResult],
    journal: Journal,
) -> RecipeResult:
    """The smallest file found that loses at most ``kl``, ``result`` being the first; what was learnt of predictions is
    kept with the table, so that the same call again finds the same file at once."""
    best = last = result
    for _ in range(_TRIES):
        if _NEAR * kl <= _lost(best) <= kl:
            break
        table = _corrected(table, last, journal)
        keep_table(kept, table)
        before, last = last, make(table)
        if last.recipe.qtypes == before.recipe.qtypes:
            break
        winner = last if _path(last) == _path(best) else min(best, last, key=lambda one: _rank(one, kl))
        _remove(best if winner is last else last, winner)
        best = winner
    if _lost(best) > kl:
        journal.warn(f"The loss is still above {kl:g}: ask for a smaller --kl.")
    return best


def _rank(result: RecipeResult, kl: float) -> tuple[bool, float]:
    """Files that hold a loss before others, the smallest first; of others that which loses least."""
    holds = _lost(result) <= kl
    return (not holds, result.recipe.bytes if holds else _lost(result))


def _path(result: RecipeResult) -> Path | None:
    return result.fitted.file.path if result.fitted else None


def _lost(result: RecipeResult) -> float:
    """Mean KL on held-out text; none measured counts as endless."""
    return float("inf") if result.held_out is None else result.held_out.kl_mean


def _corrected(table: SensitivityTable, result: RecipeResult, journal: Journal) -> SensitivityTable:
    """Predictions for fitted files, scaled by what one lost of what was expected of it."""
    from bitladder.report.rows import small

    if result.held_out is None or not result.recipe.expected_kl:
        return table
    lost, expected = result.held_out.kl_mean, result.recipe.expected_kl
    journal.say(f"{result.recipe.label} loses {small(lost)} where {small(expected)} was expected: another is made.")
    return replace(table, fed=table.fed * lost / expected)


def _remove(old: RecipeResult, new: RecipeResult) -> None:
    """Remove a file or folder that another stands in for, unless an earlier call had made it."""
    if old.fitted and old.fitted.file.path != _path(new) and not old.fitted.file.reused:
        path = old.fitted.file.path
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _written(job: Job, recipe: Recipe, parts: RecipeTexts, build: Build) -> RecipeResult:
    """The recipe's file, and its loss on text that nothing was fitted to."""
    from bitladder.report.recipe import note_lines, tuning_line

    fitted = write_recipe(
        job, recipe, parts.fitting, build, tuning_windows(job, [*parts.fitting, *parts.held_out], build)
    )
    job.journal.warn(*note_lines(fitted))
    if fitted.tuning is not None:
        job.journal.say(tuning_line(fitted.tuning))
    return RecipeResult(recipe, float("nan"), fitted, measured_on(job, fitted.file.path, parts.held_out))


def refuse_fitted(source: GgufFile, level: FeedbackLevel) -> None:
    """What no table of losses is needed to refuse of a level, by its name.

    Raises:
        NothingFits, UsageError: its bits are too few or too many.
        BadInput: error feedback is not made for one of its matrices.
    """
    from bitladder.plan.recipe import Limits, check
    from bitladder.stages.feedback import refuse_factors

    try:
        if level.recipe is None:
            check(source.model, Limits(bpw=level.bpw))
        else:
            refuse_factors(source, named_recipe(source, level.recipe))
    except BitladderError as error:
        error.found = f"{level}: {error.found}"
        raise


def fitted_level(job: Job, level: FeedbackLevel, build: Build) -> FittedLevel:
    """Write ``GPTQ-Q4_K_M`` or ``bpw4.25``; what it loses on held-out text is told to the journal.

    Raises:
        As ``make_recipe``.
    """
    from bitladder.plan.recipe import Limits
    from bitladder.report.recipe import lost_words

    request = RecipeRequest(Limits(bpw=level.bpw), level=level.recipe, build=build, texts=build.calibration)
    result = recipe_of(job, request)
    if result.fitted is None or result.held_out is None:
        raise ValueError("a recipe with a folder was not written")
    job.journal.say(f"{level}: {lost_words(result.held_out)} on held-out text.")
    return result.fitted


def reapply(file: Path, model: str, build: Build, work: Work) -> RecipeResult:
    """Write another checkpoint by the recipe of an existing file.

    Raises:
        UsageError: the two models differ in shape.
    """
    from bitladder.plan.recipe import reapplied

    recipe = read_recipe(file)
    with opened(model, work) as job:
        job.require_tokenizer()
        own = reapplied(recipe, job.source.model)
        check_folder(build.out)
        result = _written(job, own, recipe_texts(job, build.calibration, build), build)
        deliver_projector(job.found, build.out, job.journal, job.progress)
        return result


def read_recipe(file: Path) -> Recipe:
    """The recipe of any GGUF file, whoever wrote it: the types of its tensors, and what our own header says of them."""
    from bitladder.files.gguf import GgufFile
    from bitladder.formats.gguf import PROVENANCE
    from bitladder.plan.recipe import recipe_bytes

    with GgufFile.open(file) as opened:
        model = opened.model
        qtypes = {tensor.name: tensor.qtype for tensor in model.tensors}
        size, bpw = recipe_bytes(model, qtypes)
        expected = model.metadata.get(PROVENANCE + "expected_kl")
        label = str(model.metadata.get(PROVENANCE + "recipe") or FeedbackLevel(bpw=round(bpw, 2)).name)
        fed = str(model.metadata.get(PROVENANCE + "method", "")).startswith("feedback")
    return Recipe(
        label, model.dims.architecture, qtypes, size, bpw, float(str(expected)) if expected else None, (), fed
    )


def named_recipe(source: GgufFile, level: str) -> Recipe:
    """llama.cpp's own mix of types, to be made with error feedback."""
    from bitladder.formats.recipes import assign, level_named
    from bitladder.plan.recipe import recipe_bytes

    level = level_named(level)
    qtypes = assign(level, source.model.tensors, source.model.dims, has_importance=True)
    size, bpw = recipe_bytes(source.model, qtypes)
    return Recipe(
        FeedbackLevel(level).name,
        source.model.dims.architecture,
        qtypes,
        size,
        bpw,
        None,
        (f"types of {level}",),
        feedback=True,
    )


def write_recipe(
    job: Job, recipe: Recipe, windows: Sequence[Window], build: Build, tuning: Sequence[Window] = ()
) -> FittedLevel:
    """Write a recipe's file, with error feedback, unless it is there already, in other folders under any name.
    ``tuning``: a text that its numbers are tuned on.

    Raises:
        NothingFits: too little memory or disk.
    """
    from bitladder.plan.tuning import numbers_of_level
    from bitladder.stages.curvature import curvature_seconds
    from bitladder.stages.feedback import takes_curvature, write_with_feedback
    from bitladder.walk.feedback import FeedbackSettings
    from bitladder.walk.products import half_for

    settings = FeedbackSettings(
        effort=build.effort, threads=job.threads, device=job.device, half=half_for(job.executor)
    )
    need = walking_need(job.source, windows, (recipe.label,), kind="fit")
    seconds = need.seconds
    if takes_curvature(job.source, recipe):
        seconds += curvature_seconds(job.source, windows, half=settings.half_products)
    need = replace(
        need, what=f"fit {recipe.label} to {sum(len(window.tokens) for window in windows)} tokens",
        disk_bytes=recipe.bytes, seconds=seconds,
    )  # fmt: skip
    if tuning:
        numbers = numbers_of_level(job.source.model.tensors, recipe.qtypes)
        need = with_tuning(need, job.source, numbers, tuning)
    there = (build.out / f"{job.source.model.name}-{recipe.label}.gguf").exists()
    with nullcontext() if there else forecast(need, job.journal, build.out):
        return write_with_feedback(
            job.source, recipe, build.out, windows, settings=settings, tuning=tuning, force=build.force,
            folders=build.folders, is_kept=kept_by_evidence(job.journal), progress=job.progress,
            executor=job.executor, warn=job.journal.warn,
        )  # fmt: skip


def measured_on(job: Job, file: Path, windows: Sequence[Window]) -> Fidelity:
    """The fidelity of a file or a checkpoint folder on some windows."""
    from bitladder.files.checkpoint_check import format_of_folder
    from bitladder.files.gguf import GgufFile
    from bitladder.stages.fidelity import file_candidate, folder_candidate, walk

    need = walking_need(job.source, windows, (file.name if file.is_dir() else file.stem,))
    with ExitStack() as stack:
        if file.is_dir():
            candidate = folder_candidate(job.source, file, format_of_folder(file), threads=job.threads)
        else:
            level = stack.enter_context(GgufFile.open(file))
            candidate = file_candidate(job.source, level, threads=job.threads)
        stack.enter_context(forecast(need, job.journal))
        return walk(job.source, [candidate], windows, progress=job.progress, threads=job.threads, device=job.device)[0]


def _bounded(job: Job, request: RecipeRequest) -> Limits:
    """The wish with what it needs of this machine, refused here if no table of losses is needed to refuse it."""
    from bitladder.plan.recipe import check

    wish, source = request.wish, job.source
    if request.fits:
        projector = projector_of(job.found, job.journal, job.progress)
        beside = projector.stat().st_size if projector else 0
        room = room_for_weights(source, request.n_ctx) - beside
        wish = replace(wish, bytes=min(room, _whole_bytes(source)))  # more than the source is no budget
    if wish.least_decode:
        wish = replace(wish, rates=_rates())
    check(source.model, wish, header_bytes=_header_bytes(source))
    return wish


def _is_whole(source: GgufFile, wish: Limits) -> bool:
    """Whether the source itself keeps a wish for room, and nothing else is wished."""
    return wish.bytes == _whole_bytes(source) and wish.least_decode is None and wish.vram_bytes is None


def _whole_bytes(source: GgufFile) -> int:
    """The largest budget that there is: of a file that keeps every tensor as it is."""
    return source.model.tensor_bytes + _header_bytes(source)


def _chosen(source: GgufFile, table: SensitivityTable, wish: Limits) -> Recipe:
    from bitladder.plan.recipe import choose

    return choose(table, source.model, replace(wish, aim=AIM), header_bytes=_header_bytes(source))


def _header_bytes(source: GgufFile) -> int:
    """What a level's file holds beside tensors: its header, and padding between them."""
    from bitladder.files.level_files import draft_level

    return len(draft_level(source.model, "Q4_K_M").parts[0].plan.header) + 4096


def room_for_weights(source: GgufFile, n_ctx: int | None) -> int:
    """Bytes that this machine has for the file when the context, the engine's buffers and the engine are counted."""
    from bitladder.files.probe import probe_machine
    from bitladder.levels import RecipeLevel
    from bitladder.plan.ladder import make_plan
    from bitladder.plan.placement import usable_ram, usable_vram

    machine = probe_machine()
    level = make_plan(source.model, machine, n_ctx=n_ctx, levels=[RecipeLevel("Q4_K_M")]).levels[0]
    beside = level.total_bytes - level.file_bytes
    return max(usable_ram(machine), usable_vram(machine)) - beside


def _rates() -> PoolRates:
    from bitladder.files.measured import load_measured
    from bitladder.files.probe import probe_machine

    measured = load_measured(probe_machine())
    if measured is None:
        raise UsageError(
            "A least speed was asked for, and this machine has not been measured.",
            means="Which types decode fast differs between machines.",
            do="Run bitladder machine --measure first; it takes about twenty seconds.",
        )
    return measured.rates
