"""Verbs about evidence: run (the whole story), smallest, measure, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bitladder.cli.build import (
    Context,
    EffortName,
    Force,
    Importance,
    Levels,
    Through,
    WorkOptions,
    effort_named,
    split_levels,
    way_named,
)
from bitladder.cli.completion import level_names
from bitladder.cli.grouped import grouped
from bitladder.cli.live import run_display
from bitladder.cli.options import (
    CacheTypesList,
    RunOptions,
    Texts,
    TrustPython,
    WorkloadFile,
    caches_named,
    confirm_with,
    reference_named,
    refuse_elsewhere,
)
from bitladder.cli.terminal import JsonFlag, ModelArgument, print_json, say, verb
from bitladder.errors import BarNotMet, UsageError


@verb
@grouped
def run(options: RunOptions, json_output: JsonFlag = False) -> None:
    """Walk a model down the ladder: plan, build, measure, test, decide, report."""
    from bitladder.pipeline import run as run_pipeline
    from bitladder.records.decision import Outcome
    from bitladder.report import print_run

    with run_display(quiet=json_output) as progress:
        result = run_pipeline(options.settings(), progress, say=say, confirm=confirm_with(yes=options.yes))
    if json_output:
        print_json(result.record)
    else:
        print_run(result.record)
        say(f"\nReport: {result.report}")
    if result.record.decision.outcome != Outcome.MET:
        raise typer.Exit(BarNotMet.exit_code)


@dataclass(kw_only=True)
class SmallestOptions(WorkOptions):
    """What ``smallest`` is asked."""

    model: ModelArgument
    bar: Annotated[str, typer.Option("--bar", help="The loss of passes it may have.")] = (
        "passes >= reference - 5 points"
    )
    levels: Levels = None
    workload: WorkloadFile = None
    ctx: Context = None
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the levels built.", show_default="<name>-ladder")
    ] = None
    imatrix: Importance = "auto"
    trust_python: TrustPython = False


@verb
@grouped
def smallest(options: SmallestOptions, json_output: JsonFlag = False) -> None:
    """The smallest level that holds a bar on passes: builds and asks only as much as that takes.

    Exit 0 when it is found, 4 when no level holds the bar, 5 when the workload has too few inputs to tell.
    """
    from bitladder.plan.gate import search_exit
    from bitladder.report import search_table
    from bitladder.stages.smallest import SmallestRequest, find_smallest

    search = SmallestRequest(
        options.model, options.bar, options.workload, split_levels(options.levels), options.ctx, options.out,
        options.imatrix, options.trust_python,
    )  # fmt: skip
    with options.working(quiet=json_output) as work:
        work.journal.say = say  # what is built is said in any case: this may take hours
        outcome = find_smallest(search, work)
    if json_output:
        print_json(outcome)
    else:
        search_table(outcome, options.bar)
    raise typer.Exit(search_exit(outcome.chosen, decided=outcome.decided))


@dataclass(kw_only=True)
class MeasureOptions(WorkOptions):
    """What ``measure`` is asked."""

    model: ModelArgument
    levels: Levels = None
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", help="An existing GGUF or checkpoint folder to measure, too; repeatable."),
    ] = None
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="LEVEL",
            help="Compare with this level, not with the source.",
            autocompletion=level_names,
        ),
    ] = None
    text: Texts = None
    imatrix: Importance = "auto"
    effort: EffortName = "good"
    through: Through = None
    kv: CacheTypesList = None
    depth: Annotated[
        str | None,
        typer.Option(
            "--depth", metavar="N1,N2", help="Measure in the engine, behind so many tokens of context.",
            show_default="with --kv 512,4096",
        ),
    ] = None  # fmt: skip


@verb
@grouped
def measure(options: MeasureOptions, json_output: JsonFlag = False) -> None:
    """KL divergence, perplexity and top-1 agreement of levels and files against MODEL, in one streaming pass."""
    from bitladder.report import fidelity_table
    from bitladder.stages.measure import Measuring, measure_model

    wanted = Measuring(
        levels=split_levels(options.levels),
        reference=refuse_elsewhere(reference_named(options.reference)),
        files=tuple(options.file or ()),
        texts=tuple(options.text or ()),
        imatrix=options.imatrix,
        effort=effort_named(options.effort),
        through=way_named(options.through),
        caches=caches_named(options.kv),
        depths=_depths_named(options.depth),
    )
    with options.working(quiet=json_output) as work:
        fidelities = measure_model(options.model, wanted, work)
    if json_output:
        print_json({"levels": fidelities, "jobs": work.journal.jobs, "warnings": work.journal.warnings})
    else:
        fidelity_table(fidelities)


def _depths_named(text: str | None) -> tuple[int, ...]:
    """``"512,4k"`` as tokens; raises UsageError for what is no number."""
    found = []
    for part in (text or "").lower().split(","):
        digits, thousand = part.strip().removesuffix("k"), part.strip().endswith("k")
        if not digits and text is None:
            continue
        if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
            raise UsageError(f"'{part.strip()[:40]}' is no depth in tokens.", do="Write --depth 512,4096.")
        found.append(int(digits) * (1024 if thousand else 1))
    return tuple(found)


@verb
def report(
    record: Annotated[Path, typer.Argument(metavar="RUN.json", help="The JSON that `run` left beside its report.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the HTML.", show_default="beside the JSON")
    ] = None,
    force: Force = False,
    json_output: JsonFlag = False,
) -> None:
    """Show a finished run again, and write its HTML report."""
    from bitladder.report import check_html, print_run, read_run, report_beside, write_html

    stored = read_run(record)
    path = out or report_beside(record)
    check_html(path, source_sha256=lambda: stored.source.sha256, created=stored.created, inputs=[record], force=force)
    write_html(stored, path)
    if json_output:
        print_json(stored)
    else:
        print_run(stored)
        say(f"\nReport: {path}")


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    for function in (run, smallest, measure, report):
        app.command()(function)
