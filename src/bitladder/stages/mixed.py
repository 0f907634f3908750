"""Steps of `bitladder recipe --to vllm`: weigh the linear layers once, choose schemes for a budget, write the folder,
prove it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.files.outputs import check_folder
from bitladder.levels.checkpoints.mixed import SCHEMES
from bitladder.plan.schemes import choose_schemes
from bitladder.records.level_file import LevelFile
from bitladder.records.recipe import FittedLevel, Recipe
from bitladder.stages.job import NONE, Build, CalibrationPart, Job, Work, opened
from bitladder.stages.quantize import SortedLevels, calibrate_levels, nothing_tuned
from bitladder.stages.recipe import AIM, RecipeResult, held, measured_on
from bitladder.stages.schemes import SchemeStorage, form_of
from bitladder.stages.weighing import RecipeTexts, recipe_texts, weighed_tensors

if TYPE_CHECKING:
    from bitladder.plan.recipe import Limits
    from bitladder.records.recipe import SensitivityTable


@dataclass(frozen=True)
class MixRequest:
    """What the user wants of a mixed checkpoint."""

    wish: Limits
    """Bits per weight of the linear layers, bytes of all tensors, or a loss."""
    schemes: Sequence[str] = SCHEMES
    build: Build | None = None
    """Where the folder is written; None: the recipe alone is wanted."""
    texts: Sequence[CalibrationPart] = ()
    """As ``Build`` has them."""


def make_mix(model: str, request: MixRequest, work: Work) -> RecipeResult:
    """Choose a scheme for every linear layer, and with ``request.build`` write the folder and measure it on held-out
    text.

    Raises:
        NothingFits: a limit cannot be met, or there is too little memory or disk.
        UsageError: no limit was given, one above the source, or schemes that shapes cannot hold.
        BadInput, BadWeights, UnknownArchitecture: the model cannot be weighed on this text.
    """
    with opened(model, work) as job:
        return mix_of(job, request)


def mix_of(job: Job, request: MixRequest) -> RecipeResult:
    """As ``make_mix``, of a model that is open already."""
    storage = SchemeStorage(job.source, request.schemes, checkpoint=job.found.checkpoint, threads=job.threads)
    storage.require(request.wish)
    offered = dict.fromkeys(scheme for info in job.source.model.tensors for scheme in storage.choices.of(info))
    if request.build is not None and request.build.tuning and not any(form_of(scheme).tunable for scheme in offered):
        raise nothing_tuned(list(offered))
    if request.build is not None:
        check_folder(request.build.out)
    parts = recipe_texts(job, request.texts, request.build)
    table, kept = weighed_tensors(job, parts, request.texts, storage)

    def chosen(table: SensitivityTable) -> Recipe:
        return choose_schemes(table, storage.linears.groups, job.source.model, replace(request.wish, aim=AIM))

    recipe, build = chosen(table), request.build
    if build is None:
        return RecipeResult(recipe, table.error)

    def made(table: SensitivityTable) -> RecipeResult:
        return replace(_written(job, storage, chosen(table), parts, build), table_error=table.error)

    result = made(table)
    if request.wish.kl is None:
        return result
    return held(request.wish.kl, result, table, kept, made, job.journal)


def _written(job: Job, storage: SchemeStorage, recipe: Recipe, parts: RecipeTexts, build: Build) -> RecipeResult:
    """The recipe's folder, and its loss on text that nothing was fitted to."""
    level = storage.level(recipe, round(recipe.bpw, 2))
    levels = SortedLevels((), (), (level,))
    calibrated = calibrate_levels(job, levels, replace(build, imatrix=NONE), windows=parts.fitting)
    assert calibrated is not None
    (report,) = calibrated.checkpoints
    reused = level.name in calibrated.kept
    file = LevelFile(level.name, Path(report.path), report.bytes, report.bpw, report.seconds, reused)
    tokens = sum(len(window.tokens) for window in parts.fitting)
    method = f"calibrated as {calibrated.fingerprints[level.name]}"
    fitted = FittedLevel(file, recipe, report.linears, tokens, method, calibrated.tuned.get(level.name))
    job.journal.warn(*report.notes)
    return RecipeResult(recipe, float("nan"), fitted, measured_on(job, file.path, parts.held_out))
