"""The whole story in order: find the model, see the machine, plan, quantize, walk, run the workload, decide, report.

Nothing clever lives here. Each stage is a function from values to a record; this file fetches what is stored already,
calls the stage for the rest, stores what it finds, and hands the record on. A run that was killed goes on from the
last thing it stored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder import __version__
from bitladder.describe.cache_types import F16_CACHE, check_cache, split_name
from bitladder.describe.depths import usual_depths
from bitladder.describe.text import CHARACTERS_PER_TOKEN
from bitladder.engines.endpoint import EndpointSettings
from bitladder.errors import BitladderError, NothingFits, UnknownArchitecture, UsageError
from bitladder.executors.places import executor_of, own_device
from bitladder.files.measured import machine_key
from bitladder.files.probe import probe_machine
from bitladder.files.workloads import STARTER, load_reference, load_workload
from bitladder.levels import LADDER, CheckpointLevel, Container, Level, RecipeLevel, of_kinds
from bitladder.plan.bar import DEFAULT_BAR, Bar, parse_bar
from bitladder.plan.decide import decide
from bitladder.plan.ladder import make_plan, over_caches, usable_context
from bitladder.plan.preflight import require
from bitladder.plan.schedule import Kind, Piece, open_levels, spread
from bitladder.plan.speculation import TierRoom, guesses_of_tiers, in_words
from bitladder.progress import LevelNews, Progress
from bitladder.records import to_json
from bitladder.records.decision import Decision, Pairing
from bitladder.records.evaluation import LevelAnswers, WorkloadResult
from bitladder.records.fidelity import Fidelity, Way
from bitladder.records.plan import DEFAULT_CTX, Plan
from bitladder.records.run import RunRecord
from bitladder.report import RUN_JSON, check_html, check_run, report_beside, write_html, write_run
from bitladder.stages import run_facts as facts
from bitladder.stages.as_deployed import as_deployed
from bitladder.stages.ask import Asker, LevelToAsk, ServedLevel, name_of, require_room
from bitladder.stages.calibration import importance_need, importance_of
from bitladder.stages.costs import Prices, level_costs, prices_of
from bitladder.stages.criteria_help import criteria_help
from bitladder.stages.endpoints import agree_to_spend
from bitladder.stages.engine_way import engine_missing, way_for
from bitladder.stages.evaluate import compare
from bitladder.stages.forecast import building_need, corrected_seconds, walking_need
from bitladder.stages.job import AUTO, Build, Job, Journal, Say, Work, opened
from bitladder.stages.known_files import identified, known_folders, making_of
from bitladder.stages.ladder_files import ladder_files
from bitladder.stages.looks import (
    RESERVED_DECISIONS,
    Costs,
    Countdown,
    Looks,
    TimeIsUp,
    TooLittleTime,
    material,
    undecided_on_passes,
)
from bitladder.stages.measure import Ways, built_candidate, documents, fidelities_by_depth, fidelity_of_reference
from bitladder.stages.projector import deliver, projector_of, unmeasured_note
from bitladder.stages.quantize import calibrate_levels, sort_levels
from bitladder.stages.run_facts import RunSettings, level_of
from bitladder.stages.speculate import Tried, check_ways, measured, ways_of
from bitladder.stages.speeds import LEAST_ROUNDS
from bitladder.stages.wording import wording_changes
from bitladder.store.evidence import Evidence
from bitladder.store.recorded import Recorded, StoredDecision, Subject
from bitladder.units import human_bytes, human_duration

if TYPE_CHECKING:
    from bitladder.describe.criteria import Context
    from bitladder.describe.machine import Machine
    from bitladder.describe.text import Document
    from bitladder.describe.workload import Workload
    from bitladder.records.level_file import LevelFile
    from bitladder.stages.ask import Contender
    from bitladder.stages.endpoints import Confirm
    from bitladder.stages.fidelity import Candidate


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
    with _opened(settings, _work(settings, progress, say), confirm) as given:
        record = _assessed(given)
        path = write_run(record, given.build.out / RUN_JSON)
        report = write_html(record, report_beside(path))
        machine = machine_key(given.machine)
        given.recorded.keep_decision(
            given.job.source.sha256, StoredDecision(record.decision, path, record.created, machine)
        )
    return RunResult(record, report)


def assess(
    settings: RunSettings,
    progress: Progress,
    *,
    say: Say = lambda _: None,
    confirm: Confirm = lambda _: False,
) -> RunRecord:
    """What a run would find out, for somebody who only wants to know: a gate.

    Levels are taken where they lie, wherever a run left them; those that are nowhere are built. What is measured is
    stored. The latest run, its record and its report stay as they are. Raises as ``run`` does.
    """
    with _opened(settings, _work(settings, progress, say), confirm) as given:
        folders = (given.build.out, *known_folders(given.recorded, given.job.source.sha256))
        return _assessed(replace(given, build=replace(given.build, folders=folders)))


def _work(settings: RunSettings, progress: Progress, say: Say) -> Work:
    if settings.within is not None:
        progress = Countdown(progress, settings.within)
    return Work(threads=settings.threads, device=settings.device, progress=progress, journal=Journal(say))


def _assessed(given: _Given) -> RunRecord:
    """Plan, build, measure, test, decide; within the time, where there is a limit.

    Raises:
        TooLittleTime: it was over before anything was known of a level.
    """
    countdown = given.job.progress
    if not isinstance(countdown, Countdown):
        return _assessed_in_whole(given)
    countdown.begin()
    try:
        return _assessed_in_whole(given)
    except TimeIsUp:
        raise TooLittleTime(
            f"{human_duration(countdown.seconds)} were over before anything was known of a level.",
            means="Work took longer than was predicted: the machine may be busy. What was done is kept.",
            do="Run it again: it goes on from there.",
        ) from None
    finally:
        countdown.end()


def _assessed_in_whole(given: _Given) -> RunRecord:
    job, timed = given.job, given.job.journal.timed
    plan = _planned(given)
    given, levels = _in_time(given, plan, _levels_to_build(given, plan))
    if _needs_engine(given, levels):
        job.require_engine()
        require_room(given.workload, plan.n_ctx, job)
    with timed("calibrate"):
        calibrated = calibrate_levels(job, sort_levels(levels), given.build)
        importance = importance_of(job, given.build)
    with timed("quantize"):
        built = ladder_files(job, levels, given.build, importance=importance, calibrated=calibrated)
        built = identified(built, making_of(job, given.build, importance), given.recorded, job)
        _tell_twins(given, built)
        if given.projector and any(file.path.parent == given.build.out for file in built.values()):
            deliver(given.projector, given.build.out, job.journal)
    if isinstance(job.progress, Countdown):
        with timed("looks"):
            return _looked(given, plan, built, job.progress)
    with timed("walk"):
        fidelities = _measured(given, plan, built)
    with timed("workload"):
        answers = _asked(given, plan, built)
    record = _judged(given, plan, built, fidelities, answers)
    if not given.settings.speculate:
        return record
    with timed("speculate"):
        record = _with_guesses(given, plan, built, record)
    journal = job.journal
    return replace(record, timings=journal.timings, reused=tuple(journal.reused), warnings=tuple(journal.warnings))


_BUILDING_SHARE = 0.5
"""Of the time, for the importance matrix and for building levels."""
_IMPORTANCE_SHARE = 0.2
"""Of the time, for the importance matrix: what it is gathered on is cut to it."""


def _in_time(given: _Given, plan: Plan, levels: Sequence[Level]) -> tuple[_Given, list[Level]]:
    """All that was asked for; within a limit the levels that there is time to build, evenly spread over the ladder,
    and calibration text that there is time for.

    Raises:
        TooLittleTime: not even for the smallest level.
    """
    job, countdown = given.job, given.job.progress
    if not isinstance(countdown, Countdown):
        _say_estimate(given, plan, levels)
        return given, list(levels)
    if not levels:
        return given, []
    named = {level.name: level for level in levels}
    reference = _named_reference(given.settings)
    candidates = [row.level for row in plan.levels if row.level in named and named[row.level] != reference]
    wanted = material(job.windows(given.texts), given.workload.inputs)
    costs = Costs(wanted, job.source, plan.levels, reference.name if reference else level_of(job.source.model))
    given = _with_less_calibration(given, _IMPORTANCE_SHARE * countdown.usable)
    first = _importance_seconds(given)
    known = {file.level for file in given.recorded.files(job.source.sha256)}  # an earlier run got to them

    def building(some: Sequence[str]) -> float:
        return first + corrected_seconds(building_need(job, [named[name] for name in some], given.build))

    smallest = candidates[-1:]
    least = building(smallest) + costs.shortest_look([name for name in smallest if name not in known])
    if smallest and least > countdown.left:
        least = (countdown.passed + least) * countdown.seconds / countdown.usable
        rest = "; --imatrix none does without the importance matrix" if first else ""
        raise TooLittleTime(
            f"{human_duration(countdown.seconds)} are too short for one look at {smallest[0]}, the smallest level.",
            means=f"About {human_duration(least)} are needed: {human_duration(first)} for the importance matrix, the "
            "rest to build the level and to look at it beside the reference.",
            do=f"Write --within {math.ceil(least * 1.1)}s or more{rest}.",
        )
    chosen = spread(candidates, building, _BUILDING_SHARE * countdown.left) or tuple(smallest)
    left_out = [name for name in candidates if name not in chosen]
    if left_out:
        job.journal.warn(f"There is no time to build {', '.join(left_out)}: a longer --within takes them in.")
    countdown.watch()
    return given, [level for level in levels if level.name in chosen or level == reference]


_WORTH_SAYING_S = 30.0


def _say_estimate(given: _Given, plan: Plan, levels: Sequence[Level]) -> None:
    """How long the whole run may take, where nothing of it was done yet and all of it can be predicted."""
    job = given.job
    known = {file.level for file in given.recorded.files(job.source.sha256)}
    missing = [level.name for level in levels if level.name not in known]
    if not missing or _endpoints(given.settings) or not all(isinstance(level, RecipeLevel) for level in levels):
        return
    costs = Costs(material((), given.workload.inputs), job.source, plan.levels, level_of(job.source.model))
    asking = [Piece(Kind.INPUTS, tuple(missing), 0, len(given.workload.inputs))]
    timing = [Piece(Kind.ROUNDS, tuple(missing), 0, LEAST_ROUNDS)]
    tokens = sum(len(text.text) for text in given.texts) // CHARACTERS_PER_TOKEN
    try:
        seconds = _importance_seconds(given) + corrected_seconds(building_need(job, levels, given.build))
        seconds += corrected_seconds(walking_need(job.source, tokens, missing)) + sum(map(costs, asking + timing))
    except BitladderError:  # told where it matters
        return
    if seconds >= _WORTH_SAYING_S:
        job.journal.say(
            f"About {human_duration(seconds)} on this machine, by what is known of it; --within bounds the time."
        )


def _importance_seconds(given: _Given) -> float:
    need = importance_need(given.job, given.build)
    return corrected_seconds(need) if need else 0.0


_CALIBRATION_SHARES = (1.0, 0.5, 0.25, 0.125)
"""Few, so that a later run with another bound finds the matrix of an earlier one, and the levels made with it."""


def _with_less_calibration(given: _Given, seconds: float) -> _Given:
    """The importance matrix as an earlier run gathered it, on the most text that one did; else gathered on as much as
    these seconds suffice for."""
    if given.build.imatrix != AUTO:
        return given
    parts = [replace(given, build=replace(given.build, calibration_share=share)) for share in _CALIBRATION_SHARES]
    times = [_importance_seconds(part) for part in parts]
    there = (part for part, time in zip(parts, times, strict=True) if not time)
    in_time = (part for part, time in zip(parts, times, strict=True) if time <= seconds)
    chosen = next(there, None) or next(in_time, parts[-1])
    if chosen is not parts[0]:
        share = chosen.build.calibration_share
        given.job.journal.warn(f"The importance matrix is gathered on {100 * share:.3g}% of the calibration text.")
    return chosen


def _looked(given: _Given, plan: Plan, built: Mapping[Subject, LevelFile], countdown: Countdown) -> RunRecord:
    """Look after look until the time is over, or nothing is open that looking could settle."""
    contenders = [one for one in _contenders(given, plan, built) if isinstance(one, LevelToAsk | Path)]
    asker = Asker(given.workload, given.context, given.recorded, plan.n_ctx, given.job)
    wanted = material(given.job.windows(given.texts), given.workload.inputs)
    with ExitStack() as stack:
        ways = _ways(given, built, stack)
        subjects = _measurable(given, [subject for subject in built if subject != ways.reference])
        if subjects and given.bar is None:  # also where there turns out to be no time for KL
            given = replace(given, bar=parse_bar(DEFAULT_BAR))
        looks = Looks(asker, ways, subjects, contenders, plan.levels, wanted)
        still_open = {level.level for level in plan.levels}
        sizes = {level.level: level.file_bytes for level in plan.levels}
        try:
            while (piece := looks.next_piece(still_open, countdown.left)) is not None:
                looks.do(piece)
                done = countdown.passed
                evidence = looks.evidence()
                looks.news(evidence)
                if looks.has_something:
                    results = _results(given, evidence.answers)
                    decision = _decided(
                        given, plan, built, evidence.fidelities, results, reference=evidence.answers[0].level
                    )
                    still_open = open_levels(decision, sizes) | undecided_on_passes(
                        decision.bar, evidence.answers, wanted
                    )
                countdown.reserve(RESERVED_DECISIONS * (countdown.passed - done))
        except TimeIsUp:
            pass
        if not looks.has_something:
            raise TimeIsUp
        countdown.end()
        evidence = looks.evidence(still_open)
        if evidence.answers[0].answers:
            asker.tell_doubts([level for level in evidence.answers if level.answers])
        record = _judged(given, plan, built, evidence.fidelities, evidence.answers)
        more = looks.remaining(still_open)
    if not more:
        return record
    return replace(record, decision=replace(record.decision, next=(*record.decision.next, more)))


def _measurable(given: _Given, subjects: Sequence[Subject]) -> list[Subject]:
    """Those whose fidelity can be measured; none, and a warning, where neither the walk nor the engine can go."""
    try:
        way_for(given.job.source)
    except UnknownArchitecture as error:
        _warn_of_no_fidelity(given, error)
        return []
    return list(subjects)


def _warn_of_no_fidelity(given: _Given, error: UnknownArchitecture) -> None:
    given.job.journal.warn(
        f"No fidelity was measured: {error.found} {error.means} The decision rests on the workload alone."
    )


def _judged(
    given: _Given,
    plan: Plan,
    built: Mapping[Subject, LevelFile],
    fidelities: Sequence[Fidelity],
    answers: Sequence[LevelAnswers],
) -> RunRecord:
    """The decision that this evidence leads to, and all that it rests on."""
    results = _results(given, answers)
    decision = _decided(given, plan, built, fidelities, results, reference=answers[0].level)
    return _record(given, plan, built, fidelities, answers, results, decision)


def _with_guesses(given: _Given, plan: Plan, built: Mapping[Subject, LevelFile], record: RunRecord) -> RunRecord:
    """The record with what guessing ahead gains on the tiers chosen, and the decision that they do so where it pays."""
    chosen = list(dict.fromkeys(level for level in (record.decision.quality, record.decision.speed) if level))
    source = given.job.source
    own = LevelToAsk(Subject(source.sha256, level_of(source.model), file=source.sha256), source.path)
    runs = {name_of(run): run for run in (own, *_runs(given, plan, built))}
    files = {subject.level: file.path for subject, file in built.items() if not file.path.is_dir()}
    tiers = [runs[level] for level in chosen if level in runs]
    reports = [
        measured(
            Tried(run.path, ways_of(given.settings.speculate, run.path, files), name_of(run), run.cache),
            given.workload, given.recorded, n_ctx=plan.n_ctx, work=given.job,
        )
        for run in tiers
    ]  # fmt: skip
    total = {level.level: level.total_bytes for level in plan.levels}
    rooms = [TierRoom(name_of(run), total[name_of(run)]) for run in tiers]
    together = record.decision.pair is not Pairing.SWAP
    guesses = guesses_of_tiers(rooms, reports, plan.budget_bytes, together=together)
    summary = " ".join(part for part in (record.decision.summary, in_words(guesses)) if part)
    decision = replace(record.decision, speculate=guesses, summary=summary)
    return replace(record, speculation=tuple(reports), decision=decision)


@dataclass(frozen=True)
class _Given:
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
def _opened(settings: RunSettings, work: Work, confirm: Confirm) -> Iterator[_Given]:
    """Everything a run starts from. What would be refused later is refused here, the cheapest questions first."""
    bar = _checked_bar(settings)
    workload = load_workload(settings.workload or STARTER)
    if isinstance(settings.reference, Path):
        load_reference(settings.reference, workload)
    texts = documents(settings.texts)
    with ExitStack() as stack:
        recorded = Recorded(stack.enter_context(Evidence.open()))
        judged = 1 + len(_wanted(settings)) + len(settings.also)
        agree_to_spend(_endpoints(settings), workload, recorded, confirm, judge=settings.judge, judged=judged)
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
        yield _Given(settings, job, machine, workload, context, texts, build, bar, recorded, projector, prices)


def _checked_bar(settings: RunSettings) -> Bar | None:
    """The bar; a bad one, options that a level would not follow, and levels that nobody could ask are refused before
    any work is done."""
    _check_caches(settings)
    sort_levels(_wanted(settings), settings.imatrix)
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
    reference = _named_reference(settings)
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
        [level for level in _wanted(settings) if isinstance(level, CheckpointLevel)],
        (),
        what="--kv",
        why="Types of a KV cache are llama.cpp's, which does not run checkpoints.",
        do="Leave out the checkpoint levels, or --kv.",
    )
    if _named_reference(settings) is not None:
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
    if _endpoints(settings):
        raise UsageError(
            "--within cannot be kept with models behind addresses, which answer when they like.",
            do="Leave out --within, or the addresses.",
        )
    of_kinds(
        _wanted(settings),
        (RecipeLevel,),
        what="--within",
        why="how long calibrating takes is not predicted.",
        do="Leave out --within, or these levels.",
    )


def _endpoints(settings: RunSettings) -> list[EndpointSettings]:
    """Every model behind an address that is asked the workload."""
    reference, served = settings.reference, [endpoint for _, endpoint in settings.served]
    return [*([reference] if isinstance(reference, EndpointSettings) else []), *served, *settings.also]


def _answering(settings: RunSettings) -> dict[str, EndpointSettings]:
    """Who answers behind an address, by the name that tables call it."""
    return {one.label: one for one in _endpoints(settings)} | {level.name: one for level, one in settings.served}


def _reference_level(given: _Given) -> str | None:
    """The level that the others are compared with; None when it is no level of this model."""
    reference = given.settings.reference
    if reference is None:
        return level_of(given.job.source.model)
    return None if isinstance(reference, Path | EndpointSettings) else reference.name


def _named_reference(settings: RunSettings) -> Level | None:
    """The level that was named as the reference."""
    reference = settings.reference
    return None if reference is None or isinstance(reference, Path | EndpointSettings) else reference


def _wanted(settings: RunSettings) -> list[Level]:
    """The levels asked for, the reference and those that engines serve among them."""
    levels = LADDER if settings.levels is None else settings.levels
    reference = _named_reference(settings)
    served = [level for level, _ in settings.served]
    return list(dict.fromkeys([*levels, *served, *([reference] if reference else [])]))


def _planned(given: _Given) -> Plan:
    """The plan, when at least one level fits and what fits can be built. With a level as the reference, larger ones
    are left out."""
    reference, source = _named_reference(given.settings), given.job.source
    for cache in given.settings.caches:
        check_cache(source.model, cache)
    if given.settings.speculate:
        check_ways(given.settings.speculate, source.path, [level.name for level in _wanted(given.settings)])
    if given.settings.caches and (why := engine_missing(source.model)):
        raise UnknownArchitecture(
            f"Losses by cache cannot be measured: {why}.",
            means="They come from llama.cpp's own library.",
            do="Leave out --kv.",
        )
    plans = {
        cache: make_plan(
            source.model, given.machine, n_ctx=given.settings.n_ctx, levels=_wanted(given.settings),
            beside_bytes=given.projector.stat().st_size if given.projector else 0,
            type_k=cache.k.upper(), type_v=cache.v.upper(),
        )
        for cache in given.settings.caches or (F16_CACHE,)
    }  # fmt: skip
    plan = over_caches(plans)
    if reference is not None:
        most = next(level.file_bytes for level in plan.levels if level.level == reference.name)
        plan = replace(plan, levels=tuple(level for level in plan.levels if level.file_bytes <= most))
    if plan.levels and not _levels_to_build(given, plan) and not any(level.fits for level in plan.levels):
        smallest = plan.levels[-1]
        raise NothingFits(
            f"No level of {plan.model} fits this machine at a context of {plan.n_ctx} tokens: "
            f"{smallest.level}, the smallest, needs {human_bytes(smallest.total_bytes)} "
            f"of {human_bytes(plan.budget_bytes)}.",
            means=smallest.reason,
            do="Close other programs, ask for a shorter context with --ctx, or choose a smaller model.",
        )
    for level in plan.levels:
        given.job.progress.on_level(LevelNews(level.level, "fits" if level.fits else "does not fit"))
    wanted = [level for level in _levels_to_build(given, plan) if level.container is Container.FILE]
    require(building_need(given.job, wanted, given.build), given.machine)
    return plan


def _levels_to_build(given: _Given, plan: Plan) -> list[Level]:
    """Every level that fits, the reference, and checkpoints, whose engines may run elsewhere; the source itself is the
    file of its own level."""
    named = {level.name: level for level in _wanted(given.settings)}
    own, reference = level_of(given.job.source.model), _named_reference(given.settings)
    levels = [(row, named[level]) for row in plan.levels if (level := split_name(row.level)[0]) != own]
    kept = (level for row, level in levels if row.fits or level == reference or level.container is Container.FOLDER)
    return list(dict.fromkeys(kept))


def _runs(given: _Given, plan: Plan, built: Mapping[Subject, LevelFile]) -> list[LevelToAsk]:
    """Every level in a file with every cache that it is run with, in the order of the plan; the source with the caches
    beside llama.cpp's own, with which it is what the others are compared with."""
    caches = given.settings.caches or (F16_CACHE,)
    source, fits = given.job.source, {row.level for row in plan.levels if row.fits}
    files = {subject: file.path for subject, file in built.items() if not file.path.is_dir()}
    own = Subject(source.sha256, level_of(source.model), file=source.sha256)
    runs = [
        LevelToAsk(subject.with_cache(cache), path, cache)
        for subject, path in (files | {own: source.path}).items()
        for cache in caches
        if not (subject == own and cache.is_default)
    ]
    return [run for run in runs if not given.settings.caches or name_of(run) in fits]


def _tell_twins(given: _Given, built: Mapping[Subject, LevelFile]) -> None:
    """Say which levels are other levels byte for byte: a small model's rows fit few types."""
    for subject, first in given.recorded.one_of_each(built).items():
        if subject != first:
            line = f"{subject.level} is {first.level} byte for byte: what is measured of one holds for both"
            given.job.journal.reused.append(line)
            given.job.journal.say(f"{line}.")


def _needs_engine(given: _Given, levels: Sequence[Level]) -> bool:
    """Whether the workload is to be answered by files, the source's or a level's."""
    own = given.settings.reference is None or _reference_level(given) == level_of(given.job.source.model)
    return own or any(level.container is Container.FILE for level in levels)


def _results(given: _Given, answers: Sequence[LevelAnswers]) -> list[WorkloadResult]:
    """Each level beside the reference, which is the first; levels that nobody asked have no result."""
    return [compare(answers[0], level, given.workload) for level in answers[1:] if level.answers]


def _ways(given: _Given, built: Mapping[Subject, LevelFile], stack: ExitStack) -> Ways:
    """How fidelity of the files that were written is measured; they stay open as long as ``stack``."""
    named = _named_reference(given.settings)
    reference = next((subject for subject in built if named is not None and subject.level == named.name), None)

    def candidates(missing: Sequence[Subject]) -> list[Candidate]:
        return [built_candidate(given.job.source, built[subject], stack) for subject in missing]

    def files(missing: Sequence[Subject]) -> list[Path]:
        return [built[subject].path for subject in missing]

    return Ways(given.job, candidates, files, given.texts, given.recorded, reference)


def _measured(given: _Given, plan: Plan, built: Mapping[Subject, LevelFile]) -> list[Fidelity]:
    """Fidelity of the files that were written; none, and a warning, where neither the walk nor the engine can go."""
    if given.settings.caches:
        return _measured_by_depth(given, _runs(given, plan, built))
    with ExitStack() as stack:
        ways = _ways(given, built, stack)
        try:
            return ways.fidelities([subject for subject in built if subject != ways.reference])
        except UnknownArchitecture as error:
            _warn_of_no_fidelity(given, error)
            return []


def _measured_by_depth(given: _Given, runs: Sequence[LevelToAsk]) -> list[Fidelity]:
    """Fidelity of every level with every cache, at depths up to the context."""
    paths = {run.subject.bare: run.path for run in runs}
    return fidelities_by_depth(
        given.job,
        [(run.subject.bare, run.cache) for run in runs],
        given.texts,
        given.recorded,
        files=lambda missing: [paths[subject] for subject in missing],
        depths=usual_depths(given.settings.n_ctx or DEFAULT_CTX),
    )


def _asked(given: _Given, plan: Plan, built: Mapping[Subject, LevelFile]) -> list[LevelAnswers]:
    """The workload through everyone: the reference first, the levels, then models behind addresses."""
    asker = Asker(given.workload, given.context, given.recorded, plan.n_ctx, given.job)
    return asker.ask_all(_contenders(given, plan, built))


def _contenders(given: _Given, plan: Plan, built: Mapping[Subject, LevelFile]) -> list[Contender]:
    """Who answers the workload, the reference first."""
    settings, source = given.settings, given.job.source
    own = LevelToAsk(Subject(source.sha256, level_of(source.model), file=source.sha256), source.path)
    served = {level.name: endpoint for level, endpoint in settings.served}
    folders = [ServedLevel(name, endpoint) for name, endpoint in served.items()]
    levels: list[LevelToAsk | ServedLevel] = [*_runs(given, plan, built), *folders]
    named = _reference_level(given)
    if named is None:  # the source is a level like the others
        fits = any(level.fits and level.level == own.subject.level for level in plan.levels)
        assert isinstance(settings.reference, Path | EndpointSettings)
        return [settings.reference, *([own] if fits else []), *levels, *settings.also]
    reference = next((level for level in levels if name_of(level) == named), own)
    return [reference, *(level for level in levels if level is not reference), *settings.also]


def _decided(
    given: _Given,
    plan: Plan,
    built: Mapping[Subject, LevelFile],
    fidelities: Sequence[Fidelity],
    results: Sequence[WorkloadResult],
    *,
    reference: str,
) -> Decision:
    """The pair to deploy with its reasons, and the files that it is about."""
    answering = {result.level for result in results}
    decision = decide(
        plan,
        [*_known_of_source(given, plan, fidelities), *fidelities],
        results,
        bar=given.bar,
        reference=reference,
        elsewhere=[one.label for one in given.settings.also if one.label in answering],
        tags={one.id: one.tags for one in given.workload.inputs},
    )
    files = {level_of(given.job.source.model): given.job.source.sha256}
    files |= {file.level: file.sha256 for file in built.values()}
    files |= {name_of(run): files[run.subject.bare.level] for run in _runs(given, plan, built)}
    return replace(decision, files=files)


def _known_of_source(given: _Given, plan: Plan, fidelities: Sequence[Fidelity]) -> list[Fidelity]:
    """That the source is as close to itself as can be, where it is a level like the others."""
    own = level_of(given.job.source.model)
    rival = _reference_level(given) is None and any(level.level == own for level in plan.levels)
    return [fidelity_of_reference(fidelities[0], own)] if rival and fidelities else []


def _record(
    given: _Given,
    plan: Plan,
    built: Mapping[Subject, LevelFile],
    fidelities: Sequence[Fidelity],
    answers: Sequence[LevelAnswers],
    results: Sequence[WorkloadResult],
    decision: Decision,
) -> RunRecord:
    """Everything the run found out, and everything needed to repeat it."""
    settings, journal = given.settings, given.job.journal
    return RunRecord(
        bitladder=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=facts.source_facts(given.job.source, given.job.found, settings.model),
        reference=answers[0].level,
        machine=to_json(given.machine),
        plan=plan,
        decision=decision,
        files=tuple(facts.file_facts(file, subject.made) for subject, file in built.items()),
        fidelities=tuple(fidelities),
        results=tuple(results),
        inputs=facts.input_facts(given.workload),
        answers=facts.shown_answers(answers, decision),
        wording={
            level.level: wording_changes(given.workload, answers[0].answers, level.answers) for level in answers[1:]
        },
        costs=level_costs(answers, given.prices),
        settings=facts.settings_facts(
            settings, plan.n_ctx, given.texts, given.workload, way=fidelities[0].way if fidelities else Way.WALK
        ),
        versions=facts.versions(),
        commands=facts.commands(settings, plan.n_ctx, given.build.out),
        timings=journal.timings,
        jobs=tuple(journal.jobs),
        reused=tuple(journal.reused),
        warnings=tuple(journal.warnings),
    )
