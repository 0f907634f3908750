"""Verbs about evidence: run (the whole story), measure, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitladder.cli.build import ALL_CORES, DEFAULT_CTX, Context, Importance, Levels, Threads, effort_named, split_levels
from bitladder.cli.terminal import JsonFlag, ModelArgument, print_json, progress_display, say, verb
from bitladder.errors import BarNotMet

if TYPE_CHECKING:
    from bitladder.engines.endpoint import EndpointSettings

Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Measure on this text instead of the shipped one; repeat it for several documents."),
]

WorkloadFile = Annotated[Path | None, typer.Option("--workload", help="Your inputs and criteria (YAML or JSON lines).")]
Bar = Annotated[str | None, typer.Option("--bar", help="The quality a level must hold, like 'kl < 0.05'.")]

JudgeUrl = Annotated[
    str | None, typer.Option("--judge", metavar="URL", help="OpenAI-compatible endpoint of a judge model.")
]
JudgeModel = Annotated[str, typer.Option("--judge-model", help="The judge, as its endpoint names it.")]
JudgeKey = Annotated[str, typer.Option("--judge-key-env", help="Environment variable with the endpoint's key.")]
TrustPython = Annotated[
    bool, typer.Option("--trust-python", help="Let functions that the workload names run. They can do anything.")
]


def judge_named(url: str | None, model: str, key_env: str) -> EndpointSettings | None:
    """The judge's endpoint; None when no judge was asked for."""
    from bitladder.engines.endpoint import EndpointSettings

    return EndpointSettings(url, model=model, key_env=key_env) if url else None


@verb
def run(
    model: ModelArgument,
    levels: Levels = None,
    workload: WorkloadFile = None,
    bar: Bar = None,
    ctx: Context = DEFAULT_CTX,
    text: Texts = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the files and the report.", show_default="<name>-ladder"),
    ] = None,
    imatrix: Importance = "auto",
    threads: Threads = ALL_CORES,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = "",
    judge_key_env: JudgeKey = "",
    trust_python: TrustPython = False,
    json_output: JsonFlag = False,
) -> None:
    """Walk a model down the ladder: plan, build, measure, test, decide, report."""
    from bitladder.pipeline import RunSettings
    from bitladder.pipeline import run as run_pipeline
    from bitladder.report import print_run

    settings = RunSettings(
        model=model,
        levels=split_levels(levels),
        workload=workload,
        bar=bar,
        n_ctx=ctx,
        texts=tuple(text or ()),
        out=out,
        threads=threads,
        imatrix=imatrix,
        judge=judge_named(judge, judge_model, judge_key_env),
        trust_python=trust_python,
    )
    with progress_display(quiet=json_output) as progress:
        result = run_pipeline(settings, progress, say=say)
    if json_output:
        print_json(result.record)
    else:
        print_run(result.record)
        say(f"\nReport: {result.report}")
    if result.record.decision.outcome != "met":
        raise typer.Exit(BarNotMet.exit_code)


@verb
def measure(
    model: ModelArgument,
    levels: Levels = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", help="An existing GGUF to measure beside the levels; repeatable."),
    ] = None,
    text: Texts = None,
    imatrix: Importance = "none",
    effort: Annotated[str, typer.Option("--effort", help="fast, good or best.")] = "good",
    threads: Threads = ALL_CORES,
    json_output: JsonFlag = False,
) -> None:
    """KL divergence, perplexity and top-1 agreement of levels and files against MODEL, in one streaming pass."""
    from bitladder.report import fidelity_table
    from bitladder.steps.measured import measure_model

    with progress_display(quiet=json_output) as progress:
        wanted = split_levels(levels)
        fidelities = measure_model(
            model,
            wanted,
            files=tuple(file or ()),
            texts=tuple(text or ()),
            imatrix=imatrix,
            effort=effort_named(effort),
            threads=threads,
            progress=progress,
        )
    if json_output:
        print_json({"levels": fidelities})
    else:
        fidelity_table(fidelities)


@verb
def report(
    record: Annotated[Path, typer.Argument(metavar="RUN.json", help="The JSON that `run` left beside its report.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the HTML.", show_default="beside the JSON")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Show a finished run again, and write its HTML report."""
    from bitladder.report import print_run, read_run, write_html

    stored = read_run(record)
    path = write_html(stored, out or record.with_suffix(".html"))
    if json_output:
        print_json(stored)
    else:
        print_run(stored)
        say(f"\nReport: {path}")


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    for function in (run, measure, report):
        app.command()(function)
