"""The whole story in order: find the model, see the machine, plan, quantize, walk, run the workload, decide, report.

Nothing clever lives here. Each stage is a function from values to a record; this file fetches what is stored already,
calls the stage for the rest, stores what it finds, and hands the record on. A run that was killed goes on from the
last thing it stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder import __version__
from bitladder.errors import NothingFits, UnknownArchitecture
from bitladder.progress import Progress
from bitladder.records import to_json
from bitladder.records.fidelity import Fidelity
from bitladder.records.plan import Plan
from bitladder.records.run import RunRecord
from bitladder.steps.calibrated import AUTO, importance_of
from bitladder.steps.help import criteria_help
from bitladder.steps.journal import Journal, Say
from bitladder.steps.measured import answers, documents, fidelities
from bitladder.units import human_bytes

if TYPE_CHECKING:
    from bitladder.describe.criteria import Context
    from bitladder.describe.machine import Machine
    from bitladder.describe.text import Document
    from bitladder.describe.workload import Workload
    from bitladder.engines.endpoint import EndpointSettings
    from bitladder.files.gguf import GgufFile
    from bitladder.kernels import Effort
    from bitladder.records.evaluation import LevelAnswers
    from bitladder.records.level_file import LevelFile
    from bitladder.stages.walk import Candidate
    from bitladder.steps.calibrated import Importance
    from bitladder.store.recorded import Recorded, Subject


@dataclass(frozen=True)
class RunSettings:
    """What a user can ask of a run; everything else is derived."""

    model: str
    levels: tuple[str, ...] | None = None
    workload: Path | None = None
    bar: str | None = None
    n_ctx: int = 4096
    texts: tuple[Path, ...] = ()
    out: Path | None = None
    threads: int = 2
    effort: Effort = "good"
    imatrix: str = AUTO
    """A file, ``auto`` (made from the calibration text that ships) or ``none``."""
    judge: EndpointSettings | None = None
    """The judge model, for workloads that ask one."""
    trust_python: bool = False
    """Whether functions that the workload names may run."""


@dataclass(frozen=True)
class RunResult:
    """The record of a run and where its report lies."""

    record: RunRecord
    report: Path


def run(settings: RunSettings, progress: Progress, *, say: Say = lambda _: None) -> RunResult:
    """Walk a model down the ladder and decide.

    Raises:
        NothingFits: no level fits this machine at the context.
        BitladderError: anything else a user can meet; what was finished is stored and is not done again.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.probe import probe_machine
    from bitladder.files.sources import resolve
    from bitladder.files.workloads import STARTER, load_workload
    from bitladder.plan.bar import parse_bar
    from bitladder.plan.decide import decide
    from bitladder.report import write_html, write_run
    from bitladder.stages import facts
    from bitladder.stages.evaluate import compare
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    bar = parse_bar(settings.bar) if settings.bar else None  # a bad bar is told before any work is done
    workload = load_workload(settings.workload or STARTER)
    texts = documents(settings.texts)
    journal = Journal(say)

    with ExitStack() as stack:
        helpers = criteria_help(
            workload, (settings.workload or Path()).parent, judge=settings.judge, trust_python=settings.trust_python
        )
        context = stack.enter_context(helpers)
        with journal.timed("fetch"):
            found = resolve(settings.model, progress)
            source = stack.enter_context(GgufFile.open(found.path))
        journal.warn(*found.warnings, *workload.warnings)
        out = settings.out or Path(f"{found.label}-ladder")
        machine = probe_machine(out)
        recorded = Recorded(stack.enter_context(Evidence.open()))

        plan = _fitting(source, machine, settings)
        with journal.timed("calibrate"):
            importance = _importance(source, texts, settings, journal, progress)
        with journal.timed("quantize"):
            built = _built(source, plan, importance, out, settings, journal, progress)
        with journal.timed("walk"):
            fidelities = _measured(source, built, texts, recorded, settings, journal, progress)
        with journal.timed("workload"):
            reference, *levels = _asked(source, built, workload, recorded, settings, journal, progress, context)
        results = [compare(reference, level, workload) for level in levels]

        decision = decide(
            plan,
            fidelities,
            results,
            bar=bar,
            reference=facts.level_of(source.model),
            tags={one.id: one.tags for one in workload.inputs},
        )
        recorded.keep_decision(source.sha256, decision.bar, decision, out / "run.json")
        record = RunRecord(
            bitladder=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            source=facts.source_facts(source, found, settings.model),
            machine=to_json(machine),
            plan=plan,
            decision=decision,
            files=tuple(facts.file_facts(file) for file in built.values()),
            fidelities=tuple(fidelities),
            results=tuple(results),
            inputs=facts.input_facts(workload),
            answers=facts.shown_answers((reference, *levels), decision),
            settings=facts.settings_facts(settings, texts, workload),
            versions=facts.versions(),
            commands=facts.commands(settings, out),
            timings=journal.timings,
            reused=tuple(journal.reused),
            warnings=tuple(journal.warnings),
        )
    write_run(record, out / "run.json")
    return RunResult(record, write_html(record, out / "report.html"))


def _fitting(source: GgufFile, machine: Machine, settings: RunSettings) -> Plan:
    """The plan, when at least one level fits."""
    from bitladder.formats.recipes import LEVELS
    from bitladder.stages.plan import make_plan

    plan = make_plan(source.model, machine, n_ctx=settings.n_ctx, levels=settings.levels or LEVELS)
    if not any(level.fits for level in plan.levels):
        smallest = plan.levels[-1]
        raise NothingFits(
            f"No level of {plan.model} fits this machine at a context of {plan.n_ctx} tokens: "
            f"{smallest.level}, the smallest, needs {human_bytes(smallest.total_bytes)} "
            f"of {human_bytes(plan.budget_bytes)}.",
            means=smallest.reason,
            do="Close other programs, ask for a shorter context with --ctx, or choose a smaller model.",
        )
    return plan


def _importance(
    source: GgufFile, texts: Sequence[Document], settings: RunSettings, journal: Journal, progress: Progress
) -> Importance | None:
    """What the layers' inputs look like, for the search of scales; none, with a warning, for an unknown family."""
    try:
        return importance_of(source, settings.imatrix, measured_on=texts, threads=settings.threads, progress=progress)
    except UnknownArchitecture as error:
        journal.warn(f"Levels are made without an importance matrix: {error.found}")
        return None


def _built(
    source: GgufFile,
    plan: Plan,
    importance: Importance | None,
    out: Path,
    settings: RunSettings,
    journal: Journal,
    progress: Progress,
) -> dict[Subject, LevelFile]:
    """A file for each level that fits; the source itself is the file of its own level."""
    from bitladder.stages.facts import level_of
    from bitladder.stages.quantize import method_name, quantize_levels
    from bitladder.store.recorded import Subject

    own = level_of(source.model)
    levels = [level.level for level in plan.levels if level.fits and level.level != own]
    files = quantize_levels(
        source,
        levels,
        out,
        importance=importance,
        effort=settings.effort,
        threads=settings.threads,
        progress=progress,
    )
    journal.reuse("files", [file.level for file in files if file.reused])
    method = method_name(settings.effort, importance)
    return {Subject(source.sha256, file.level, made=method): file for file in files}


def _measured(
    source: GgufFile,
    built: Mapping[Subject, LevelFile],
    texts: Sequence[Document],
    recorded: Recorded,
    settings: RunSettings,
    journal: Journal,
    progress: Progress,
) -> list[Fidelity]:
    """Fidelity of the files that were written; none, and a warning, for a family that the walk does not know."""
    from bitladder.files.gguf import GgufFile
    from bitladder.stages.walk import file_candidate

    with ExitStack() as stack:

        def candidates(missing: Sequence[Subject]) -> list[Candidate]:
            opened = [stack.enter_context(GgufFile.open(built[subject].path)) for subject in missing]
            return [
                file_candidate(source, file, level=subject.level) for subject, file in zip(missing, opened, strict=True)
            ]

        try:
            return fidelities(
                source, list(built), candidates, texts, recorded, journal, threads=settings.threads, progress=progress
            )
        except UnknownArchitecture as error:
            journal.warn(
                f"No fidelity was measured: {error.found} {error.means} The decision rests on the workload alone."
            )
            return []


def _asked(
    source: GgufFile,
    built: Mapping[Subject, LevelFile],
    workload: Workload,
    recorded: Recorded,
    settings: RunSettings,
    journal: Journal,
    progress: Progress,
    context: Context,
) -> list[LevelAnswers]:
    """The workload through the real engine: the source first, then every level."""
    from bitladder.stages.evaluate import judge_answers, level_answers
    from bitladder.stages.facts import level_of
    from bitladder.store.recorded import Subject

    reference = Subject(source.sha256, level_of(source.model), file=source.sha256)
    paths = {reference: source.path, **{subject: file.path for subject, file in built.items()}}
    asked: list[LevelAnswers] = []
    reused = []
    for number, (subject, path) in enumerate(paths.items()):
        progress(f"workload: {subject.level}", number, len(paths))
        replies, speed, stored = answers(
            subject, path, workload, recorded, n_ctx=settings.n_ctx, threads=settings.threads
        )
        said = judge_answers(workload, replies, reference=asked[0].answers if asked else None, context=context)
        asked.append(level_answers(subject.level, said, speed))
        reused += [subject.level] if stored else []
    progress("workload", len(paths), len(paths))
    journal.reuse("answers and speed", reused)
    return asked
