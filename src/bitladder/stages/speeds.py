"""Speeds of levels that can be compared: measured in turns, A B C A B C, with one request at a time.

A machine's speed drifts by more than levels differ: by what else runs, by its temperature. Levels measured one after
the other each see another machine; in one round all see about the same, so rounds are compared with rounds
(``stats.paired.ratio_interval``). Rounds in which other programs took part of the processor are left out where there
are enough others. There are as many rounds as it takes to tell the levels apart, within limits. A level's prompt is
computed once, in a round that nothing disturbs; the others decode after it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.describe.cache_types import F16_CACHE
from bitladder.files.probe import OtherLoad, probe_machine
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
CLOSE = 1.04
"""A ratio known to within this factor both ways needs no further rounds."""
ROOM = -(-(PREFILL_TOKENS + DECODE_TOKENS + 16) // 256) * 256
MOST_PAST = 2048
"""Tokens of context at most that decoding is timed behind, where caches are compared: they are computed first."""
SHARE_OF_MEMORY = 0.7
"""Of what is free, that engines kept side by side may take with their files."""


@dataclass(frozen=True)
class _Round:
    """One level in one round."""

    prefill: float
    """NaN where the prompt was not computed."""
    decode: float
    others_share: float
    load_seconds: float


def speeds_in_turns(
    levels: Sequence[LevelToAsk], recorded: Recorded, work: Work, *, past: int = 0
) -> tuple[list[Speed], bool]:
    """Speeds of levels in files, in their order, and whether all were stored already. ``past``: tokens of context
    that decoding is timed behind.

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
        [level.path for level in timed], work, caches=[level.cache for level in timed], past=past
    )
    speed_of = dict(zip((level.subject for level in timed), measured, strict=True))
    speeds = [speed_of[same[level.subject]] for level in levels]
    for level, fact, speed in zip(levels, facts, speeds, strict=True):
        recorded.keep_speed(level.subject, fact, speed)
    return speeds, False


def _room(past: int) -> int:
    return ROOM + -(-past // 256) * 256


def measure_in_turns(
    paths: Sequence[Path],
    work: Work,
    *,
    most: int = MOST_ROUNDS,
    caches: Sequence[CacheTypes] = (),
    past: int = 0,
) -> list[Speed]:
    """Speeds of models in files or folders, measured in turns, in at most so many rounds, each with its KV cache and
    behind so many tokens of context.

    Raises:
        EngineError: an engine failed.
    """
    turns, began = datetime.now(UTC).isoformat(timespec="milliseconds"), time.monotonic()
    rounds: list[list[_Round]] = []
    with ExitStack() as stack:
        engines = _Engines(paths, work, stack, caches or [F16_CACHE] * len(paths), past)
        for number in range(most):
            work.progress("speeds, rounds", number, most)
            rounds.append([engines.rates(at, number) for at in range(len(paths))])
            if _enough(rounds, time.monotonic() - began):
                break
    work.progress("speeds, rounds", most, most)
    prefills = [_prefill(own) for own in zip(*rounds, strict=True)]
    kept = zip(*_kept(rounds), strict=True)
    return [_speed(own, prefill, turns) for own, prefill in zip(kept, prefills, strict=True)]


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
        self._prompts: dict[int, int] = {}

    def rates(self, at: int, number: int) -> _Round:
        """One level in round ``number``."""
        known = self._prompts.get(at)
        with self.turn(at) as engine, OtherLoad() as others:
            repeat = number if known is None else known
            prefill, decode = decode_rates(engine, repeat, again=known is not None, past=self.past)
        if self._side_by_side and not others.share > MOST_OTHERS_SHARE:
            self._prompts.setdefault(at, number)
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


def _quiet(one: Sequence[_Round]) -> bool:
    return all(not level.others_share > MOST_OTHERS_SHARE for level in one)


def _kept(rounds: Sequence[Sequence[_Round]]) -> Sequence[Sequence[_Round]]:
    """The rounds that nothing disturbed, where there are enough of them."""
    quiet = [one for one in rounds if _quiet(one)]
    return quiet if len(quiet) >= LEAST_ROUNDS else rounds


def _enough(rounds: Sequence[Sequence[_Round]], seconds: float) -> bool:
    if len(rounds) < LEAST_ROUNDS:
        return False
    if seconds > LONG_S:
        return True
    quiet = [one for one in rounds if _quiet(one)]
    if len(quiet) < LEAST_ROUNDS:
        return False
    levels = list(zip(*([level.decode for level in one] for one in quiet), strict=True))
    return all(_told_apart(one, other) for one, other in itertools.combinations(levels, 2))


def _told_apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one is surely the faster by a margin, or the ratio known well enough to call them equal."""
    ratio, low, high = ratio_interval(one, other)
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
