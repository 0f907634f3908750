"""The whole story in order: find the model, see the machine, plan, quantize, walk, run the workload, decide, report.

Nothing clever lives here. Each stage is a function from values to a record; this file fetches what is stored already,
calls the stage for the rest, stores what it finds, and hands the record on. A run that was killed goes on from the
last thing it stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder import __version__
from bitladder.describe.cache_types import F16_CACHE, check_cache, split_name
from bitladder.errors import NothingFits, UnknownArchitecture
from bitladder.files.measured import machine_key
from bitladder.levels import Container, Level
from bitladder.plan.bar import DEFAULT_BAR, parse_bar
from bitladder.plan.ladder import make_plan, over_caches
from bitladder.plan.preflight import require
from bitladder.plan.schedule import contending, far_off, open_levels
from bitladder.progress import LevelNews, Progress
from bitladder.records import to_json
from bitladder.records.decision import Decision, TierGuesses
from bitladder.records.evaluation import LevelAnswers, WorkloadResult
from bitladder.records.fidelity import Fidelity, Way
from bitladder.records.plan import Plan
from bitladder.records.run import RunRecord
from bitladder.records.speculation import SpeculationReport
from bitladder.report import RUN_JSON, report_beside, write_html, write_run
from bitladder.stages import run_facts as facts
from bitladder.stages.ask import Asker, LevelToAsk, name_of, require_room
from bitladder.stages.calibration import importance_of
from bitladder.stages.costs import level_costs
from bitladder.stages.documents import material
from bitladder.stages.engine_way import engine_missing
from bitladder.stages.forecast import building_need
from bitladder.stages.in_time import default_time, in_time
from bitladder.stages.job import Journal, Say, Work
from bitladder.stages.known_files import identified, known_folders, making_of, tell_same_weights
from bitladder.stages.ladder_files import ladder_files
from bitladder.stages.looks import (
    RESERVED_DECISIONS,
    Countdown,
    Looks,
    TimeIsUp,
    TooLittleTime,
    undecided_on_passes,
)
from bitladder.stages.projector import deliver
from bitladder.stages.quantize import calibrate_levels, sort_levels
from bitladder.stages.run_evidence import (
    asked_levels,
    contenders_of,
    decided,
    measurable,
    measured_fidelities,
    results_of,
    runs_of,
    sizes_of,
    ways_to_measure,
)
from bitladder.stages.run_facts import AUTO_TIME, RunSettings, level_of
from bitladder.stages.run_given import Given, named_reference, opened_run, reference_level, wanted_levels
from bitladder.stages.speculate import Tried, check_ways, measured, ways_of
from bitladder.stages.tier_guesses import with_guesses
from bitladder.stages.wording import wording_changes
from bitladder.store.recorded import StoredDecision, Subject
from bitladder.units import human_bytes, human_duration

if TYPE_CHECKING:
    from bitladder.records.level_file import LevelFile
    from bitladder.stages.endpoints import Confirm


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
    with opened_run(settings, _work(settings, progress, say), confirm) as given:
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
    settings = replace(settings, full=True)  # each level is asked about, not which one to deploy
    with opened_run(settings, _work(settings, progress, say), confirm) as given:
        folders = (given.build.out, *known_folders(given.recorded, given.job.source.sha256))
        return _assessed(replace(given, build=replace(given.build, folders=folders)))


def _work(settings: RunSettings, progress: Progress, say: Say) -> Work:
    if settings.within is not None:
        progress = Countdown(progress, None if settings.within == AUTO_TIME else settings.within)
    return Work(threads=settings.threads, device=settings.device, progress=progress, journal=Journal(say))


def _assessed(given: Given) -> RunRecord:
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


def _assessed_in_whole(given: Given) -> RunRecord:
    job, timed = given.job, given.job.journal.timed
    plan = _planned(given)
    levels = _levels_to_build(given, plan)
    if _needs_engine(given, levels):
        job.require_engine()
        require_room(given.workload, plan.n_ctx, job)
    if isinstance(job.progress, Countdown) and given.settings.within == AUTO_TIME:
        job.progress.allow(default_time(given, plan, levels))
        job.journal.say(
            f"Up to {human_duration(job.progress.seconds)} on this machine, by what is known of it: levels that are "
            "clearly in or out are measured less."
        )
    given, levels = in_time(given, plan, levels)
    with timed("calibrate"):
        calibrated = calibrate_levels(job, sort_levels(levels), given.build)
        importance = importance_of(job, given.build)
    with timed("quantize"):
        built = ladder_files(job, levels, given.build, importance=importance, calibrated=calibrated)
        built = identified(built, making_of(job, given.build, importance), given.recorded, job)
        tell_same_weights(built.values(), given.recorded)
        _tell_twins(given, built)
        if given.projector and any(file.path.parent == given.build.out for file in built.values()):
            deliver(given.projector, given.build.out, job.journal)
    if isinstance(job.progress, Countdown):
        with timed("looks"):
            return _looked(given, plan, built, job.progress)
    with timed("walk"):
        fidelities = measured_fidelities(given, plan, built)
    with timed("workload"):
        answers = asked_levels(given, plan, built, fidelities)
    record = _judged(given, plan, built, fidelities, answers)
    if not given.settings.speculate:
        return record
    with timed("speculate"):
        record = _with_guesses(given, plan, built, record)
    journal = job.journal
    return replace(record, timings=journal.timings, reused=tuple(journal.reused), warnings=tuple(journal.warnings))


def _looked(given: Given, plan: Plan, built: Mapping[Subject, LevelFile], countdown: Countdown) -> RunRecord:
    """Look after look until the time is over, or nothing is open that looking could settle."""
    contenders = [one for one in contenders_of(given, plan, built) if isinstance(one, LevelToAsk | Path)]
    asker = Asker(given.workload, given.context, given.recorded, plan.n_ctx, given.job)
    wanted = material(given.job.windows(given.texts), given.workload.inputs)
    with ExitStack() as stack:
        ways = ways_to_measure(given, built, stack)
        subjects = measurable(given, [subject for subject in built if subject != ways.reference])
        if subjects and given.bar is None:  # also where there turns out to be no time for KL
            given = replace(given, bar=parse_bar(DEFAULT_BAR))
        looks = Looks(asker, ways, subjects, contenders, plan.levels, wanted)
        still_open = everyone = {level.level for level in plan.levels}
        closed: set[str] = set()
        try:
            while (piece := looks.next_piece(still_open, countdown.left, closed)) is not None:
                looks.do(piece)
                done = countdown.passed
                evidence = looks.evidence()
                looks.news(evidence)
                if looks.has_something:
                    results = results_of(given, evidence.answers)
                    decision = decided(
                        given, plan, built, evidence.fidelities, results, reference=evidence.answers[0].level
                    )
                    undecided = undecided_on_passes(decision.bar, evidence.answers, wanted)
                    still_open = open_levels(decision, sizes_of(plan)) | undecided
                    losses = {one.level: one.kl_mean for one in evidence.fidelities}
                    closed = (everyone - contending(decision) - undecided) | far_off(decision.bar, losses)
                countdown.reserve(RESERVED_DECISIONS * (countdown.passed - done))
        except TimeIsUp:
            pass
        if not looks.has_something:
            raise TimeIsUp
        countdown.end()
        evidence = looks.evidence(still_open)
        if evidence.answers[0].answers:
            asker.tell_doubts([level for level in evidence.answers if level.answers], asked_all=False)
        record = _judged(given, plan, built, evidence.fidelities, evidence.answers)
        more = looks.remaining(still_open)
    if not more:
        return record
    return replace(record, decision=replace(record.decision, next=(*record.decision.next, more)))


def _judged(
    given: Given,
    plan: Plan,
    built: Mapping[Subject, LevelFile],
    fidelities: Sequence[Fidelity],
    answers: Sequence[LevelAnswers],
) -> RunRecord:
    """The decision that this evidence leads to, and all that it rests on."""
    results = results_of(given, answers)
    decision = decided(given, plan, built, fidelities, results, reference=answers[0].level)
    return _record(given, plan, built, fidelities, answers, results, decision)


def _with_guesses(given: Given, plan: Plan, built: Mapping[Subject, LevelFile], record: RunRecord) -> RunRecord:
    """The record with what guessing ahead gains, and the decision that tiers do so where it pays."""
    source = given.job.source
    own = LevelToAsk(Subject(source.sha256, level_of(source.model), file=source.sha256), source.path)
    runs = {name_of(run): run for run in (own, *runs_of(given, plan, built))}
    files = {subject.level: file.path for subject, file in built.items() if not file.path.is_dir()}

    def try_on(level: str) -> SpeculationReport:
        run = runs[level]
        tried = Tried(run.path, ways_of(given.settings.speculate, run.path, files), level, run.cache)
        return measured(tried, given.workload, given.recorded, n_ctx=plan.n_ctx, work=given.job)

    def decide_with(guesses: Mapping[str, TierGuesses]) -> Decision:
        reference = record.reference
        return decided(given, plan, built, record.fidelities, record.results, reference=reference, guesses=guesses)

    return with_guesses(record, list(runs), try_on, decide_with)


def _planned(given: Given) -> Plan:
    """The plan, when at least one level fits and what fits can be built. With a level as the reference, larger ones
    are left out."""
    reference, source = named_reference(given.settings), given.job.source
    for cache in given.settings.caches:
        check_cache(source.model, cache)
    if given.settings.speculate:
        check_ways(given.settings.speculate, source.path, [level.name for level in wanted_levels(given.settings)])
    if given.settings.caches and (why := engine_missing(source.model)):
        raise UnknownArchitecture(
            f"Losses by cache cannot be measured: {why}.",
            means="They come from llama.cpp's own library.",
            do="Leave out --kv.",
        )
    plans = {
        cache: make_plan(
            source.model, given.machine, n_ctx=given.settings.n_ctx, levels=wanted_levels(given.settings),
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


def _levels_to_build(given: Given, plan: Plan) -> list[Level]:
    """Every level that fits, the reference, and checkpoints, whose engines may run elsewhere; the source itself is the
    file of its own level."""
    named = {level.name: level for level in wanted_levels(given.settings)}
    own, reference = level_of(given.job.source.model), named_reference(given.settings)
    levels = [(row, named[level]) for row in plan.levels if (level := split_name(row.level)[0]) != own]
    kept = (level for row, level in levels if row.fits or level == reference or level.container is Container.FOLDER)
    return list(dict.fromkeys(kept))


def _tell_twins(given: Given, built: Mapping[Subject, LevelFile]) -> None:
    """Say which levels are other levels under another name."""
    for subject, first in given.recorded.one_of_each(built).items():
        if subject != first:
            line = f"{subject.level} has the weights of {first.level}: what is measured of one holds for both"
            given.job.journal.reused.append(line)
            given.job.journal.say(f"{line}.")


def _needs_engine(given: Given, levels: Sequence[Level]) -> bool:
    """Whether the workload is to be answered by files, the source's or a level's."""
    own = given.settings.reference is None or reference_level(given) == level_of(given.job.source.model)
    return own or any(level.container is Container.FILE for level in levels)


def _record(
    given: Given,
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
            level.level: wording_changes(given.workload, answers[0].answers, level.answers)
            for level in answers[1:]
            if level.answers
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
