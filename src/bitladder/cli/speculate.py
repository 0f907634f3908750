"""The verb about speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from bitladder.cli.build import ALL_CORES, Context, Threads, working
from bitladder.cli.grouped import grouped
from bitladder.cli.options import WorkloadFile
from bitladder.cli.terminal import JsonFlag, ModelArgument, print_json, say, verb


@dataclass(kw_only=True)
class SpeculateOptions:
    """What ``speculate`` is asked."""

    model: ModelArgument
    level: Annotated[
        str | None, typer.Option("--level", metavar="LEVEL", help="The level to speed up, instead of MODEL itself.")
    ] = None
    draft: Annotated[
        list[str] | None,
        typer.Option("--draft", metavar="LEVEL|FILE", help="Also guess with this smaller model; repeatable."),
    ] = None
    workload: WorkloadFile = None
    ctx: Context = None
    threads: Threads = ALL_CORES


@verb
@grouped
def speculate(options: SpeculateOptions, json_output: JsonFlag = False) -> None:
    """How much faster guessing tokens ahead makes your inputs, by tag, and whether answers stay the same.

    Guesses come from n-grams of the text so far, and from each --draft. `serve --speculate auto` takes what pays.
    """
    from bitladder.report.speculation import speculation_table
    from bitladder.stages.speculate import SpeculateRequest, try_speculation

    request = SpeculateRequest(options.model, options.level, options.workload, tuple(options.draft or ()), options.ctx)
    with working(options.threads, quiet=json_output) as work:
        report = try_speculation(request, work)
    for warning in report.warnings:
        say(f"! {warning}")
    if json_output:
        print_json(report)
    else:
        speculation_table(report)


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    app.command()(speculate)
