"""The verbs, in the order of the story: what is here, what fits, build, prove, decide, serve."""

from __future__ import annotations

import atexit
import gc
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bitladder import __version__
from bitladder.cli import build, deploy, evidence, fit, hand_over, judge, recipe
from bitladder.cli.terminal import print_error_json

_NOT_UNDERSTOOD: type[Exception] = typer.BadParameter.__mro__[1]
"""Click's UsageError, of whichever click this typer carries: some bring their own."""


class _Verbs(TyperGroup):
    """Help that says of every verb the whole sentence, where the inherited one breaks off; and with ``--json`` what
    no verb understands told as JSON, too."""

    def invoke(self, ctx: Any) -> Any:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except _NOT_UNDERSTOOD as error:
            said: Any = error  # the class has no name that mypy could find
            if as_json:
                print_error_json("UsageError", said.format_message())
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 as click calls it
        sentences = [(name, verb.get_short_help_str(limit=1000)) for name, verb in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sentences)


app = typer.Typer(
    name="bitladder",
    cls=_Verbs,
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


for module in (judge, fit, build, recipe, deploy, hand_over, evidence):
    module.add_to(app)


def main() -> None:
    """Entry point of the ``bitladder`` command."""
    # what is imported and read stays: looking through it again and again, and once more at the end, takes 0.1 s
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    # OpenBLAS' threads, started with numpy, else spin for tens of milliseconds on cores that have other work
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    app()
