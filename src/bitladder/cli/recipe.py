"""The verb about recipes: which type each tensor gets under a budget, and the file made by it with error feedback."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitladder.cli.build import (
    Calibrate,
    Context,
    EffortName,
    Force,
    Tune,
    WorkOptions,
    calibration_named,
    effort_named,
)
from bitladder.cli.completion import level_names
from bitladder.cli.grouped import grouped
from bitladder.cli.terminal import JsonFlag, ModelArgument, print_json, put, say, verb
from bitladder.errors import UsageError
from bitladder.units import parse_bytes

if TYPE_CHECKING:
    from bitladder.stages.job import Build, Work
    from bitladder.stages.recipe import RecipeResult

GGUF, VLLM = "gguf", "vllm"
"""What recipes are made for."""


@dataclass(kw_only=True)
class RecipeOptions(WorkOptions):
    """What ``recipe`` is asked."""

    model: ModelArgument
    to: Annotated[
        str, typer.Option("--to", metavar="gguf|vllm", help="A GGUF file, or a checkpoint of mixed schemes.")
    ] = GGUF
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="SIZE", help="Largest file, as 4GiB."),
    ] = None
    bpw: Annotated[
        float | None,
        typer.Option("--bpw", help="Bits per weight over all tensors; of a checkpoint: linear layers."),
    ] = None
    kl: Annotated[float | None, typer.Option("--kl", help="The smallest file that loses no more.")] = None
    fits: Annotated[bool, typer.Option("--fits", help="The largest that this machine holds.")] = False
    level: Annotated[
        str | None,
        typer.Option(
            "--level", metavar="LEVEL", help="llama.cpp's own types, like Q4_K_M.", autocompletion=level_names
        ),
    ] = None
    schemes: Annotated[
        str | None,
        typer.Option(
            "--schemes",
            metavar="S1[=TPS],S2",
            help="Of a checkpoint: choose among these only; with --tps the tokens a second that each alone gives.",
        ),
    ] = None
    least_decode: Annotated[
        float | None,
        typer.Option("--tps", help="Also decode at least this many tokens a second."),
    ] = None
    gpu_layers: Annotated[int, typer.Option("--ngl", min=0, help="Layers on the GPU, with --vram.")] = 0
    vram: Annotated[str | None, typer.Option("--vram", metavar="SIZE", help="What those may take.")] = None
    ctx: Context = None
    out: Annotated[Path | None, typer.Option("--out", help="Write the file into this folder.")] = None
    apply: Annotated[
        str | None, typer.Option("--apply", metavar="MODEL", help="Make this model by the recipe of the file MODEL.")
    ] = None
    calibrate: Calibrate = None
    tune: Tune = None
    effort: EffortName = "good"
    force: Force = False


@verb
@grouped
def recipe(options: RecipeOptions, json_output: JsonFlag = False) -> None:
    """Choose a type for every tensor under a budget; with --out write the file, with error feedback.

    With --to vllm: a scheme for every linear layer of a checkpoint. Without a limit: print the recipe of an existing
    file, or with --apply make another model by it.
    """
    from bitladder.files.sources import resolve
    from bitladder.plan.recipe import Limits
    from bitladder.report.recipe import lost_words, recipe_lines
    from bitladder.stages.job import Build
    from bitladder.stages.recipe import RecipeRequest, RecipeResult, make_recipe, read_recipe, reapply

    limits = _limits(options)
    if (options.vram is None) != (options.gpu_layers == 0):
        raise UsageError("--vram and --ngl belong together.", do="Give both: how many layers, and what they may take.")
    build = Build(
        out=options.out or Path(), effort=effort_named(options.effort), texts=calibration_named(options.calibrate),
        tuning=calibration_named(options.tune), force=options.force,
    )  # fmt: skip
    if options.tune and options.out is None:
        raise UsageError("--tune is for files that are written.", do="Give --out.")
    with options.working(quiet=json_output) as work:
        if options.to.lower() == VLLM:
            result = _mixed(options, build, limits, work)
        elif not limits:
            file = resolve(options.model, work.progress).path
            if options.apply is None:
                result = RecipeResult(read_recipe(file), float("nan"))
            else:
                result = reapply(file, options.apply, build, work)
        else:
            wish = Limits(
                bytes=parse_bytes(options.budget) if options.budget else None, bpw=options.bpw, kl=options.kl,
                least_decode=options.least_decode, gpu_layers=options.gpu_layers,
                vram_bytes=parse_bytes(options.vram) if options.vram else None,
            )  # fmt: skip
            request = RecipeRequest(
                wish, level=options.level, fits=options.fits, n_ctx=options.ctx, build=build if options.out else None,
                texts=build.calibration,
            )  # fmt: skip
            result = make_recipe(options.model, request, work)
    if json_output:
        journal = work.journal
        record = {"jobs": journal.jobs, "warnings": journal.warnings, "own_text": journal.own_text}
        print_json({**vars(result), **record})
        return
    for line in recipe_lines(result.recipe):
        put(line)
    if options.to.lower() == VLLM:
        put("  bits are of the linear layers; embedding, head and norms stay 16 bits wide")
    if result.fitted is not None:
        took = "was already there" if result.fitted.file.reused else f"{result.fitted.file.seconds:.0f} s"
        say(f"{result.fitted.file.path}  {took}, fitted to {result.fitted.tokens} tokens")
    if result.held_out is not None:
        held = result.held_out
        say(
            f"On {held.tokens} tokens that nothing was fitted to: {lost_words(held)}, "
            f"same first choice {held.top1:.1%}."
        )


def _limits(options: RecipeOptions) -> list[str]:
    """The limits that were given, one at most; raises UsageError for more, and for options that do not go with them."""
    if options.to.lower() not in (GGUF, VLLM):
        raise UsageError(
            f"Recipes are not made for '{options.to}'.",
            do="Give --to gguf (llama.cpp, Ollama, LM Studio) or --to vllm (vLLM, transformers).",
        )
    if options.schemes is not None and options.to.lower() != VLLM:
        raise UsageError("--schemes are of checkpoints.", do="Give --to vllm, too, or leave it out.")
    given = {"--budget": options.budget, "--bpw": options.bpw, "--kl": options.kl, "--level": options.level}
    limits = [name for name, value in given.items() if value is not None]
    limits += ["--fits"] if options.fits else []
    if len(limits) > 1:
        raise UsageError(f"{' and '.join(limits)} were given together.", do="Give one of them.")
    if options.to.lower() == GGUF:
        _refuse_unheeded(options, limits)
    return limits


def _refuse_unheeded(options: RecipeOptions, limits: list[str]) -> None:
    """Options that a call of this kind does nothing about, of GGUF recipes; raises UsageError."""
    placing: dict[str, object] = {"--tps": options.least_decode, "--vram": options.vram, "--ctx": options.ctx}
    effort = None if options.effort == RecipeOptions.effort else options.effort
    writing: dict[str, object] = {
        "--out": options.out,
        "--tune": options.tune,
        "--calibrate": options.calibrate,
        "--effort": effort,
    }
    if options.apply is not None:
        if limits:
            raise UsageError("--apply takes a finished file's recipe as it is.", do=f"Leave {limits[0]} out.")
        if options.out is None:
            raise UsageError("--apply writes a file, and no folder is named.", do="Give --out.")
        instead = "make a recipe for this model: bitladder recipe MODEL --bpw ..."
        _refuse(placing, "with --apply", "A finished file's types are taken as they are.", instead)
    elif options.level is not None:
        instead = "give another limit: --budget, --bpw, --kl or --fits."
        _refuse(placing, "with --level", "llama.cpp's types are taken as they are.", instead)
        if options.out is None:
            _refuse(
                writing,
                "with --level and no --out",
                "llama.cpp's types are printed, nothing is written.",
                "give --out.",
            )
    elif not limits:
        means = "A recipe needs a limit; without one the recipe of a file that is there is printed."
        instead = "give one of --budget, --bpw, --kl, --fits or --level."
        _refuse(placing | writing, "without a limit", means, instead)
    elif not options.fits:
        means = "A context is counted where a file must fit this machine."
        _refuse({"--ctx": options.ctx}, "without --fits", means, "give --fits.")


def _refuse(unheeded: dict[str, object], beside: str, means: str, instead: str) -> None:
    """Raises UsageError for the first option that was given."""
    for name, value in unheeded.items():
        if value is not None:
            raise UsageError(f"{name} was given {beside}.", means=means, do=f"Leave it out, or {instead}")


def _mixed(options: RecipeOptions, build: Build, limits: list[str], work: Work) -> RecipeResult:
    """A checkpoint of mixed schemes; raises UsageError for what only GGUF recipes know."""
    from bitladder.levels.checkpoints.mixed import SCHEMES
    from bitladder.plan.recipe import Limits
    from bitladder.stages.mixed import MixRequest, make_mix

    others = {
        "--level": options.level, "--apply": options.apply, "--vram": options.vram,
        "--fits": options.fits or None, "--ctx": options.ctx,
    }  # fmt: skip
    for name, value in others.items():
        if value is not None:
            raise UsageError(
                f"{name} was given with --to vllm.",
                means="It is about llama.cpp's types, or how it places and times them.",
                do="Leave it out, or make a GGUF recipe.",
            )
    if not limits:
        raise UsageError("A recipe needs a limit.", do="Give one of --budget, --bpw or --kl.")
    schemes, speeds = _schemes(options)
    wish = Limits(
        bytes=parse_bytes(options.budget) if options.budget else None, bpw=options.bpw, kl=options.kl,
        least_decode=options.least_decode, speeds=speeds,
    )  # fmt: skip
    request = MixRequest(wish, schemes or SCHEMES, build if options.out else None, build.calibration)
    return make_mix(options.model, request, work)


def _schemes(options: RecipeOptions) -> tuple[tuple[str, ...], dict[str, float]]:
    """Schemes to choose among, none where none was named, and how many tokens a second each gives alone, floats under
    ``none``; raises UsageError for a speed that is missing, or of no use."""
    from bitladder.levels.checkpoints.mixed import FLOAT
    from bitladder.stages.schemes import known_schemes

    words = [word.strip().partition("=") for word in (options.schemes or "").split(",") if word.strip()]
    speeds: dict[str, float] = {}
    for name, equals, said in words:
        if equals:
            own = FLOAT if name.lower() == FLOAT else known_schemes([name])[0]
            try:
                speeds[own] = float(said)
            except ValueError:
                speeds[own] = 0.0
            if not 0 < speeds[own] < float("inf"):
                raise UsageError(
                    f"'{said}' is no speed of {own}.", do=f"Give tokens a second, as in --schemes {own}=52."
                )
    named = [name for name, equals, _ in words if not (equals and name.lower() == FLOAT)]
    if options.least_decode is not None and (not speeds or len(speeds) < len(words)):
        slow = next((name for name, equals, _ in words if not equals), "any scheme")
        raise UsageError(
            f"--tps was given with --to vllm, and how fast your server runs {slow} is not known.",
            means="Rates of a server's kernels are measured there; nobody's figures are assumed.",
            do="Time checkpoints of one scheme each and give tokens a second: --schemes W4A16-g128=61,NVFP4A16=58.",
        )
    if options.least_decode is None and speeds:
        raise UsageError("Speeds of schemes are read with --tps.", do="Give --tps, or leave them out.")
    return tuple(named), speeds


def add_to(app: typer.Typer) -> None:
    """Register this module's verb."""
    app.command()(recipe)
