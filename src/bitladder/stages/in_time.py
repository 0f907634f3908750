"""What a run that must end in time builds, and how long a run may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from bitladder.describe.depths import usual_depths
from bitladder.describe.text import CHARACTERS_PER_TOKEN
from bitladder.errors import BitladderError
from bitladder.levels import Level, RecipeLevel
from bitladder.plan.schedule import Kind, Piece, looks, spread
from bitladder.records.plan import DEFAULT_CTX, Plan
from bitladder.stages.calibration import importance_need
from bitladder.stages.documents import material
from bitladder.stages.engine_way import deployed_seconds
from bitladder.stages.forecast import building_need, corrected_seconds, walking_need
from bitladder.stages.job import AUTO
from bitladder.stages.looks import Costs, Countdown, TooLittleTime
from bitladder.stages.run_facts import AUTO_TIME, level_of
from bitladder.stages.run_given import Given, endpoints_of, named_reference
from bitladder.stages.speeds import LEAST_ROUNDS
from bitladder.units import human_duration

_BUILDING_SHARE = 0.5
"""Of the time, for the importance matrix and for building levels."""
_IMPORTANCE_SHARE = 0.2
"""Of the time, for the importance matrix: what it is gathered on is cut to it."""
_CALIBRATION_SHARES = (1.0, 0.5, 0.25, 0.125)
"""Few, so that a later run with another bound finds the matrix of an earlier one, and the levels made with it."""
_WORTH_SAYING_S = 30.0


def in_time(given: Given, plan: Plan, levels: Sequence[Level]) -> tuple[Given, list[Level]]:
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
    reference = named_reference(given.settings)
    candidates = [row.level for row in plan.levels if row.level in named and named[row.level] != reference]
    wanted = material(job.windows(given.texts), given.workload.inputs)
    costs = Costs(wanted, job.source, plan.levels, reference.name if reference else level_of(job.source.model))
    if given.settings.within != AUTO_TIME:
        given = with_less_calibration(given, _IMPORTANCE_SHARE * countdown.usable)
    first = importance_seconds(given)
    known = {file.level for file in given.recorded.files(job.source.sha256)}  # an earlier run got to them

    def building(some: Sequence[str]) -> float:
        return first + corrected_seconds(building_need(job, [named[name] for name in some], given.build))

    smallest = candidates[-1:]
    least = building(smallest) + costs.shortest_look([name for name in smallest if name not in known])
    if smallest and least > countdown.left:
        least = countdown.whole(countdown.passed + least)
        rest = "; --imatrix none does without the importance matrix" if first else ""
        raise TooLittleTime(
            f"{human_duration(countdown.seconds)} are too short for one look at {smallest[0]}, the smallest level.",
            means=f"About {human_duration(least)} are needed: {human_duration(first)} for the importance matrix, the "
            "rest to build the level and to look at it beside the reference.",
            do=f"Write --within {math.ceil(least * 1.1)}s or more{rest}.",
        )

    def proving(some: Sequence[str]) -> float:
        """Of the whole time: building takes its share, and is for nothing where no time is left to look at losses."""
        built = building(some)
        return max(built / _BUILDING_SHARE, built + costs.losses([name for name in some if name not in known]))

    chosen = spread(candidates, proving, countdown.left) or tuple(smallest)
    left_out = [name for name in candidates if name not in chosen]
    if left_out:
        job.journal.warn(f"There is no time to build {', '.join(left_out)}: a longer --within takes them in.")
    countdown.watch()
    return given, [level for level in levels if level.name in chosen or level == reference]


def _say_estimate(given: Given, plan: Plan, levels: Sequence[Level]) -> None:
    """How long the whole run may take, where nothing of it was done yet and all of it can be predicted."""
    job = given.job
    known = {file.level for file in given.recorded.files(job.source.sha256)}
    missing = [level.name for level in levels if level.name not in known]
    if not missing or endpoints_of(given.settings) or not all(isinstance(level, RecipeLevel) for level in levels):
        return
    costs = Costs(material((), given.workload.inputs), job.source, plan.levels, level_of(job.source.model))
    asking = [Piece(Kind.INPUTS, tuple(missing), 0, len(given.workload.inputs))]
    timing = [Piece(Kind.ROUNDS, tuple(missing), 0, LEAST_ROUNDS)]
    try:
        seconds = importance_seconds(given) + corrected_seconds(building_need(job, levels, given.build))
        engine_s = sum(map(costs, asking + timing)) * max(1, len(given.settings.caches))
        seconds += _measuring_seconds(given, missing) + engine_s
    except BitladderError:  # told where it matters
        return
    if seconds >= _WORTH_SAYING_S:
        most, less = ("About", "") if given.settings.full else ("Up to", ", less for levels that cannot be chosen")
        shorter = "a smaller --ctx or less --text takes less" if given.settings.caches else "--within bounds the time"
        job.journal.say(f"{most} {human_duration(seconds)} on this machine, by what is known of it{less}; {shorter}.")


def _measuring_seconds(given: Given, levels: Sequence[str]) -> float:
    """Predicted, of all levels on all texts; with caches in the engine, each level with each of them."""
    job, caches = given.job, given.settings.caches
    if caches:
        windows = job.depth_windows(given.texts, usual_depths(given.settings.n_ctx or DEFAULT_CTX))
        return deployed_seconds(job, [cache for _ in levels for cache in caches], windows)
    tokens = sum(len(text.text) for text in given.texts) // CHARACTERS_PER_TOKEN
    return corrected_seconds(walking_need(job.source, tokens, levels))


_LEAST_DEFAULT_S, _TIMES_FIRST_LOOK = 120.0, 3.0
"""What ``--within auto`` is: building, and so many times the first look at everything, at least two minutes."""


def default_time(given: Given, plan: Plan, levels: Sequence[Level]) -> float:
    """Seconds of ``--within auto``: from what is known of the model and the machine."""
    job = given.job
    wanted = material(job.windows(given.texts), given.workload.inputs)
    costs = Costs(wanted, job.source, plan.levels, level_of(job.source.model))
    names = tuple(level.name for level in levels)
    first = [Piece(kind, names, 0, ends[0]) for kind in Kind if (ends := looks(kind, wanted.totals[kind]))]
    building = importance_seconds(given) + corrected_seconds(building_need(job, levels, given.build))
    seconds = building + _TIMES_FIRST_LOOK * sum(map(costs, first))
    return max(_LEAST_DEFAULT_S, 60.0 * math.ceil(seconds / 60.0))


def importance_seconds(given: Given) -> float:
    """Predicted, for gathering the importance matrix; 0 where that need not be done."""
    need = importance_need(given.job, given.build)
    return corrected_seconds(need) if need else 0.0


def with_less_calibration(given: Given, seconds: float) -> Given:
    """The importance matrix as an earlier run gathered it, on the most text that one did; else gathered on as much as
    these seconds suffice for."""
    if given.build.imatrix != AUTO:
        return given
    parts = [replace(given, build=replace(given.build, calibration_share=share)) for share in _CALIBRATION_SHARES]
    times = [importance_seconds(part) for part in parts]
    there = (part for part, time in zip(parts, times, strict=True) if not time)
    in_time = (part for part, time in zip(parts, times, strict=True) if time <= seconds)
    chosen = next(there, None) or next(in_time, parts[-1])
    if chosen is not parts[0]:
        share = chosen.build.calibration_share
        given.job.journal.warn(f"The importance matrix is gathered on {100 * share:.3g}% of the calibration text.")
    return chosen
