"""The verbs, in the order of the story: what is here, what fits, build, prove, decide, serve."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import Annotated

import typer

from bitladder import __version__
from bitladder.cli import (
    bench,
    build,
    check,
    compare,
    deploy,
    evidence,
    explain,
    fit,
    hand_over,
    housekeeping,
    hub,
    judge,
    recipe,
    speculate,
    sweep,
)
from bitladder.cli.terminal import Verbs
from bitladder.system import spin_limit
from bitladder.visible import write_plainly

app = typer.Typer(
    name="bitladder",
    cls=Verbs,
    help="Find, build, prove and serve the right quantization of a language model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes need rich, which takes half as long to import as all else
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for module in (
    judge, bench, sweep, fit, hub, explain, build, recipe, speculate, deploy, compare, hand_over, evidence, check,
    housekeeping,
):  # fmt: skip
    module.add_to(app)


def main() -> None:
    """Set up the process, and do what the command line says."""
    write_plainly(sys.stdout)
    write_plainly(sys.stderr)
    # what is imported and read stays: looking through it again and again, and once more at the end, takes 0.1 s
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    # OpenBLAS' threads, started with numpy, else spin for tens of milliseconds on cores that have other work
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    os.environ.update(spin_limit(os.environ))  # nor may those of compiled loops and torch, as with engines
    # its hints are to whoever writes the code around it
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
