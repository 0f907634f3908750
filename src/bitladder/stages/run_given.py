"""What every step of a run is given, found once and checked before any work: options, model, machine, workload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.engines.endpoint import EndpointSettings
from bitladder.errors import UsageError
from bitladder.executors.places import executor_of, own_device
from bitladder.files.probe import probe_machine
from bitladder.files.workloads import STARTER, load_reference, load_workload
from bitladder.levels import LADDER, CheckpointLevel, Level, RecipeLevel, of_kinds
from bitladder.plan.bar import Bar, parse_bar
from bitladder.plan.ladder import usable_context
from bitladder.report import RUN_JSON, check_html, check_run, report_beside
from bitladder.stages.as_deployed import as_deployed
from bitladder.stages.costs import Prices, prices_of
from bitladder.stages.criteria_help import criteria_help
from bitladder.stages.endpoints import agree_to_spend
from bitladder.stages.job import Build, Job, Work, opened
from bitladder.stages.measure import documents
from bitladder.stages.projector import projector_of, unmeasured_note
from bitladder.stages.quantize import sort_levels
from bitladder.stages.run_facts import RunSettings, level_of
from bitladder.store.evidence import Evidence
from bitladder.store.recorded import Recorded

if TYPE_CHECKING:
    from bitladder.describe.criteria import Context
    from bitladder.describe.machine import Machine
    from bitladder.describe.text import Document
    from bitladder.describe.workload import Workload
    from bitladder.stages.endpoints import Confirm


@dataclass(frozen=True)
class Given:
    """What every step of a run is given: what was asked for, what was found, where things are kept and told."""

    settings: RunSettings
    job: Job
    machine: Machine
    workload: Workload
    context: Context
    """The judge and the user's functions, where the workload's criteria need them."""
    texts: Sequence[Document]
    build: Build
    """Where levels are written, and how."""
    bar: Bar | None
    recorded: Recorded
    projector: Path | None
    """What takes in pictures and sounds, as ``stages.projector`` made or found it."""
    prices: Prices


@contextmanager
def opened_run(settings: RunSettings, work: Work, confirm: Confirm) -> Iterator[Given]:
    """Everything a run starts from. What would be refused later is refused here, the cheapest questions first."""
    bar = _checked_bar(settings)
    workload = load_workload(settings.workload or STARTER)
    if isinstance(settings.reference, Path):
        load_reference(settings.reference, workload)
    texts = documents(settings.texts)
    with ExitStack() as stack:
        recorded = Recorded(stack.enter_context(Evidence.open()))
        judged = 1 + len(wanted_levels(settings)) + len(settings.also)
        agree_to_spend(endpoints_of(settings), workload, recorded, confirm, judge=settings.judge, judged=judged)
        helpers = criteria_help(
            workload,
            (settings.workload or Path()).parent,
            judge=settings.judge,
            trust_python=settings.trust_python,
            recorded=recorded,
            journal=work.journal,
        )
        context = stack.enter_context(helpers)
        executor = executor_of(settings.on, settings.device, settings.unit_needs)
        if executor is not None:
            work.journal.warn(*executor.warnings)
            own = own_device(executor, settings.device)
            work = replace(work, device=own, executor=stack.enter_context(executor))
        with work.journal.timed("fetch"):
            job = stack.enter_context(opened(settings.model, work))
        source = job.source
        workload = as_deployed(workload, source.metadata, job.checkpoint)
        settings = replace(settings, n_ctx=usable_context(source.model, settings.n_ctx))
        out = settings.out or Path(f"{job.found.label}-ladder")
        check_run(out / RUN_JSON, source_sha256=lambda: source.sha256)
        check_html(report_beside(out / RUN_JSON), source_sha256=lambda: source.sha256)
        work.journal.warn(*workload.warnings)
        machine = probe_machine(out)
        prices = prices_of(machine, _answering(settings))
        build = Build(out=out, imatrix=settings.imatrix, effort=settings.effort, measured_on=texts)
        projector = projector_of(job.found, job.journal, job.progress)
        if projector is not None:
            job.journal.warn(unmeasured_note(projector))
        yield Given(settings, job, machine, workload, context, texts, build, bar, recorded, projector, prices)


def _checked_bar(settings: RunSettings) -> Bar | None:
    """The bar; a bad one, options that a level would not follow, and levels that nobody could ask are refused before
    any work is done."""
    _check_caches(settings)
    sort_levels(wanted_levels(settings), settings.imatrix)
    of_kinds(
        [level for level, _ in settings.served],
        (CheckpointLevel,),
        what="--also LEVEL=URL",
        why="llama.cpp runs GGUF files here, and its answers are the level's.",
        do="Leave out LEVEL= to test the model behind the address beside the levels.",
    )
    twice = [level for level, count in Counter(level for level, _ in settings.served).items() if count > 1]
    if twice:
        raise UsageError(f"Two addresses are named for {twice[0]}.", do="Name one engine for each level.")
    reference = named_reference(settings)
    if isinstance(reference, CheckpointLevel) and reference not in dict(settings.served):
        raise UsageError(
            f"{reference} cannot be the reference of answers: no engine here runs checkpoints.",
            means="Every level's answers are compared with the reference's.",
            do=f"Serve it with vLLM and name the address: --also {reference}=URL#MODEL.",
        )
    if settings.within is not None:
        _check_within(settings)
    return parse_bar(settings.bar) if settings.bar else None


def _check_caches(settings: RunSettings) -> None:
    """Refuse what cannot be run, or compared, with several types of KV cache."""
    if not settings.caches:
        return
    of_kinds(
        [level for level in wanted_levels(settings) if isinstance(level, CheckpointLevel)],
        (),
        what="--kv",
        why="Types of a KV cache are llama.cpp's, which does not run checkpoints.",
        do="Leave out the checkpoint levels, or --kv.",
    )
    if named_reference(settings) is not None:
        raise UsageError(
            f"--reference {settings.reference} does not go with --kv.",
            means="Losses by cache are measured against the source in its 16-bit cache.",
            do="Leave out --reference, or compare with an endpoint's or stored answers.",
        )


def _check_within(settings: RunSettings) -> None:
    """Refuse what no time can be predicted of."""
    if settings.caches or settings.speculate:
        option, what = (
            ("--kv", "measuring by depth of context") if settings.caches else ("--speculate", "trying guesses")
        )
        raise UsageError(
            f"--within cannot be kept with {option}: how long {what} takes is not predicted.",
            do="Leave out one of the two.",
        )
    if endpoints_of(settings):
        raise UsageError(
            "--within cannot be kept with models behind addresses, which answer when they like.",
            do="Leave out --within, or the addresses.",
        )
    of_kinds(
        wanted_levels(settings),
        (RecipeLevel,),
        what="--within",
        why="how long calibrating takes is not predicted.",
        do="Leave out --within, or these levels.",
    )


def endpoints_of(settings: RunSettings) -> list[EndpointSettings]:
    """Every model behind an address that is asked the workload."""
    reference, served = settings.reference, [endpoint for _, endpoint in settings.served]
    return [*([reference] if isinstance(reference, EndpointSettings) else []), *served, *settings.also]


def _answering(settings: RunSettings) -> dict[str, EndpointSettings]:
    """Who answers behind an address, by the name that tables call it."""
    return {one.label: one for one in endpoints_of(settings)} | {level.name: one for level, one in settings.served}


def reference_level(given: Given) -> str | None:
    """The level that the others are compared with; None when it is no level of this model."""
    reference = given.settings.reference
    if reference is None:
        return level_of(given.job.source.model)
    return None if isinstance(reference, Path | EndpointSettings) else reference.name


def named_reference(settings: RunSettings) -> Level | None:
    """The level that was named as the reference."""
    reference = settings.reference
    return None if reference is None or isinstance(reference, Path | EndpointSettings) else reference


def wanted_levels(settings: RunSettings) -> list[Level]:
    """The levels asked for, the reference and those that engines serve among them."""
    levels = LADDER if settings.levels is None else settings.levels
    reference = named_reference(settings)
    served = [level for level, _ in settings.served]
    return list(dict.fromkeys([*levels, *served, *([reference] if reference else [])]))
