"""The verb that runs many runs: sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitladder.cli.build import WorkOptions, known_device
from bitladder.cli.grouped import grouped
from bitladder.cli.live import run_display
from bitladder.cli.terminal import JsonFlag, print_json, say, verb

if TYPE_CHECKING:
    from bitladder.progress import Progress
    from bitladder.stages.job import Say
    from bitladder.stages.run_facts import RunSettings


@dataclass(kw_only=True)
class SweepOptions(WorkOptions):
    """What ``sweep`` is asked."""

    jobs: Annotated[
        Path,
        typer.Argument(metavar="JOBS.yaml", help="Models, levels, workloads and bars; every combination is a job."),
    ]
    plan: Annotated[bool, typer.Option("--plan", help="Only show what it will take: hours, disk, money.")] = False
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for levels and reports.", show_default="<name>-sweep")
    ] = None
    lease: Annotated[
        float, typer.Option("--lease", min=1.0, help="Seconds after which jobs of a sweep that died are free.")
    ] = 60.0


@verb
@grouped
def sweep(options: SweepOptions, json_output: JsonFlag = False) -> None:
    """Run many models down the ladder: plans all, resumes, shares work with other sweeps on the same evidence store.

    A job that fails is told, and the others go on; the exit code is then 1.
    """
    from bitladder.pipeline import run
    from bitladder.records.run import RunRecord
    from bitladder.records.sweep import SweepRow, SweepState
    from bitladder.report.sweep import (
        check_sweep,
        plan_sentence,
        print_sweep,
        print_sweep_plan,
        sweep_line,
        write_sweep,
    )
    from bitladder.stages.sweep import run_sweep, stored_rows, sweep_costs, sweep_jobs, sweep_record
    from bitladder.stages.sweep_file import read_sweep
    from bitladder.store import Evidence

    wanted = read_sweep(options.jobs)
    out = options.out or Path(f"{wanted.name}-sweep")
    check_sweep(out)
    jobs = sweep_jobs(
        wanted, out, threads=options.threads, device=known_device(options.device, options.on), on=options.on,
        unit_needs=options.unit_needs,
    )  # fmt: skip
    with Evidence.open() as store:
        known = stored_rows(store, jobs)
    rows = {job.row.key: known.get(job.row.key, job.row) for job in jobs}
    costs = sweep_costs(wanted, jobs, set(known))
    planned = sweep_record(wanted, list(rows.values()), costs)
    if options.plan:
        if json_output:
            print_json(planned)
        else:
            print_sweep_plan(planned)
        return
    say(plan_sentence(planned))

    def ended(row: SweepRow) -> None:
        rows[row.key] = row
        write_sweep(sweep_record(wanted, list(rows.values()), costs), out)
        say(sweep_line(row))

    def one(settings: RunSettings, progress: Progress, told: Say) -> RunRecord:
        return run(settings, progress, say=told).record

    with run_display(quiet=json_output) as progress:
        final = run_sweep(jobs, out, one, progress=progress, say=say, on_row=ended, lease_s=options.lease)
    made = sweep_record(wanted, final, costs)
    report = write_sweep(made, out)
    if json_output:
        print_json(made)
    else:
        print_sweep(final)
        say(f"\nReport: {report}")
    if any(row.state is SweepState.FAILED for row in final):
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Register this module's verb."""
    app.command()(sweep)
