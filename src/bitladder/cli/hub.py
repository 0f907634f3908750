"""Verbs about the hub: search, pull."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bitladder.cli.completion import level_names
from bitladder.cli.fit import Hardware, Reserve, reserve_named
from bitladder.cli.terminal import JsonFlag, print_json, progress_display, put, verb
from bitladder.units import human_bytes

if TYPE_CHECKING:
    from bitladder.stages.hub import HubAnswer


@verb
def search(
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="Words of a model's name, or hf:org/name for all its levels.")
    ],
    level: Annotated[
        str,
        typer.Option("--level", help="The level to show of each repository.", autocompletion=level_names),
    ] = "Q4_K_M",
    hardware: Hardware = None,
    reserve: Reserve = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=50, help="Repositories.")] = 10,
    json_output: JsonFlag = False,
) -> None:
    """Find ready-made GGUF levels on the hub: size, downloads, licence, and whether they fit here."""
    from bitladder.stages.hub import search_models

    with progress_display(quiet=json_output) as progress:
        found = search_models(
            text, level=level, machine=hardware, reserve=reserve_named(reserve), limit=limit, progress=progress
        )
    if json_output:
        print_json(found)
    else:
        _show(found, text)


def _show(found: HubAnswer, text: str) -> None:
    from bitladder.report.hub import print_search

    if not found.levels:
        put(f"The hub has no repository of GGUF files for '{text}'.")
        return
    print_search(found.levels, found.machine, found.usable_bytes)


@verb
def pull(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="hf:org/name:Q4_K_M, hf:org/name:FILE.gguf or hf:org/name.")
    ],
    json_output: JsonFlag = False,
) -> None:
    """Fetch models from the hub. A broken download goes on where it stopped; every verb finds them by the same name."""
    from bitladder.stages.hub import pull as fetch_models

    with progress_display(quiet=json_output) as progress:
        found = fetch_models(models, progress)
    if json_output:
        print_json({"models": found})
        return
    for one in found:
        put(f"{one.name}  {human_bytes(one.nbytes)}  licence {one.licence or 'not stated'}\n  {one.path}")


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    for function in (search, pull):
        app.command()(function)
