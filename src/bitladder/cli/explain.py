"""The verb that says what a name means: explain."""

from __future__ import annotations

from typing import Annotated

import typer

from bitladder.cli.completion import level_names
from bitladder.cli.terminal import JsonFlag, print_json, put, verb


@verb
def explain(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A level, block format or method: Q4_K_M, AWQ-4bit-g64, GPTQ.",
            autocompletion=level_names,
        ),
    ],
    json_output: JsonFlag = False,
) -> None:
    """What a level's name means: bits, blocks, which tensors get more, what it costs, when to use it."""
    import shutil
    import textwrap

    from bitladder.stages.explain import explain as explained

    found = explained(name)
    if json_output:
        print_json(found)
        return
    width = max(40, min(100, shutil.get_terminal_size().columns))
    put(textwrap.fill(f"{found.name}: {found.summary}.", width))
    for heading, text in found.parts:
        indent = " " * 12
        put(textwrap.fill(f"{text}.", width, initial_indent=f"  {heading:<10}", subsequent_indent=indent))


def add_to(app: typer.Typer) -> None:
    """Register this module's verb."""
    app.command()(explain)
