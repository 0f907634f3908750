"""Speeds of levels that can be compared: measured in turns, A B C A B C, with one request at a time.

A machine's speed drifts by more than levels differ: by what else runs, by its temperature. Levels measured one after
the other each see another machine; in one round all see about the same, so rounds are compared with rounds
(``stats.paired.ratio_interval``). Rounds in which other programs took part of the processor are left out where there
are enough others. There are as many rounds as it takes to tell the levels apart, within limits.
"""

from __future__ import annotations

import itertools
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
from bitladder.stages.evaluate import DECODE_TOKENS, PREFILL_TOKENS, decode_rates
from bitladder.stats.paired import ratio_interval

if TYPE_CHECKING:
    from bitladder.describe.cache_types import CacheTypes
    from bitladder.engines.base import Running
    from bitladder.stages.ask import LevelToAsk
    from bitladder.stages.job import Work
    from bitladder.store.recorded import Recorded

LEAST_ROUNDS, MOST_ROUNDS = 3, 10
LONG_S = 60.0
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
    speeds = measure_in_turns([level.path for level in levels], work, [level.cache for level in levels], past)
    for level, fact, speed in zip(levels, facts, speeds, strict=True):
        recorded.keep_speed(level.subject, fact, speed)
    return speeds, False


def _room(past: int) -> int:
    return ROOM + -(-past // 256) * 256


def measure_in_turns(
    paths: Sequence[Path], work: Work, caches: Sequence[CacheTypes] = (), past: int = 0
) -> list[Speed]:
    """Speeds of models in files or folders, measured in turns, each with its KV cache and behind so many tokens.

    Raises:
        EngineError: an engine failed.
    """
    turns, began = datetime.now(UTC).isoformat(timespec="milliseconds"), time.monotonic()
    rounds: list[list[_Round]] = []
    with ExitStack() as stack:
        engines = _Engines(paths, work, stack, caches or [F16_CACHE] * len(paths), past)
        for number in range(MOST_ROUNDS):
            work.progress("speeds, rounds", number, MOST_ROUNDS)
            rounds.append([_timed(engines, at, number) for at in range(len(paths))])
            if _enough(rounds, time.monotonic() - began):
                break
    work.progress("speeds, rounds", MOST_ROUNDS, MOST_ROUNDS)
    return [_speed(own, turns) for own in zip(*_kept(rounds), strict=True)]


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
        decode_rates(engine, -1, self.past)
        return engine


def _files(path: Path) -> list[Path]:
    return [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]


def _timed(engines: _Engines, at: int, number: int) -> _Round:
    with engines.turn(at) as engine, OtherLoad() as others:
        prefill, decode = decode_rates(engine, number, engines.past)
    return _Round(prefill, decode, others.share, engine.load_seconds)


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


def _speed(rounds: Sequence[_Round], turns: str) -> Speed:
    return Speed(
        statistics.median(one.prefill for one in rounds),
        statistics.median(one.decode for one in rounds),
        rounds[0].load_seconds,
        statistics.median(one.others_share for one in rounds),
        rounds=tuple(one.decode for one in rounds),
        turns=turns,
    )
