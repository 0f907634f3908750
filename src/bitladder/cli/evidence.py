"""Verbs about evidence: a gate for continuous integration, workload files, the store, the page of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitladder.cli.build import ALL_CORES, DEFAULT_CTX, Context, Importance, Threads, split_levels
from bitladder.cli.judge import Bar, JudgeKey, JudgeModel, JudgeUrl, Texts, TrustPython, WorkloadFile, judge_named
from bitladder.cli.terminal import JsonFlag, ModelArgument, print_json, progress_display, say, verb

workload_app = typer.Typer(name="workload", help="Your inputs and criteria: start, check or import a file.")
evidence_app = typer.Typer(name="evidence", help="Stored measurements: count, export, import.")


@verb
def gate(
    model: ModelArgument,
    levels: Annotated[str, typer.Option("--levels", metavar="L1,L2", help="Every one of these must hold the bar.")],
    bar: Bar = None,
    workload: WorkloadFile = None,
    ctx: Context = DEFAULT_CTX,
    text: Texts = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the files and the report.")] = None,
    imatrix: Importance = "auto",
    junit: Annotated[Path | None, typer.Option("--junit", help="Write the verdicts as JUnit XML.")] = None,
    threads: Threads = ALL_CORES,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = "",
    judge_key_env: JudgeKey = "",
    trust_python: TrustPython = False,
    json_output: JsonFlag = False,
) -> None:
    """Exit 0 when every level holds the bar, 4 when one does not, 5 when the evidence cannot tell."""
    from bitladder.files.atomic import write_whole
    from bitladder.pipeline import RunSettings
    from bitladder.pipeline import run as run_pipeline
    from bitladder.plan.gate import gate_exit
    from bitladder.plan.gate import junit as junit_of

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
        record = run_pipeline(settings, progress, say=say).record
    if junit:
        write_whole(junit, junit_of(record.decision, model=record.source.name))
    if json_output:
        print_json(record.decision)
    else:
        for verdict in record.decision.verdicts:
            print(f"{verdict.level}: {verdict.status}. {verdict.reason}")
    raise typer.Exit(gate_exit(record.decision))


@workload_app.command("new")
@verb
def workload_new(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")] = Path("workload.yaml"),
) -> None:
    """Write a commented template to fill in."""
    from bitladder.files.workloads import new_workload

    new_workload(path)
    say(f"Wrote {path}. Fill it in, then: bitladder workload check {path}")


@workload_app.command("check")
@verb
def workload_check(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A workload, YAML or JSON lines.")],
    json_output: JsonFlag = False,
) -> None:
    """Read a workload and say what is wrong with it, with the line, or what it holds and can show."""
    from bitladder.files.workloads import load_workload
    from bitladder.stats.power import smallest_visible_loss

    found = load_workload(path)
    visible = smallest_visible_loss(len(found.inputs))
    if json_output:
        print_json({"workload": found, "sha256": found.hash, "smallest_visible_loss": visible})
        return
    print(f"{found.name}: {len(found.inputs)} inputs, tags: {', '.join(found.tags) or 'none'}")
    print(f"A drop of fewer than {100 * visible:.0f} points of the pass rate cannot be seen with so many inputs.")
    for warning in found.warnings:
        say(f"! {warning}")


@workload_app.command("import")
@verb
def workload_import(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A promptfoo configuration (.yaml) or a .csv file.")],
    out: Annotated[Path, typer.Option("--out", help="The workload to write.")] = Path("workload.yaml"),
) -> None:
    """Make a workload of a promptfoo configuration or of a CSV file."""
    from bitladder.files.atomic import write_whole
    from bitladder.files.workloads import from_csv, from_promptfoo, load_workload

    text = from_csv(source) if source.suffix.lower() == ".csv" else from_promptfoo(source)
    write_whole(out, text)
    say(f"Wrote {out} with {len(load_workload(out).inputs)} inputs.")


@evidence_app.command("show")
@verb
def evidence_show(json_output: JsonFlag = False) -> None:
    """Where measurements are stored, and how many there are."""
    from bitladder.store.connect import shown
    from bitladder.store.evidence import Evidence

    with Evidence.open() as store:
        counts = store.count()
        if json_output:
            print_json({"store": shown(store.url), "counts": counts})
        else:
            print(shown(store.url))
            for kind, count in counts.items():
                print(f"  {kind:<10} {count}")


@evidence_app.command("export")
@verb
def evidence_export(path: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines to write.")]) -> None:
    """Write every stored measurement as JSON lines."""
    from bitladder.store.evidence import Evidence

    with Evidence.open() as store:
        say(f"Wrote {store.export(path)} measurements to {path}.")


@evidence_app.command("import")
@verb
def evidence_import(path: Annotated[Path, typer.Argument(metavar="FILE", help="An export to take in.")]) -> None:
    """Take in an export; of two measurements of the same thing the newer stays."""
    from bitladder.store.evidence import Evidence

    with Evidence.open() as store:
        say(f"Read {store.import_(path)} measurements from {path}.")


@verb
def page(
    record: Annotated[Path, typer.Argument(metavar="RUN.json", help="The JSON that `run` left beside its report.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes any free one.")] = 0,
) -> None:
    """Look at a finished run in the browser: the ladder, every number, and what-if sliders."""
    from bitladder.serve.page_app import serve_page

    serve_page(record, port=port, on_ready=lambda address: say(f"The page is at {address} (Ctrl-C ends it)."))


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    for function in (gate, page):
        app.command()(function)
    app.add_typer(workload_app)
    app.add_typer(evidence_app)
