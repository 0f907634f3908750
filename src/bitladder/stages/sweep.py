"""A sweep: every job planned, claimed, run and stored, by as many sweeps as share a store.

A job is a run of one model, ladder, workload and bar. Its result lies in the evidence store under a key over all that
it follows from; whoever wants to compute it takes a claim on that key first (`bitladder.store.claims`), looks once more
whether it is there by now, and holds the claim until it is. So sweeps on one store share the work, and one that is
started again goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder import __version__
from bitladder.errors import BitladderError, FetchError, OutputError
from bitladder.files.hashing import file_sha256
from bitladder.files.workloads import STARTER, load_workload
from bitladder.levels import LADDER
from bitladder.progress import Progress, silent
from bitladder.records.reading import from_json
from bitladder.records.run import RunRecord
from bitladder.records.sweep import SweepCost, SweepRecord, SweepRow, SweepState
from bitladder.report import write_html, write_run
from bitladder.stages.job import Say
from bitladder.stages.run_facts import RunSettings
from bitladder.stages.sweep_file import SweepFile
from bitladder.store.claims import LEASE_S
from bitladder.store.evidence import Evidence, canonical
from bitladder.system import lock_alone

if TYPE_CHECKING:
    from bitladder.describe.machine import Machine
    from bitladder.describe.rates import MeasuredMachine
    from bitladder.plan.sweep import Asked

KIND = "sweep"
_ASSUMED_RANGE = 2.5
_CHARACTERS_PER_TOKEN = 4
_LOOK_AGAIN_S = 2.0
"""Until others' jobs are looked at again, when nothing else is left."""
_LOCK = ".bitladder-sweep.lock"

RunJob = Callable[[RunSettings, Progress, Say], RunRecord]
"""Runs a job; its levels, record and report lie in the settings' folder afterwards."""


@dataclass(frozen=True)
class SweepJob:
    """One job."""

    key: dict[str, Any]
    row: SweepRow
    settings: RunSettings


def sweep_jobs(
    sweep: SweepFile,
    out: Path,
    *,
    threads: int,
    device: str,
    on: str = RunSettings.on,
    unit_needs: str = RunSettings.unit_needs,
    progress: Progress = silent,
) -> list[SweepJob]:
    """The jobs of a sweep, those of one model together, so that what the first one builds and measures the others find;
    what the file names twice is one job.

    Raises:
        BadInput: a file cannot be read.
    """
    from bitladder.describe.text import text_hash
    from bitladder.stages.measure import documents

    texts = text_hash(documents(sweep.texts))
    identities = {model: _identity(model, progress) for model in sweep.models}
    workloads = {workload: load_workload(workload) for workload in sweep.workloads}
    made: dict[str, SweepJob] = {}
    for model, ladder, workload, bar in sweep.jobs:
        levels = tuple(level.name for level in ladder or ())
        key = {
            "model": identities[model],
            "levels": list(levels),
            "workload": workloads[workload].hash,
            "bar": bar,
            "ctx": sweep.n_ctx,
            "text": texts,
            "imatrix": sweep.imatrix if sweep.imatrix in ("auto", "none") else file_sha256(Path(sweep.imatrix)),
            "effort": sweep.effort,
            "bitladder": __version__,
        }
        digest = hashlib.sha256(canonical(key).encode()).hexdigest()
        settings = RunSettings(
            model=model, levels=ladder, workload=None if workload == STARTER else Path(workload), bar=bar,
            n_ctx=sweep.n_ctx, texts=sweep.texts, out=out / f"{_slug(model)}-{identities[model][:8]}",
            threads=threads, device=device, on=on, unit_needs=unit_needs, effort=sweep.effort, imatrix=sweep.imatrix,
        )  # fmt: skip
        row = SweepRow(digest, model, levels, workloads[workload].name, bar or "")
        made.setdefault(digest, SweepJob(key, row, settings))
    return list(made.values())


def _identity(model: str, progress: Progress) -> str:
    """What tells a model from another one of the same name: the hash of a file, or of the names, sizes and index of a
    folder; what lies elsewhere is its name, in which a revision may stand.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return file_sha256(path, progress)
    if not path.is_dir():
        return hashlib.sha256(model.encode()).hexdigest()
    hasher = hashlib.sha256()
    for one in sorted(path.iterdir()):
        if one.is_file():
            hasher.update(f"{one.name}\0{one.stat().st_size}\0".encode())
            if one.suffix == ".json":
                hasher.update(file_sha256(one).encode())
    return hasher.hexdigest()


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(text).stem if Path(text).suffix == ".gguf" else text).strip("-.")[-60:]


# What it will take.


def sweep_costs(sweep: SweepFile, jobs: Sequence[SweepJob], stored: set[str]) -> list[SweepCost]:
    """What each job is expected to take, in the order in which they run: a model's levels are built and measured by its
    first job, a workload answered by the first that asks it.

    ``stored``: keys of the jobs whose results are there already; they take nothing.
    """
    from bitladder.files.measured import load_measured
    from bitladder.files.probe import probe_machine
    from bitladder.stages.measure import documents

    machine = probe_machine()
    tokens = sum(len(one.text) for one in documents(sweep.texts)) // _CHARACTERS_PER_TOKEN
    planner = _Planner(sweep, machine, load_measured(machine), tokens)
    return [SweepCost() if job.row.key in stored else planner.cost(job) for job in jobs]


class _Planner:
    """What the jobs before have done already is not counted again."""

    def __init__(self, sweep: SweepFile, machine: Machine, measured: MeasuredMachine | None, tokens: int) -> None:
        self._sweep = sweep
        self._machine = machine
        self._measured = measured
        self._tokens = tokens
        self._built: dict[str, set[str]] = {}
        self._answered: set[tuple[str, str, str]] = set()

    def cost(self, job: SweepJob) -> SweepCost:
        """What it will take; a note instead where the model's headers cannot be read now."""
        from bitladder.files.describe_source import describe
        from bitladder.plan.ladder import make_plan
        from bitladder.plan.sweep import answering_seconds, model_work
        from bitladder.stages.search import machine_rates

        settings = job.settings
        levels = list(settings.levels or LADDER)
        try:
            model = describe(settings.model).model
            plan = make_plan(
                model, self._machine, n_ctx=settings.n_ctx, levels=levels,
                rates=machine_rates(self._machine, self._measured),
            )  # fmt: skip
        except BitladderError as error:
            return SweepCost(note=error.found)
        known = self._built.setdefault(str(settings.out), set())
        fresh = [level for level in levels if level.name not in known]
        known |= {level.name for level in levels}
        parts: list[tuple[str, float]] = []
        disk = 0
        if fresh:
            work = model_work(
                model, plan, fresh, self._machine, tokens=self._tokens, threads=settings.threads,
                effort=settings.effort, flops=self._measured.f32_matmul if self._measured else 0.0,
            )  # fmt: skip
            parts = [(work.build.kind, work.build.seconds), (work.walk.kind, work.walk.seconds)]
            disk = work.build.disk_bytes
        named = (str(settings.out), job.key["workload"], ",".join(job.row.levels))
        if named not in self._answered:
            self._answered.add(named)
            parts.append(("workload", answering_seconds(plan, _asked(settings.workload or STARTER))))
        return self._ranged(parts, disk, fits=any(level.fits for level in plan.levels))

    def _ranged(self, parts: Sequence[tuple[str, float]], disk: int, *, fits: bool) -> SweepCost:
        from bitladder.files.job_log import correction, read_jobs

        jobs = read_jobs(self._machine)
        seconds = low = high = 0.0
        for kind, formula in parts:
            found = correction(jobs, kind, formula) if formula > 0 else None
            expected = formula * (found.factor if found else 1.0)
            spread = (found.spread if found else 0.0) or _ASSUMED_RANGE
            seconds, low, high = seconds + expected, low + expected / spread, high + expected * spread
        price = self._sweep.price
        money = math.nan if price is None else seconds / 3600 * price
        return SweepCost(seconds, low, high, disk, money, "" if fits else "no level fits this machine")


def _asked(workload: str | Path) -> Asked:
    from bitladder.plan.sweep import Asked

    inputs = load_workload(workload).inputs
    prompts = sum(len(message["content"]) for one in inputs for message in one.messages)
    return Asked(prompts // _CHARACTERS_PER_TOKEN, sum(one.max_tokens for one in inputs))


# Running it.


def stored_rows(store: Evidence, jobs: Sequence[SweepJob]) -> dict[str, SweepRow]:
    """Results that are there, by the jobs' keys."""
    found = ((job.row.key, _stored(store, job)) for job in jobs)
    return {key: row for key, row in found if row is not None}


def _stored(store: Evidence, job: SweepJob) -> SweepRow | None:
    """A job's result in the words of this sweep; None where there is none, or what lies there is no such record."""
    value = store.get(KIND, job.key)
    try:
        row = None if value is None else from_json(SweepRow, value)
    except ValueError:
        return None
    if row is None:
        return None
    own = job.row  # another sweep may call the same model and workload otherwise
    return replace(row, key=own.key, model=own.model, workload=own.workload, state=SweepState.STORED)


def run_sweep(
    jobs: Sequence[SweepJob],
    out: Path,
    run: RunJob,
    *,
    progress: Progress = silent,
    say: Say = lambda _: None,
    on_row: Callable[[SweepRow], None] = lambda _: None,
    lease_s: float = LEASE_S,
    store_url: str | None = None,
) -> list[SweepRow]:
    """Run what nobody has run, and wait for what others are running; a row for each job, in the jobs' order.

    A job that fails is told in its row, and the others go on; the same command tries it again.

    Args:
        jobs: from `sweep_jobs`.
        out: the sweep's folder; a job's report lies there under its key.
        run: runs a job.
        progress: told what goes on.
        say: told what a person should know.
        on_row: given each row as soon as it is final.
        lease_s: seconds after which a claim of a process that died is free.
        store_url: where results and claims lie; by default where evidence does.

    Raises:
        OutputError, BadInput: the store or the folder failed; what was finished is stored, and is not done again.
    """
    rows: dict[str, SweepRow] = {}
    with Evidence.open(store_url) as store:
        claims = store.claims(lease_s)
        pending = {job.row.key: job for job in jobs}

        def final(row: SweepRow) -> None:
            rows[row.key] = row
            del pending[row.key]
            on_row(row)

        while pending:
            before = len(pending)
            held = claims.held(pending)
            folders = {job.settings.out for key, job in pending.items() if key in held}
            # Models that nobody works on come first: their levels are not built twice on two machines.
            for key, job in sorted(pending.items(), key=lambda item: item[1].settings.out in folders):
                row = _stored(store, job)
                if row is not None:
                    final(row)
                    continue
                with _folder_alone(job.settings.out) as alone, contextlib.ExitStack() as stack:
                    lease = stack.enter_context(claims.holding(key)) if alone else None
                    if lease is None:
                        continue
                    row = _stored(store, job)  # it may have been stored since
                    if row is None:
                        row = _done(job, out, run, progress, say)
                        if row.state is SweepState.DONE:
                            store.put(KIND, job.key, row)
                    final(row)
            if len(pending) == before:
                say(f"{len(pending)} jobs are with other sweeps.")
                time.sleep(min(_LOOK_AGAIN_S, lease_s / 2))
    return [rows[job.row.key] for job in jobs]


@contextlib.contextmanager
def _folder_alone(folder: Path | None) -> Iterator[bool]:
    """Whether no other sweep on this machine writes into a model's folder; none begins to while the block runs."""
    assert folder is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be written: {error.strerror}.", do="Name another --out.") from None
    with file:
        yield lock_alone(file.fileno())


def _done(job: SweepJob, out: Path, run: RunJob, progress: Progress, say: Say) -> SweepRow:
    """Run a job; its row, with the error of one that failed.

    Raises:
        OutputError: nothing more can be written.
    """
    began = time.monotonic()
    try:
        record = run(job.settings, progress, say)
    except OutputError:
        raise
    except BitladderError as error:
        again = " It is tried again by the same command." if isinstance(error, FetchError) else ""
        return replace(
            job.row, state=SweepState.FAILED, error=f"{error.found}{again}", seconds=time.monotonic() - began
        )
    name = f"{_slug(job.row.model)}-{job.row.key[:10]}"
    write_run(record, out / f"{name}.json")
    report = write_html(record, out / f"{name}.html")
    return _row(job.row, record, report.name, time.monotonic() - began)


def _row(row: SweepRow, record: RunRecord, report: str, seconds: float) -> SweepRow:
    """What a run decided."""
    decision = record.decision
    quality = decision.quality or ""
    file = next((one.bytes for one in record.files if one.level == quality), 0)
    if quality == record.source.level:
        file = record.source.bytes
    result = next((one for one in record.results if one.level == quality), None)
    fidelity = next((one for one in record.fidelities if one.level == quality), None)
    return replace(
        row,
        state=SweepState.DONE,
        bar=decision.bar,
        outcome=decision.outcome,
        quality=quality,
        speed=decision.speed or "",
        summary=decision.summary,
        machine=record.plan.machine,
        file_bytes=file,
        kl=fidelity.kl_mean if fidelity else math.nan,
        passes=f"{result.passes}/{result.inputs}" if result and result.inputs else "",
        decode=result.decode_tokens_per_s if result else math.nan,
        seconds=seconds,
        report=report,
    )


def sweep_record(
    sweep: SweepFile, rows: Sequence[SweepRow], costs: Sequence[SweepCost], warnings: Sequence[str] = ()
) -> SweepRecord:
    """A sweep as far as it has come."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return SweepRecord(__version__, created, sweep.name, tuple(rows), tuple(costs), sweep.currency, tuple(warnings))
