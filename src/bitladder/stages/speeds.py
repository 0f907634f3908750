"""Speeds of levels that can be compared: measured in turns, A B C A B C, with one request at a time.

A machine's speed drifts by more than levels differ: by what else runs, by its temperature. Levels measured one after
the other each see another machine; in one round all see about the same, so rounds are compared with rounds
(``stats.paired.ratio_interval``). Rounds in which other programs took part of the processor are left out where there
are enough others. There are as many rounds as it takes to tell the levels apart, within limits. Where only the fastest
is looked for (``Race``), levels that are surely slower than another, or surely not faster than what the fastest must
beat, take no part in the later ones (a race, as Maron and Moore, Artificial Intelligence Review 11 (1997) 193-225, call
it), so there are more of them in the same time. A level's prompt is computed once, in a round that nothing disturbs if
there is one; the others decode after it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.describe.cache_types import F16_CACHE
from bitladder.files.probe import OtherLoad, probe_machine
from bitladder.plan.judge import SAME_SPEED
from bitladder.records.evaluation import MOST_OTHERS_SHARE, Speed
from bitladder.stages.evaluate import DECODE_TOKENS, PREFILL_TOKENS, decode_rates, warm_up
from bitladder.stats.paired import ratio_interval

if TYPE_CHECKING:
    from bitladder.describe.cache_types import CacheTypes
    from bitladder.engines.base import Running
    from bitladder.stages.ask import LevelToAsk
    from bitladder.stages.job import Work
    from bitladder.store.recorded import Recorded

LEAST_ROUNDS, MOST_ROUNDS = 3, 10
LONG_S = 45.0
"""Rounds beyond the least are begun only within this time: of large models the least are enough to pay for."""
_ROUNDS_OF_EQUALS = 6
"""Rounds at least of levels that are about as fast as what stays: after fewer it is too little known what another run
would find of them."""
CLOSE = 1.04
"""A ratio known to within this factor both ways needs no further rounds."""
ROOM = -(-(PREFILL_TOKENS + DECODE_TOKENS + 16) // 256) * 256
MOST_PAST = 2048
"""Tokens of context at most that decoding is timed behind, where caches are compared: they are computed first."""
SHARE_OF_MEMORY = 0.7
"""Of what is free, that engines kept side by side may take with their files."""


@dataclass(frozen=True)
class Race:
    """Levels of which the fastest is looked for."""

    stays: frozenset[str] = frozenset()
    """Timed in every round: what others must be faster than."""
    leaves: frozenset[str] = frozenset()
    """Timed in the first rounds alone: it is good to know how fast they are, and nothing depends on it."""


@dataclass(frozen=True)
class _Round:
    """One level in one round."""

    prefill: float
    """NaN where the prompt was not computed."""
    decode: float
    others_share: float
    load_seconds: float


def speeds_in_turns(
    levels: Sequence[LevelToAsk], recorded: Recorded, work: Work, *, past: int = 0, race: Race | None = None
) -> tuple[list[Speed], bool]:
    """Speeds of levels in files, in their order, and whether all were stored already. ``past``: tokens of context
    that decoding is timed behind. ``race``: None where all levels are timed in every round.

    Stored ones are taken when all of them were measured in the same turns and other programs left them alone; else all
    are measured anew, since rounds of another time say nothing of their order.

    Raises:
        EngineError: an engine failed.
    """
    from bitladder.engines.registry import container_of
    from bitladder.stages.run_facts import engine_facts

    if not levels:
        return [], True
    facts = [
        engine_facts(n_ctx=_room(past), n_parallel=1, threads=work.threads, container=container_of(level.path))
        for level in levels
    ]
    stored = [recorded.speed(level.subject, fact) for level, fact in zip(levels, facts, strict=True)]
    known = [speed for speed in stored if speed is not None and speed.turns and not speed.disturbed]
    if len(known) == len(levels) and len({speed.turns for speed in known}) == 1:
        return known, True
    same = recorded.one_of_each([level.subject for level in levels])
    timed = [level for level in levels if same[level.subject] == level.subject]
    measured = measure_in_turns(
        [level.path for level in timed],
        work,
        caches=[level.cache for level in timed],
        past=past,
        race=race and _without_twins(race, {one.level: first.level for one, first in same.items()}),
        names=[level.subject.level for level in timed],
    )
    speed_of = dict(zip((level.subject for level in timed), measured, strict=True))
    speeds = [speed_of[same[level.subject]] for level in levels]
    for level, fact, speed in zip(levels, facts, speeds, strict=True):
        recorded.keep_speed(level.subject, fact, speed)
    return speeds, False


def _without_twins(race: Race, first: Mapping[str, str]) -> Race:
    """The same of levels that stand for those that are equal to them, byte for byte."""
    stays, leaves = (frozenset(first.get(name, name) for name in names) for names in (race.stays, race.leaves))
    return Race(stays, leaves - stays)


def _room(past: int) -> int:
    return ROOM + -(-past // 256) * 256


def measure_in_turns(
    paths: Sequence[Path],
    work: Work,
    *,
    most: int = MOST_ROUNDS,
    caches: Sequence[CacheTypes] = (),
    past: int = 0,
    race: Race | None = None,
    names: Sequence[str] = (),
) -> list[Speed]:
    """Speeds of models in files or folders, measured in turns.

    Args:
        paths: the models.
        work: threads and progress.
        most: rounds at most.
        caches: the KV cache of each; llama.cpp's own by default.
        past: tokens of context that decoding is timed behind.
        race: who takes part in which rounds; None for all in all.
        names: what ``race`` calls the models.

    Raises:
        EngineError: an engine failed.
    """
    turns, began = datetime.now(UTC).isoformat(timespec="milliseconds"), time.monotonic()
    rounds: list[dict[int, _Round]] = []
    everyone = range(len(paths))
    racing = set(everyone)
    stays, leaves = (_places(wanted, names) for wanted in ((race.stays, race.leaves) if race else ((), ())))
    with ExitStack() as stack:
        engines = _Engines(paths, work, stack, caches or [F16_CACHE] * len(paths), past)
        for number in range(most):
            work.progress("speeds, rounds", number, most)
            rounds.append({at: engines.rates(at, number) for at in everyone if at in racing})
            if race is not None:
                racing = _racing(_quiet_rates(rounds), racing, stays, leaves)
            if _enough(rounds, racing, time.monotonic() - began):
                break
    work.progress("speeds, rounds", most, most)
    kept = _kept(rounds)
    own = {at: [one[at] for one in kept if at in one] for at in everyone}
    prefills = [_prefill([one[at] for one in rounds if at in one]) for at in everyone]
    return [_speed(own[at], prefill, turns) for at, prefill in zip(everyone, prefills, strict=True)]


def _places(wanted: Collection[str], names: Sequence[str]) -> set[int]:
    return {at for at, name in enumerate(names) if name in wanted}


class _Engines:
    """Engines side by side where memory allows, else one after the other."""

    def __init__(
        self, paths: Sequence[Path], work: Work, stack: ExitStack, caches: Sequence[CacheTypes], past: int
    ) -> None:
        self._paths, self._work, self._stack, self._caches, self.past = paths, work, stack, caches, past
        sizes = [sum(file.stat().st_size for file in _files(path)) for path in paths]
        machine = probe_machine()
        free = sum(gpu.vram_free for gpu in machine.gpus) if machine.gpus else machine.ram_available
        self._side_by_side = sum(sizes) <= SHARE_OF_MEMORY * free
        self._running: dict[int, Running] = {}
        self._prompts: dict[int, tuple[int, bool]] = {}
        """The round whose prompt an engine holds, and whether others disturbed it."""
        self._busy = False
        """Whether other programs took the processor in the last turn."""

    def rates(self, at: int, number: int) -> _Round:
        """One level in round ``number``. A prompt that others disturbed is computed once more as soon as they seem to
        have gone."""
        held, disturbed = self._prompts.get(at, (None, True))
        repeat = number if held is None or (disturbed and not self._busy) else held
        again = repeat == held
        with self.turn(at) as engine, OtherLoad() as others:
            prefill, decode = decode_rates(engine, repeat, again=again, past=self.past)
        self._busy = others.share > MOST_OTHERS_SHARE
        if self._side_by_side and not again:
            self._prompts[at] = repeat, self._busy
        return _Round(prefill, decode, others.share, engine.load_seconds)

    @contextmanager
    def turn(self, at: int) -> Iterator[Running]:
        """The engine of one level, warm."""
        if at in self._running:
            yield self._running[at]
            return
        with ExitStack() as passing:
            engine = self._start(at, self._stack if self._side_by_side else passing)
            if self._side_by_side:
                self._running[at] = engine
            yield engine

    def _start(self, at: int, stack: ExitStack) -> Running:
        from bitladder.engines.base import Launch
        from bitladder.engines.llama import with_cache
        from bitladder.engines.registry import start

        launch = Launch(self._paths[at], n_ctx=_room(self.past), threads=self._work.threads)
        engine = stack.enter_context(start(with_cache(launch, self._caches[at])))
        if self.past:
            decode_rates(engine, -1, again=False, past=self.past)
        else:
            warm_up(engine)
        return engine


def _files(path: Path) -> list[Path]:
    return [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]


def _quiet(one: Mapping[int, _Round]) -> bool:
    return all(not level.others_share > MOST_OTHERS_SHARE for level in one.values())


def _kept(rounds: Sequence[Mapping[int, _Round]]) -> Sequence[Mapping[int, _Round]]:
    """The rounds that nothing disturbed, where there are enough of them."""
    quiet = [one for one in rounds if _quiet(one)]
    return quiet if len(quiet) >= LEAST_ROUNDS else rounds


def _quiet_rates(rounds: Sequence[Mapping[int, _Round]]) -> dict[int, list[float]]:
    """Rates of each level in the rounds that nothing disturbed."""
    found: dict[int, list[float]] = {}
    for one in rounds:
        for at, level in one.items() if _quiet(one) else ():
            found.setdefault(at, []).append(level.decode)
    return found


def _racing(
    rates: Mapping[int, Sequence[float]], racing: Collection[int], stays: Collection[int], leaves: Collection[int]
) -> set[int]:
    """Who takes part in the next round: once there are enough rounds, those that stay, and those of the others that no
    level is surely faster than by a margin that counts, and that may be faster by it than those that stay. A level that
    left saw the first rounds."""
    enough = {at: own for at, own in rates.items() if len(own) >= LEAST_ROUNDS}
    if not all(at in enough for at in racing):
        return set(racing)
    rivals = enough.keys() - set(leaves)

    def beaten(at: int) -> bool:
        return any(_ratio(enough[other], enough[at])[1] > 1 + SAME_SPEED for other in rivals - {at})

    def hopeless(at: int) -> bool:
        known = len(enough[at]) >= _ROUNDS_OF_EQUALS
        return known and any(_ratio(enough[at], enough[other])[2] < 1 + SAME_SPEED for other in stays)

    return {at for at in racing if at in stays or (at not in leaves and not beaten(at) and not hopeless(at))}


def _enough(rounds: Sequence[Mapping[int, _Round]], racing: Collection[int], seconds: float) -> bool:
    """Whether the levels that are still timed are told apart, or there is no time for another round."""
    if len(rounds) < LEAST_ROUNDS:
        return False
    if seconds > LONG_S:
        return True
    rates = _quiet_rates(rounds)
    if any(len(rates.get(at, ())) < LEAST_ROUNDS for at in racing):
        return False
    return all(_told_apart(rates[one], rates[other]) for one, other in itertools.combinations(sorted(racing), 2))


def _ratio(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Of the rates in the rounds that both took part in: the first ones of the one that took part in more."""
    shared = min(len(one), len(other))
    return ratio_interval(one[:shared], other[:shared])


def _told_apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one is surely the faster by a margin, or the ratio known well enough to call them equal."""
    ratio, low, high = _ratio(one, other)
    return low > CLOSE or high < 1 / CLOSE or (high / ratio < CLOSE and ratio / low < CLOSE)


def _prefill(rounds: Sequence[_Round]) -> float:
    """The median over undisturbed rounds in which the prompt was computed, else over all."""
    computed = [one for one in rounds if not math.isnan(one.prefill)]
    quiet = [one.prefill for one in computed if not one.others_share > MOST_OTHERS_SHARE]
    return statistics.median(quiet or [one.prefill for one in computed] or [math.nan])


def _speed(rounds: Sequence[_Round], prefill: float, turns: str) -> Speed:
    return Speed(
        prefill,
        statistics.median(one.decode for one in rounds),
        rounds[0].load_seconds,
        statistics.median(one.others_share for one in rounds),
        rounds=tuple(one.decode for one in rounds),
        turns=turns,
    )
