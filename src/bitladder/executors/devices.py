"""Several devices of one machine: a thread for each, and the units of the same numbers on each whatever happens.

CPU and GPU round sums differently, so which device a unit is computed on is decided by its number, not by who is free.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from bitladder.executors.base import Executor, Handle, Lane, Task


@dataclass(frozen=True)
class _Part:
    """Of the pair that a unit gives."""

    future: Future[tuple[Any, Any]]
    number: int


@dataclass(frozen=True)
class _Started:
    future: Future[tuple[Any, Any]]

    @property
    def held(self) -> Handle:
        """As ``Started``."""
        return _Part(self.future, 1)

    @property
    def answer(self) -> Handle:
        """As ``Started``."""
        return _Part(self.future, 0)

    def result(self) -> Any:
        """As ``Started``."""
        return self.future.result()[0]

    def wait(self) -> None:
        """As ``Started``."""
        wait([self.future])


class Devices(Executor):
    """A lane for each device, named as often as it should have lanes."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._lanes = [Lane(number, device, own_process=False) for number, device in enumerate(devices)]
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"lane {lane.number}") for lane in self._lanes]
        self._next = itertools.count()
        self.here = tuple(devices)
        self.device = next((device for device in devices if device != "cpu"), "cpu")

    def start(self, task: Task, unit: Any, *held: Handle, place: int | None = None) -> _Started:
        """As ``Executor``."""
        number = (next(self._next) if place is None else place) % len(self._lanes)

        def computed() -> tuple[Any, Any]:
            # A unit only waits for units begun before it, so lanes cannot wait for one another in a circle.
            return task.compute(self._lanes[number], unit, *(self.fetch(one) for one in held))

        return _Started(self._pools[number].submit(computed))

    def at_once(self, task: Task) -> int:  # noqa: ARG002
        """As ``Executor``: one for each lane."""
        return len(self._lanes)

    def put(self, value: Any) -> Handle:
        """As ``Executor``."""
        done: Future[tuple[Any, Any]] = Future()
        done.set_result((None, value))
        return _Part(done, 1)

    def fetch(self, handle: Handle) -> Any:
        """As ``Executor``."""
        return handle.future.result()[handle.number]

    def close(self) -> None:
        """As ``Executor``."""
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)
