"""What a run measures, asks and times, and the decision that so much leads to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.describe.cache_types import F16_CACHE
from bitladder.describe.depths import usual_depths
from bitladder.engines.endpoint import EndpointSettings
from bitladder.errors import UnknownArchitecture
from bitladder.plan.decide import decide
from bitladder.records.decision import Decision, TierGuesses
from bitladder.records.evaluation import LevelAnswers, WorkloadResult
from bitladder.records.fidelity import Fidelity
from bitladder.records.plan import DEFAULT_CTX, Plan
from bitladder.stages.ask import Asker, LevelToAsk, ServedLevel, name_of
from bitladder.stages.contest import answers_that_matter
from bitladder.stages.engine_way import way_for
from bitladder.stages.evaluate import compare
from bitladder.stages.measure import Ways, built_candidate, fidelities_by_depth, fidelity_of_reference
from bitladder.stages.run_facts import level_of
from bitladder.stages.run_given import Given, named_reference, reference_level
from bitladder.store.recorded import Subject

if TYPE_CHECKING:
    from bitladder.records.level_file import LevelFile
    from bitladder.stages.ask import Contender
    from bitladder.stages.fidelity import Candidate


def measured_fidelities(given: Given, plan: Plan, built: Mapping[Subject, LevelFile]) -> list[Fidelity]:
    """Fidelity of the files that were written; none, and a warning, where neither the walk nor the engine can go."""
    if given.settings.caches:
        return _measured_by_depth(given, runs_of(given, plan, built))
    with ExitStack() as stack:
        ways = ways_to_measure(given, built, stack)
        subjects = [subject for subject in built if subject != ways.reference]
        try:
            return ways.fidelities(subjects)
        except UnknownArchitecture as error:
            _warn_of_no_fidelity(given, error)
            return []


def _measured_by_depth(given: Given, runs: Sequence[LevelToAsk]) -> list[Fidelity]:
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


def measurable(given: Given, subjects: Sequence[Subject]) -> list[Subject]:
    """Those whose fidelity can be measured; none, and a warning, where neither the walk nor the engine can go."""
    try:
        way_for(given.job.source)
    except UnknownArchitecture as error:
        _warn_of_no_fidelity(given, error)
        return []
    return list(subjects)


def _warn_of_no_fidelity(given: Given, error: UnknownArchitecture) -> None:
    given.job.journal.warn(
        f"No fidelity was measured: {error.found} {error.means} The decision rests on the workload alone."
    )


def asked_levels(
    given: Given, plan: Plan, built: Mapping[Subject, LevelFile], fidelities: Sequence[Fidelity]
) -> list[LevelAnswers]:
    """The workload through everyone whose answers matter: the reference first, the levels, then models behind
    addresses."""
    asker = Asker(given.workload, given.context, given.recorded, plan.n_ctx, given.job)
    contenders = contenders_of(given, plan, built)
    if given.settings.full:
        return asker.ask_all(contenders)

    def decide_on(answers: Sequence[LevelAnswers]) -> Decision:
        results = results_of(given, answers)
        return decided(given, plan, built, fidelities, results, reference=answers[0].level)

    every = bool(given.settings.speculate)
    return answers_that_matter(asker, contenders, decide_on, sizes_of(plan), every=every)


def contenders_of(given: Given, plan: Plan, built: Mapping[Subject, LevelFile]) -> list[Contender]:
    """Who answers the workload, the reference first."""
    settings, source = given.settings, given.job.source
    own = LevelToAsk(Subject(source.sha256, level_of(source.model), file=source.sha256), source.path)
    served = {level.name: endpoint for level, endpoint in settings.served}
    folders = [ServedLevel(name, endpoint) for name, endpoint in served.items()]
    levels: list[LevelToAsk | ServedLevel] = [*runs_of(given, plan, built), *folders]
    named = reference_level(given)
    if named is None:  # the source is a level like the others
        fits = any(level.fits and level.level == own.subject.level for level in plan.levels)
        assert isinstance(settings.reference, Path | EndpointSettings)
        return [settings.reference, *([own] if fits else []), *levels, *settings.also]
    reference = next((level for level in levels if name_of(level) == named), own)
    return [reference, *(level for level in levels if level is not reference), *settings.also]


def runs_of(given: Given, plan: Plan, built: Mapping[Subject, LevelFile]) -> list[LevelToAsk]:
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


def ways_to_measure(given: Given, built: Mapping[Subject, LevelFile], stack: ExitStack) -> Ways:
    """How fidelity of the files that were written is measured; they stay open as long as ``stack``."""
    named = named_reference(given.settings)
    reference = next((subject for subject in built if named is not None and subject.level == named.name), None)

    def candidates(missing: Sequence[Subject]) -> list[Candidate]:
        return [built_candidate(given.job.source, built[subject], stack) for subject in missing]

    def files(missing: Sequence[Subject]) -> list[Path]:
        return [built[subject].path for subject in missing]

    return Ways(given.job, candidates, files, given.texts, given.recorded, reference)


def results_of(given: Given, answers: Sequence[LevelAnswers]) -> list[WorkloadResult]:
    """Each level beside the reference, which is the first; of those that were not asked the speed alone, if any."""
    known = (one for one in answers[1:] if one.answers or math.isfinite(one.speed.decode_tokens_per_s))
    return [compare(answers[0], level, given.workload) for level in known]


def decided(
    given: Given,
    plan: Plan,
    built: Mapping[Subject, LevelFile],
    fidelities: Sequence[Fidelity],
    results: Sequence[WorkloadResult],
    *,
    reference: str,
    guesses: Mapping[str, TierGuesses] | None = None,
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
        guesses=guesses,
    )
    files = {level_of(given.job.source.model): given.job.source.sha256}
    files |= {file.level: file.sha256 for file in built.values()}
    files |= {name_of(run): files[run.subject.bare.level] for run in runs_of(given, plan, built)}
    return replace(decision, files=files)


def _known_of_source(given: Given, plan: Plan, fidelities: Sequence[Fidelity]) -> list[Fidelity]:
    """That the source is as close to itself as can be, where it is a level like the others."""
    own = level_of(given.job.source.model)
    rival = reference_level(given) is None and any(level.level == own for level in plan.levels)
    return [fidelity_of_reference(fidelities[0], own)] if rival and fidelities else []


def sizes_of(plan: Plan) -> dict[str, int]:
    """Bytes of each level's file."""
    return {level.level: level.file_bytes for level in plan.levels}
