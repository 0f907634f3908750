"""Verbs about what is kept and what comes with Bitladder: list, clean, examples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bitladder.cli.terminal import JsonFlag, print_json, put, say, verb
from bitladder.units import human_bytes

_UNUSED_DAYS = 30
OlderThan = Annotated[
    int,
    typer.Option(
        "--older-than", metavar="DAYS", min=1, max=36_500, help="Days without use before something can be stale."
    ),
]


@verb
def list_kept(older_than: OlderThan = _UNUSED_DAYS, json_output: JsonFlag = False) -> None:
    """Runs, files of levels, caches and downloads: sizes, and what points to what."""
    from bitladder.report.inventory import print_inventory
    from bitladder.stages.inventory import CACHES, inventory

    found = inventory(older_than_days=older_than)
    if json_output:
        print_json(found)
    else:
        print_inventory(found, CACHES, older_than)


@verb
def clean(
    older_than: OlderThan = _UNUSED_DAYS,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Delete what no run and no served level points to and was not used for a while; shows it and asks first."""
    from bitladder.report.inventory import print_stale
    from bitladder.stages.inventory import CACHES, inventory
    from bitladder.stages.inventory import clean as delete

    stale = inventory(older_than_days=older_than).stale
    size = sum(one.bytes for one in stale)
    if not json_output and stale:
        print_stale(stale, CACHES)
    elif not json_output:
        put(f"Nothing is stale: nothing that no run points to was unused for {older_than} days.")
    question = f"Delete {len(stale)} files and folders, {human_bytes(size)}?"
    agreed = bool(stale) and (yes or (not json_output and sys.stdin.isatty() and typer.confirm(question, err=True)))
    deleted = delete(stale, say) if agreed else ()
    if json_output:
        print_json({"stale": stale, "deleted": deleted})
    elif agreed:
        put(f"Deleted {len(deleted)} files and folders, {human_bytes(sum(one.bytes for one in deleted))}.")
    elif stale:
        put(f"Nothing was deleted: {human_bytes(size)} would be. --yes deletes without asking.")


@verb
def examples(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="A new folder.")] = Path("bitladder-examples"),
) -> None:
    """Copy the examples that come with Bitladder into a folder, to be read and changed."""
    from bitladder.files.examples import copy_examples

    for path in copy_examples(folder):
        put(str(path))


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    app.command("list")(list_kept)
    for function in (clean, examples):
        app.command()(function)
