"""The whole story in order: find the model, see the machine, plan, quantize, walk, run the workload, decide, report.

Nothing clever lives here. Each stage is a function from values to a record; this file fetches what is stored already,
calls the stage for the rest, stores what it finds, and hands the record on. A run that was killed goes on from the
last thing it stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder import __version__
from bitladder.errors import NothingFits, UnknownArchitecture
from bitladder.progress import LevelNews, Progress, tell
from bitladder.records import to_json
from bitladder.records.fidelity import Fidelity
from bitladder.records.plan import Plan
from bitladder.records.run import RunRecord
from bitladder.steps.asked import Asker, LevelToAsk
from bitladder.steps.calibrated import AUTO, importance_of
from bitladder.steps.help import criteria_help
from bitladder.steps.jobs import building_need, job
from bitladder.steps.journal import Journal, Say
from bitladder.steps.measured import documents, fidelities, of_itself
from bitladder.steps.remote import agree_to_spend
from bitladder.units import human_bytes

if TYPE_CHECKING:
    from bitladder.describe.machine import Machine
    from bitladder.describe.text import Document
    from bitladder.engines.endpoint import EndpointSettings
    from bitladder.files.gguf import GgufFile
    from bitladder.kernels import Effort
    from bitladder.plan.bar import Bar
    from bitladder.records.level_file import LevelFile
    from bitladder.stages.walk import Candidate
    from bitladder.steps.asked import Contender
    from bitladder.steps.calibrated import Importance
    from bitladder.steps.remote import Confirm
    from bitladder.store.recorded import Recorded, Subject


@dataclass(frozen=True)
class RunSettings:
    """What a user can ask of a run; everything else is derived."""

    model: str
    levels: tuple[str, ...] | None = None
    reference: str | Path | EndpointSettings | None = None
    """A level, a file of stored answers, or a model behind an address; None for the source itself."""
    also: tuple[EndpointSettings, ...] = ()
    """Models behind addresses that are tested beside the levels."""
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


def run(
    settings: RunSettings,
    progress: Progress,
    *,
    say: Say = lambda _: None,
    confirm: Confirm = lambda _: False,
) -> RunResult:
    """Walk a model down the ladder and decide.

    ``confirm`` is shown what endpoints will cost before any is asked, if they cost anything.

    Raises:
        UsageError: nobody agreed to the cost.
        NothingFits: no level fits this machine at the context.
        BitladderError: anything else a user can meet; what was finished is stored and is not done again.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.probe import probe_machine
    from bitladder.files.sources import resolve
    from bitladder.files.workloads import STARTER, load_workload
    from bitladder.formats.recipes import LEVELS
    from bitladder.plan.decide import decide
    from bitladder.plan.preflight import require
    from bitladder.report import write_html, write_run
    from bitladder.stages import facts
    from bitladder.stages.evaluate import compare
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    bar = _told_early(settings)
    workload = load_workload(settings.workload or STARTER)
    texts = documents(settings.texts)
    journal = Journal(say)

    with ExitStack() as stack:
        recorded = Recorded(stack.enter_context(Evidence.open()))
        judged = 1 + len(LEVELS if settings.levels is None else settings.levels) + len(settings.also)
        agree_to_spend(_endpoints(settings), workload, recorded, confirm, judge=settings.judge, judged=judged)
        helpers = criteria_help(
            workload,
            (settings.workload or Path()).parent,
            judge=settings.judge,
            trust_python=settings.trust_python,
            recorded=recorded,
            journal=journal,
        )
        context = stack.enter_context(helpers)
        with journal.timed("fetch"):
            found = resolve(settings.model, progress)
            source = stack.enter_context(GgufFile.open(found.path))
        journal.warn(*found.warnings, *workload.warnings)
        out = settings.out or Path(f"{found.label}-ladder")
        machine = probe_machine(out)

        plan = _fitting(source, machine, settings)
        for level in plan.levels:
            tell(progress, LevelNews(level.level, "fits" if level.fits else "does not fit"))
        wanted = _levels_to_build(source, plan, settings)
        require(building_need(source, wanted, out, effort=settings.effort, threads=settings.threads), machine)
        with journal.timed("calibrate"):
            importance = _importance(source, texts, settings, journal, progress)
        with journal.timed("quantize"):
            built = _built(source, plan, importance, out, settings, journal, progress)
        with journal.timed("walk"):
            fidelities = _measured(source, built, texts, recorded, settings, journal, progress)
        asker = Asker(workload, context, recorded, journal, settings.n_ctx, settings.threads, progress)
        with journal.timed("workload"):
            reference, *levels = asker.ask_all(_contenders(source, plan, built, settings))
        results = [compare(reference, level, workload) for level in levels]

        decision = decide(
            plan,
            [*_known_of_source(source, plan, fidelities, settings), *fidelities],
            results,
            bar=bar,
            reference=reference.level,
            elsewhere=[one.label for one in settings.also if any(level.level == one.label for level in levels)],
            tags={one.id: one.tags for one in workload.inputs},
        )
        recorded.keep_decision(source.sha256, decision.bar, decision, out / "run.json")
        record = RunRecord(
            bitladder=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            source=facts.source_facts(source, found, settings.model),
            reference=reference.level,
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
            jobs=tuple(journal.jobs),
            reused=tuple(journal.reused),
            warnings=tuple(journal.warnings),
        )
    write_run(record, out / "run.json")
    return RunResult(record, write_html(record, out / "report.html"))


def _told_early(settings: RunSettings) -> Bar | None:
    """The bar; a bad one, and options that a level would not heed, are told before any work is done."""
    from bitladder.formats.fitted import is_fitted_level
    from bitladder.plan.bar import parse_bar
    from bitladder.steps.building import refuse_unheard

    refuse_unheard([level for level in settings.levels or () if is_fitted_level(level)], settings.imatrix)
    return parse_bar(settings.bar) if settings.bar else None


def _endpoints(settings: RunSettings) -> list[EndpointSettings]:
    """Every model behind an address that is asked the workload."""
    reference = settings.reference
    return [*settings.also] if reference is None or isinstance(reference, str | Path) else [reference, *settings.also]


def _reference_level(source: GgufFile, settings: RunSettings) -> str | None:
    """The level that the others are compared with; None when it is no level of this model."""
    from bitladder.stages.facts import level_of

    reference = settings.reference
    return level_of(source.model) if reference is None else reference if isinstance(reference, str) else None


def _fitting(source: GgufFile, machine: Machine, settings: RunSettings) -> Plan:
    """The plan, when at least one level fits. With a level as the reference, larger ones are left out."""
    from bitladder.formats.recipes import LEVELS
    from bitladder.stages.plan import make_plan

    levels = list(LEVELS if settings.levels is None else settings.levels)
    if isinstance(settings.reference, str):
        levels = list(dict.fromkeys([*levels, settings.reference]))
    plan = make_plan(source.model, machine, n_ctx=settings.n_ctx, levels=levels)
    if isinstance(settings.reference, str):
        most = next(level.file_bytes for level in plan.levels if level.level == settings.reference)
        plan = replace(plan, levels=tuple(level for level in plan.levels if level.file_bytes <= most))
    if plan.levels and not any(level.fits for level in plan.levels):
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
        return importance_of(
            source, settings.imatrix, measured_on=texts, threads=settings.threads, journal=journal, progress=progress
        )
    except UnknownArchitecture as error:
        journal.warn(f"Levels are made without an importance matrix: {error.found}")
        return None


def _levels_to_build(source: GgufFile, plan: Plan, settings: RunSettings) -> list[str]:
    """Every level that fits, and the reference; the source itself is the file of its own level."""
    from bitladder.stages.facts import level_of

    own = level_of(source.model)
    return [
        level.level for level in plan.levels if level.level != own and (level.fits or level.level == settings.reference)
    ]


def _built(
    source: GgufFile,
    plan: Plan,
    importance: Importance | None,
    out: Path,
    settings: RunSettings,
    journal: Journal,
    progress: Progress,
) -> dict[Subject, LevelFile]:
    """A file for each level that fits."""
    from bitladder.formats.fitted import is_fitted_level
    from bitladder.stages.quantize import method_name, quantize_levels
    from bitladder.store.recorded import Subject

    wanted = _levels_to_build(source, plan, settings)
    levels = [level for level in wanted if not is_fitted_level(level)]
    need = building_need(source, levels, out, effort=settings.effort, threads=settings.threads)
    for level in levels:
        tell(progress, LevelNews(level, "being written"))
    with job(need, journal, out) if levels else nullcontext():
        files = quantize_levels(
            source,
            levels,
            out,
            importance=importance,
            effort=settings.effort,
            threads=settings.threads,
            progress=progress,
        )
    for file in files:
        tell(progress, LevelNews(file.level, "written", file_bytes=file.bytes))
    journal.reuse("files", [file.level for file in files if file.reused])
    method = method_name(settings.effort, importance)
    built = {Subject(source.sha256, file.level, made=method): file for file in files}
    for level in wanted:
        if level not in levels:
            subject, file = _fitted(source, level, out, settings, journal, progress)
            built[subject] = file
    return {subject: built[subject] for subject in sorted(built, key=lambda subject: wanted.index(subject.level))}


def _fitted(
    source: GgufFile, level: str, out: Path, settings: RunSettings, journal: Journal, progress: Progress
) -> tuple[Subject, LevelFile]:
    """The file of a level whose codes are chosen with error feedback, under the name it was asked for by."""
    from bitladder.steps.recipes import fitted_level
    from bitladder.store.recorded import Subject

    tell(progress, LevelNews(level, "being written"))
    made = fitted_level(
        source, level, out, effort=settings.effort, threads=settings.threads, journal=journal, progress=progress
    )
    file = replace(made.file, level=level)
    tell(progress, LevelNews(level, "written", file_bytes=file.bytes))
    journal.reuse("files", [level] if file.reused else [])
    types = hashlib.sha256(repr(sorted(made.recipe.qtypes.items())).encode()).hexdigest()[:16]
    return Subject(source.sha256, level, made=f"{made.method}, types {types}"), file


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

    reference = next((subject for subject in built if subject.level == settings.reference), None)
    subjects = [subject for subject in built if subject != reference]
    with ExitStack() as stack:

        def candidates(missing: Sequence[Subject]) -> list[Candidate]:
            opened = [stack.enter_context(GgufFile.open(built[subject].path)) for subject in missing]
            return [
                file_candidate(source, file, level=subject.level) for subject, file in zip(missing, opened, strict=True)
            ]

        try:
            return fidelities(
                source,
                subjects,
                candidates,
                texts,
                recorded,
                journal,
                reference=reference,
                threads=settings.threads,
                progress=progress,
            )
        except UnknownArchitecture as error:
            journal.warn(
                f"No fidelity was measured: {error.found} {error.means} The decision rests on the workload alone."
            )
            return []


def _contenders(
    source: GgufFile, plan: Plan, built: Mapping[Subject, LevelFile], settings: RunSettings
) -> list[Contender]:
    """Who answers the workload: the reference first, the levels, then models behind addresses."""
    from bitladder.stages.facts import level_of
    from bitladder.store.recorded import Subject

    own = LevelToAsk(Subject(source.sha256, level_of(source.model), file=source.sha256), source.path)
    levels = [LevelToAsk(subject, file.path) for subject, file in built.items()]
    named = _reference_level(source, settings)
    if named is None:  # the source is a level like the others
        fits = any(level.fits and level.level == own.subject.level for level in plan.levels)
        assert settings.reference is not None
        assert not isinstance(settings.reference, str)
        return [settings.reference, *([own] if fits else []), *levels, *settings.also]
    reference = next((level for level in levels if level.subject.level == named), own)
    return [reference, *(level for level in levels if level is not reference), *settings.also]


def _known_of_source(
    source: GgufFile, plan: Plan, fidelities: Sequence[Fidelity], settings: RunSettings
) -> list[Fidelity]:
    """That the source is as close to itself as can be, where it is a level like the others."""
    from bitladder.stages.facts import level_of

    own = level_of(source.model)
    rival = _reference_level(source, settings) is None and any(level.level == own for level in plan.levels)
    return [of_itself(fidelities[0], own)] if rival and fidelities else []
