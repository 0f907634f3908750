"""The verb that compares whatever can compute a model: selfcheck."""

from __future__ import annotations

from typing import Annotated

import typer

from bitladder.cli.build import ALL_CORES, Threads, working
from bitladder.cli.terminal import JsonFlag, ModelArgument, print_json, verb
from bitladder.errors import ImplementationsPart


@verb
def selfcheck(
    model: ModelArgument,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=16,
            help="Tokens of each of two windows.",
            show_default="64, or a few more than a short sliding window",
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer, not only those that part.")] = False,
    threads: Threads = ALL_CORES,
    json_output: JsonFlag = False,
) -> None:
    """Compare the walk, transformers and the engine on MODEL, layer by layer, and say what can be trusted for it.

    Exit 0 when all that can be compared agrees, 4 when something parts.
    """
    from bitladder.report.selfcheck import selfcheck_table
    from bitladder.stages.selfcheck import selfcheck_model

    with working(threads, quiet=json_output) as work:
        found = selfcheck_model(model, work, tokens=tokens)
    if json_output:
        print_json(found)
    else:
        selfcheck_table(found, every=layers)
    if not found.agrees:
        raise typer.Exit(ImplementationsPart.exit_code)


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    app.command()(selfcheck)
