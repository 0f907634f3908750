"""Steps of `bitladder recipe`: weigh the tensors once, choose types for a budget, write the file, prove it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder import __version__
from bitladder.errors import BadInput, UsageError
from bitladder.progress import Progress
from bitladder.records.recipe import FittedLevel, Recipe, SensitivityTable, TensorLoss
from bitladder.steps.calibrated import AUTO, calibration_texts, importance_of, token_windows
from bitladder.steps.jobs import job, walking_need
from bitladder.steps.journal import Journal

if TYPE_CHECKING:
    from bitladder.describe.rates import PoolRates
    from bitladder.describe.windows import Window
    from bitladder.files.gguf import GgufFile
    from bitladder.kernels import Effort
    from bitladder.plan.recipe import Wish
    from bitladder.records.fidelity import Fidelity
    from bitladder.records.level_file import LevelFile

_WEIGHING_TOKENS = 4096
"""Tokens that sensitivities are taken from: row weights are means over all of them, so a few thousand do."""
_HELD_OUT_TOKENS = 4096
"""Tokens that nothing is fitted to: predictions and the finished file are compared with the source on them."""
_LARGEST_HELD_OUT = 4
"""At most every fourth window is held out."""
_TRIES = 2
"""Files made again for --kl when one loses more than was predicted."""
_CHECKED = (1.06, 5.5, 4)
"""Recipes that predictions are scaled to: from so much above the smallest possible, to so many bits, how many."""


@dataclass(frozen=True)
class RecipeResult:
    """What came of one call: the recipe, the file if one was written, and its KL divergence on held-out text."""

    recipe: Recipe
    table_error: float
    """Typical relative error of predicted against measured KL, over whole recipes."""
    fitted: FittedLevel | None = None
    held_out: Fidelity | None = None


@dataclass(frozen=True)
class Asked:
    """What the user wants: a wish, or a level by name, and what to do with it."""

    wish: Wish
    level: str | None = None
    fits_ctx: int | None = None
    """Choose the budget so that the model fits this machine with this context."""
    out: Path | None = None
    effort: Effort = "good"
    """How long to search for scales."""


@dataclass(frozen=True)
class _Texts:
    """The calibration text: ``held_out`` shares no window with the others, ``weighing`` is a part of ``fitting``."""

    weighing: list[Window]
    fitting: list[Window]
    held_out: list[Window]


def make_recipe(
    model: str,
    asked: Asked,
    *,
    texts: Sequence[Path] = (),
    threads: int,
    journal: Journal | None = None,
    progress: Progress,
) -> RecipeResult:
    """Choose a type for every tensor, and with ``asked.out`` write the file and measure it on held-out text.

    Raises:
        NothingFits: a limit cannot be met, or there is too little memory or disk.
        UsageError: no limit was given, or one above the source.
        BadInput, BadWeights, UnknownArchitecture: the model cannot be weighed on this text.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.sources import resolve
    from bitladder.formats.recipes import level_named

    journal = journal or Journal()
    with GgufFile.open(resolve(model, progress).path) as source:
        if asked.level is None:
            asked = replace(asked, wish=_bounded(source, asked))
        else:
            level_named(asked.level)  # a name that is none is told before any work
        parts = _parts(token_windows(source, calibration_texts(texts)))
        if asked.level is not None:
            recipe = named_recipe(source, asked.level)
            if asked.out is None:
                return RecipeResult(recipe, float("nan"))
            return _written(source, recipe, parts, asked.out, asked.effort, threads, journal, progress)
        table = _weighed(source, parts, texts, threads, journal, progress)
        recipe = _chosen(source, table, asked)
        if asked.out is None:
            return RecipeResult(recipe, table.error)
        result = _written(source, recipe, parts, asked.out, asked.effort, threads, journal, progress, error=table.error)
        for _ in range(_TRIES):
            if not _loses_too_much(result, asked.wish.kl):
                return result
            table = _corrected(table, result, journal)
            recipe = _chosen(source, table, asked)
            before = result
            result = _written(
                source, recipe, parts, asked.out, asked.effort, threads, journal, progress, error=table.error
            )
            _replace_file(before, result)
        if _loses_too_much(result, asked.wish.kl):
            journal.warn(f"After {_TRIES + 1} files the loss is still above {asked.wish.kl:g}: ask for a smaller --kl.")
        return result


def _loses_too_much(result: RecipeResult, kl: float | None) -> bool:
    return kl is not None and result.held_out is not None and result.held_out.kl_mean > kl


def _corrected(table: SensitivityTable, result: RecipeResult, journal: Journal) -> SensitivityTable:
    """Predictions raised by as much as a file lost more than was expected of it."""
    if result.held_out is None or not result.recipe.expected_kl:
        return table
    lost, expected = result.held_out.kl_mean, result.recipe.expected_kl
    journal.say(f"{result.recipe.label} loses {lost:.4f} where {expected:.4f} was expected: a larger one is made.")
    return replace(table, scale=table.scale * lost / expected)


def _replace_file(before: RecipeResult, after: RecipeResult) -> None:
    """Remove the file that lost too much, once another stands in its place, unless an earlier call had made it."""
    old, new = before.fitted, after.fitted
    if old and new and old.file.path != new.file.path and not old.file.reused:
        old.file.path.unlink()


def _written(
    source: GgufFile,
    recipe: Recipe,
    parts: _Texts,
    out: Path,
    effort: Effort,
    threads: int,
    journal: Journal,
    progress: Progress,
    *,
    error: float = float("nan"),
) -> RecipeResult:
    """The recipe's file, and its loss on text that nothing was fitted to."""
    fitted = write_recipe(source, recipe, parts.fitting, out, effort, threads, journal, progress)
    held = measured_on(source, fitted.file.path, parts.held_out, threads, journal, progress)
    return RecipeResult(recipe, error, fitted, held)


def fitted_level(
    model: str,
    name: str,
    out: Path,
    *,
    texts: Sequence[Path] = (),
    effort: Effort = "good",
    threads: int,
    journal: Journal | None = None,
    progress: Progress,
) -> LevelFile:
    """Write ``GPTQ-Q4_K_M`` or ``bpw4.25``; what it loses on held-out text is told to ``journal``.

    Raises:
        UnknownLevel: there is no such recipe. Others as ``make_recipe``.
    """
    from bitladder.formats.recipes import parse_fitted
    from bitladder.plan.recipe import Wish

    level, bpw = parse_fitted(name)
    journal = journal or Journal()
    asked = Asked(Wish(bpw=bpw), level=level, out=out, effort=effort)
    result = make_recipe(model, asked, texts=texts, threads=threads, journal=journal, progress=progress)
    if result.fitted is None or result.held_out is None:
        raise ValueError("a recipe with a folder was not written")
    held = result.held_out
    journal.say(f"{name}: mean KL {held.kl_mean:.4f} [{held.kl_low:.4f}, {held.kl_high:.4f}] on held-out text.")
    return result.fitted.file


def reapply(
    file: Path, model: str, out: Path, *, texts: Sequence[Path], threads: int, journal: Journal, progress: Progress
) -> RecipeResult:
    """Write another checkpoint by the recipe of an existing file.

    Raises:
        UsageError: the two models differ in shape.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.sources import resolve
    from bitladder.plan.recipe import reapplied

    recipe = read_recipe(file)
    with GgufFile.open(resolve(model, progress).path) as source:
        own = reapplied(recipe, source.model)
        parts = _parts(token_windows(source, calibration_texts(texts)))
        return _written(source, own, parts, out, "good", threads, journal, progress)


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
        label = str(model.metadata.get(PROVENANCE + "recipe") or f"bpw{bpw:.2f}")
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
        f"GPTQ-{level}", source.model.dims.architecture, qtypes, size, bpw, None, (f"types of {level}",), feedback=True
    )


def write_recipe(
    source: GgufFile,
    recipe: Recipe,
    windows: Sequence[Window],
    out: Path,
    effort: Effort,
    threads: int,
    journal: Journal,
    progress: Progress,
) -> FittedLevel:
    """Write a recipe's file, with error feedback.

    Raises:
        NothingFits: too little memory or disk.
    """
    from bitladder.engines.feedback import FeedbackSettings
    from bitladder.stages.feedback import write_with_feedback

    need = replace(
        walking_need(source, windows, (recipe.label,), kind="fit"),
        what=f"fit {recipe.label} to {sum(len(window.tokens) for window in windows)} tokens",
        disk_bytes=recipe.bytes,
    )
    there = (out / f"{source.model.name}-{recipe.label}.gguf").exists()
    with nullcontext() if there else job(need, journal, out):
        return write_with_feedback(
            source, recipe, out, windows, settings=FeedbackSettings(effort=effort, threads=threads), progress=progress
        )


def measured_on(
    source: GgufFile, file: Path, windows: Sequence[Window], threads: int, journal: Journal, progress: Progress
) -> Fidelity:
    """A file's fidelity on some windows."""
    from bitladder.files.gguf import GgufFile
    from bitladder.stages.walk import file_candidate, walk

    with GgufFile.open(file) as opened, job(walking_need(source, windows, (file.stem,)), journal):
        return walk(
            source, [file_candidate(source, opened, threads=threads)], windows, progress=progress, threads=threads
        )[0]


def _parts(windows: Sequence[Window]) -> _Texts:
    """Windows spread over the text are held out; sensitivities are taken from others, spread over the rest.

    Raises:
        BadInput: there are too few windows to hold one out.
    """
    if len(windows) < _LARGEST_HELD_OUT:
        raise BadInput(
            f"The calibration text makes {len(windows)} windows of tokens; at least {_LARGEST_HELD_OUT} are needed.",
            means="One in four is held out, to measure the file on text that nothing was fitted to.",
            do="Give a longer text, or leave it out to use the one that ships.",
        )
    total = sum(len(window.tokens) for window in windows)
    stride = max(_LARGEST_HELD_OUT, round(total / _HELD_OUT_TOKENS))
    held = list(windows[stride - 1 :: stride])
    rest = [window for at, window in enumerate(windows) if (at + 1) % stride]
    step = max(1, round(sum(len(window.tokens) for window in rest) / _WEIGHING_TOKENS))
    return _Texts(rest[::step], rest, held)


def _bounded(source: GgufFile, asked: Asked) -> Wish:
    """The wish with what it needs of this machine, refused here if no table of losses is needed to refuse it."""
    from bitladder.plan.recipe import check

    wish = asked.wish
    if asked.fits_ctx is not None:
        wish = replace(wish, bytes=room_for_weights(source, asked.fits_ctx))
    if wish.least_decode:
        wish = replace(wish, rates=_rates())
    check(source.model, wish, header_bytes=_header_bytes(source))
    return wish


def _chosen(source: GgufFile, table: SensitivityTable, asked: Asked) -> Recipe:
    from bitladder.plan.recipe import choose

    return choose(table, source.model, asked.wish, header_bytes=_header_bytes(source))


def _header_bytes(source: GgufFile) -> int:
    """What a level's file holds beside tensors: its header, and padding between them."""
    from bitladder.files.level_files import draft_level

    return len(draft_level(source.model, "Q4_K_M").parts[0].plan.header) + 4096


def room_for_weights(source: GgufFile, n_ctx: int) -> int:
    """Bytes that this machine has for the file when the context, the engine's buffers and the engine are counted."""
    from bitladder.files.probe import probe_machine
    from bitladder.plan.placement import usable_ram, usable_vram
    from bitladder.stages.plan import make_plan

    machine = probe_machine()
    level = make_plan(source.model, machine, n_ctx=n_ctx, levels=["Q4_K_M"]).levels[0]
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


def _weighed(
    source: GgufFile,
    parts: _Texts,
    texts: Sequence[Path],
    threads: int,
    journal: Journal,
    progress: Progress,
) -> SensitivityTable:
    """The table of predicted losses, checked against measured recipes; kept between runs."""
    from bitladder.describe.text import text_hash
    from bitladder.files.atomic import write_whole
    from bitladder.files.folders import cache_folder
    from bitladder.kernels import REVISION
    from bitladder.records import to_json
    from bitladder.stages.sensitivity import sensitivity_table

    text = text_hash(calibration_texts(texts))[:16]
    kept = cache_folder("sensitivity", f"{source.sha256[:16]}-{text}-{__version__}-{REVISION}.json")
    if kept.exists():
        journal.reuse("sensitivity", [source.model.name])
        return _read_table(kept)
    need = walking_need(source, parts.weighing, ("",) * 3, kind="weigh")
    with job(need.named(f"weigh {source.model.name}'s tensors"), journal):
        table = sensitivity_table(source, parts.weighing, threads=threads, progress=progress)
    table = _checked(source, table, parts, texts, threads, journal, progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, json.dumps(to_json(table)))
    return table


def _read_table(path: Path) -> SensitivityTable:
    stored = json.loads(path.read_text(encoding="utf-8"))
    losses = {name: tuple(TensorLoss(**one) for one in own) for name, own in stored.pop("losses").items()}
    checked = tuple((pair[0], pair[1]) for pair in stored.pop("checked"))
    error = stored.pop("error")
    return SensitivityTable(
        **stored, losses=losses, checked=checked, error=float("nan") if error is None else float(error)
    )


def _checked(
    source: GgufFile,
    table: SensitivityTable,
    parts: _Texts,
    texts: Sequence[Path],
    threads: int,
    journal: Journal,
    progress: Progress,
) -> SensitivityTable:
    """Measure a few whole recipes, made on the fly, and scale the predictions to them."""
    import numpy as np

    from bitladder.engines.weights import FileWeights, MadeWeights, Quantizer
    from bitladder.plan.recipe import Wish, bounds, choose, fitted, predicted
    from bitladder.stages.walk import Candidate, walk

    importance = importance_of(source, AUTO, texts=texts, threads=threads, journal=journal, progress=progress)
    quantizer = Quantizer(FileWeights(source, threads=threads), importance=importance, effort="fast", threads=threads)
    least, most = (8 * size / sum(t.elements for t in source.model.tensors) for size in bounds(source.model))
    sizes = np.geomspace(_CHECKED[0] * least, min(_CHECKED[1], most), _CHECKED[2])
    recipes = [
        choose(table, source.model, Wish(bpw=float(bpw), feedback=False)) for bpw in sizes if least <= bpw <= most
    ]
    candidates = [Candidate(recipe.label, MadeWeights(quantizer, recipe.qtypes)) for recipe in recipes]
    windows = parts.held_out
    with job(walking_need(source, windows, [recipe.label for recipe in recipes]), journal):
        found = walk(source, candidates, windows, progress=progress, threads=threads)
    sums = [predicted(table, recipe.qtypes, feedback=False) for recipe in recipes]
    return fitted(table, [(s, one.kl_mean) for s, one in zip(sums, found, strict=True)])
