"""Verbs about files: plan, quantize, inspect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from bitladder.cli.terminal import JsonFlag, ModelArgument, print_json, progress_display, say, verb
from bitladder.errors import UsageError
from bitladder.units import human_bytes, parse_bytes

if TYPE_CHECKING:
    from bitladder.kernels import Effort

Context = Annotated[int, typer.Option("--ctx", min=64, help="Context length in tokens.")]
Levels = Annotated[
    str | None,
    typer.Option("--levels", metavar="L1,L2", help="Only these levels; all of the ladder by default."),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Worker threads.", show_default="all cores")]
DEFAULT_CTX = 4096
ALL_CORES = os.cpu_count() or 1


def split_levels(text: str | None) -> tuple[str, ...] | None:
    """``"Q8_0,q4_k_m"`` as level names, spelled as the table spells them; raises UnknownLevel with the nearest name."""
    from bitladder.formats.recipes import level_named

    if text is None:
        return None
    return tuple(dict.fromkeys(level_named(part.strip()) for part in text.split(",") if part.strip()))


def effort_named(text: str) -> Effort:
    """An effort by its name; raises UsageError."""
    if text not in ("fast", "good", "best"):
        raise UsageError(f"The --effort must be fast, good or best. Got '{text}' instead.")
    return cast("Effort", text)


@verb
def plan(
    model: ModelArgument, ctx: Context = DEFAULT_CTX, levels: Levels = None, json_output: JsonFlag = False
) -> None:
    """Which levels fit this machine at a context, with the reason for each. Reads headers only."""
    from bitladder.report import plan_table
    from bitladder.steps.models import plan_model

    with progress_display(quiet=json_output) as progress:
        made = plan_model(model, n_ctx=ctx, levels=split_levels(levels), progress=progress)
    if json_output:
        print_json(made)
    else:
        plan_table(made)


@verb
def quantize(
    model: ModelArgument,
    to: Annotated[str, typer.Option("--to", metavar="L1,L2", help="The levels to write.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path(),
    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", exists=False, help="llama.cpp importance matrix to weigh errors by."),
    ] = None,
    effort: Annotated[
        str, typer.Option("--effort", help="fast, good or best: how hard to search for scales.")
    ] = "good",
    threads: Threads = ALL_CORES,
    split_max_size: Annotated[
        str | None,
        typer.Option("--split-max-size", metavar="SIZE", help="Cut each level into parts of at most SIZE, like 4GB."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Write a model at one or several levels; every tensor is read once for all of them."""
    from bitladder.steps.models import quantize_model

    with progress_display(quiet=json_output) as progress:
        files = quantize_model(
            model,
            split_levels(to) or (),
            out,
            imatrix=imatrix,
            effort=effort_named(effort),
            threads=threads,
            split_max_bytes=parse_bytes(split_max_size) if split_max_size else None,
            progress=progress,
        )
    if json_output:
        print_json({"files": files})
    else:
        for file in files:
            took = "was already there" if file.reused else f"{file.seconds:.1f} s"
            say(f"{file.path}  {human_bytes(file.bytes)}, {file.bpw:.2f} bits per weight, {took}")


@verb
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """What a GGUF really holds, and whether its name tells the truth."""
    from bitladder.report import inspection_table
    from bitladder.stages.inspect import inspect_file

    inspection = inspect_file(file)
    if json_output:
        print_json(inspection)
    else:
        inspection_table(inspection, tensors=tensors)


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    for function in (plan, quantize, inspect):
        app.command()(function)
