"""Verbs about evidence: a gate for continuous integration, workload files, the store, the page of a finished run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import typer

from bitladder.cli.build import Force
from bitladder.cli.grouped import grouped
from bitladder.cli.options import RunOptions, confirm_with
from bitladder.cli.terminal import JsonFlag, Verbs, print_json, progress_display, put, put_json, say, verb
from bitladder.errors import UsageError

workload_app = typer.Typer(name="workload", cls=Verbs, help="Your inputs and criteria: start, check or import a file.")
evidence_app = typer.Typer(name="evidence", cls=Verbs, help="Stored measurements: count, export, import.")


@verb
@grouped
def gate(
    options: RunOptions,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write the verdicts as JUnit XML.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Exit 0 when every level named holds the bar, 4 when one does not, 5 when the evidence cannot tell."""
    from bitladder.files.atomic import write_whole
    from bitladder.files.outputs import check_output, holding
    from bitladder.pipeline import assess
    from bitladder.plan.gate import gate_exit
    from bitladder.plan.gate import junit as junit_of
    from bitladder.records import to_json
    from bitladder.report.behaviour import behaviour_lines
    from bitladder.report.tables import table_notes
    from bitladder.report.wording import answers_rows

    if not options.levels and not options.also:
        raise UsageError("The gate needs to know what must hold the bar.", do="Name levels with --levels Q6_K,Q4_K_M.")
    settings = dataclasses.replace(options, levels=options.levels or "").settings()
    if junit:
        inputs = [Path(settings.model), *settings.texts, *([settings.workload] if settings.workload else [])]
        check_output(junit, "a JUnit document", inputs=inputs, ours=holding("<testsuite", "bitladder"))
    with progress_display(quiet=json_output) as progress:
        record = assess(settings, progress, say=say, confirm=confirm_with(yes=options.yes))
    notes = {row.level: row.notes for row in answers_rows(record) if row.notes}
    behaviour, deployed = behaviour_lines(record), table_notes(record)
    if junit:
        parts = (notes, behaviour, deployed)
        told = {
            level: "; ".join(filter(None, (one.get(level) for one in parts))) for level in notes | behaviour | deployed
        }
        write_whole(junit, junit_of(record.decision, model=record.source.name, notes=told))
    if json_output:
        faults = {result.level: to_json(result.faults) for result in record.results if result.faults}
        depths = {one.level: to_json(one.depths) for one in record.fidelities if one.depths}
        thinking = {one.level: to_json(one.thinking) for one in record.results if one.thinking}
        found = {"faults": faults, "depths": depths, "thinking": thinking, "speculation": to_json(record.speculation)}
        found = {"wording": to_json(record.wording), **{name: one for name, one in found.items() if one}}
        print_json({**to_json(record.decision), **found})
    else:
        for verdict in record.decision.verdicts:
            put(f"{verdict.level}: {verdict.status}. {verdict.reason}")
            if verdict.level in notes:
                put(f"  answers: {notes[verdict.level]}")
            if verdict.level in behaviour:
                put(f"  behaviour: {behaviour[verdict.level]}")
            if verdict.level in deployed:
                put(f"  deployed: {deployed[verdict.level]}")
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
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A workload: YAML, JSON or JSON lines.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="A model here: whether it can be told of the tools, and how it samples."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Read a workload and say all that is wrong with it, with the lines, or what it holds and can show."""
    from bitladder.files.workloads import load_workload
    from bitladder.stages.as_deployed import for_model
    from bitladder.stats.power import smallest_visible_loss

    found = load_workload(path)
    if model is not None:
        found = for_model(found, model)
    visible = smallest_visible_loss(len(found.inputs))
    if json_output:
        print_json({"workload": found, "sha256": found.hash, "smallest_visible_loss": visible})
        return
    put(f"{found.name}: {len(found.inputs)} inputs, tags: {', '.join(found.tags) or 'none'}")
    if math.isnan(visible):
        put("So few inputs can show no drop of the pass rate, however large: 20 to 30 are a beginning.")
    else:
        put(f"A drop of fewer than {100 * visible:.0f} points of the pass rate cannot be seen with so many inputs.")
    for warning in found.warnings:
        say(f"! {warning}")


@workload_app.command("import")
@verb
def workload_import(
    source: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A promptfoo configuration, a .csv file, JSON (lines), lm-eval's samples."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The workload to write.")] = Path("workload.yaml"),
    force: Force = False,
) -> None:
    """Make a workload of another tool's file: what has no counterpart is refused, what is not quite the same listed."""
    from bitladder.files.atomic import write_whole
    from bitladder.files.outputs import check_output, same_text
    from bitladder.files.workloads import import_workload, load_workload

    text, remarks = import_workload(source)
    check_output(out, "a workload", inputs=[source], ours=same_text(text), force=force)
    write_whole(out, text)
    for remark in remarks:
        say(f"! {remark}")
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
            put(shown(store.url))
            for kind, count in counts.items():
                put(f"  {kind:<10} {count}")


@evidence_app.command("export")
@verb
def evidence_export(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines to write; - for standard output.")],
    force: Force = False,
) -> None:
    """Write every stored measurement as JSON lines."""
    from bitladder.files.outputs import check_output
    from bitladder.store.evidence import Evidence

    with Evidence.open() as store:
        if str(path) in ("-", "/dev/stdout"):
            for line in store.lines():
                put_json(line)
            return
        check_output(path, "an export of evidence", inputs=store.files(), ours=store.holds, force=force)
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
