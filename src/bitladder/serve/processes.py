"""One gateway as several processes behind one port.

They share the listening socket, which the system hands connections out from, and so lose none when one of them ends.
Each has tiers, queues, limits and a view of its replicas of its own; keys are read from the same file by each. What
they counted is put together when one of them is asked for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from bitladder.errors import EngineError
from bitladder.units import MiB

log = logging.getLogger("bitladder.serve")

_ASK_S = 1.0
_LARGEST = 16 * MiB
_SHORT_LIFE_S, _PAUSE_S = 5.0, 1.0
"""A process that lived no longer is started again only after a pause."""


@dataclass(frozen=True)
class Sibling:
    """One of ``count`` processes; their sockets lie in ``folder``."""

    folder: Path
    number: int
    count: int
    parent: int = -1
    """A pipe that ends when the parent does; only that one could write to it."""

    def follow_parent(self) -> None:
        """End in order when the parent is gone, however it ended: nothing would ask this process to."""
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(self.parent)
            os.kill(os.getpid(), signal.SIGTERM)

        loop.add_reader(self.parent, gone)

    def place(self, number: int) -> Path:
        """The socket of a process."""
        return self.folder / f"{number}.sock"

    @contextlib.asynccontextmanager
    async def telling(self, text: Callable[[], bytes]) -> AsyncIterator[None]:
        """Tell the others what this process counted, as Prometheus text."""

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                writer.write(text())
                await writer.drain()
            writer.close()

        self.place(self.number).unlink(missing_ok=True)  # of the process that this one stands in for
        server = await asyncio.start_unix_server(answer, self.place(self.number))
        async with server:
            yield

    async def together(self, own: bytes) -> bytes:
        """What all processes counted, each sample with the number of its process; one that does not answer is left
        out.
        """
        others = [number for number in range(self.count) if number != self.number]
        found = await asyncio.gather(*map(self._ask, others))
        return merged({self.number: own} | {number: text for number, text in zip(others, found, strict=True) if text})

    async def _ask(self, number: int) -> bytes:
        try:
            async with asyncio.timeout(_ASK_S):
                reader, writer = await asyncio.open_unix_connection(self.place(number))
                try:
                    return await _all_of(reader)
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return b""


async def _all_of(reader: asyncio.StreamReader) -> bytes:
    pieces, size = [], 0
    while (piece := await reader.read(1 << 16)) and size < _LARGEST:
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


class _Merged(Collector):
    """Families of several processes, as one."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        return self._families


def merged(texts: dict[int, bytes]) -> bytes:
    """Prometheus text of several processes as one text: every sample gets a label ``process``."""
    families: dict[str, Metric] = {}
    for number, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text.decode()):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [
                sample._replace(labels={"process": str(number), **sample.labels}) for sample in family.samples
            ]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(families.values()))
    return generate_latest(registry)


def in_processes(siblings: Sequence[Sibling], run: Callable[[Sibling, Callable[[], None]], None]) -> None:
    """Run a gateway in as many processes, until SIGINT or SIGTERM, which all of them get; one that ends is started
    again.

    ``run(sibling, ready)`` serves in a process of its own, and calls ``ready`` once it accepts requests. The first one
    must come so far before the others are started: what it refuses, the user hears of once.

    Raises:
        SystemExit: in the parent, the first process could not start (it has said why), with its exit code; and in each
            child at its end.
        EngineError: answers had to be cut at the end.
    """
    family = _Family(run)
    with family.signals():
        if not family.start(siblings[0], wait=True):
            if family.ending:
                return
            raise SystemExit(family.codes[-1] or 1)
        for sibling in siblings[1:]:
            family.start(sibling)
        family.look_after()
    cut = [code for code in family.codes if code]
    if cut:
        raise EngineError(
            f"{len(cut)} of {len(siblings)} processes of the gateway did not end in good order (exit codes "
            f"{', '.join(map(str, cut))}).",
            means="Answers were cut, or a process was killed; its log says which.",
        )


class _Family:
    """The parent's view of its processes."""

    def __init__(self, run: Callable[[Sibling, Callable[[], None]], None]) -> None:
        self._run = run
        self._lives = os.pipe()
        self._alive: dict[int, tuple[Sibling, float]] = {}
        self.codes: list[int] = []
        """Of processes that ended after they were asked to, or that never came so far."""
        self.ending = False

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Pass the signals that end a gateway on to all of them."""

        def end(number: int, _: object) -> None:
            self.ending = True
            for pid in tuple(self._alive):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, sibling: Sibling, *, wait: bool = False) -> bool:
        """Start a process; with ``wait`` until it serves, or ends. Whether it serves, as far as that is known."""
        hears, tells = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(hears)
            os.close(self._lives[1])
            os.setpgid(0, 0)  # a terminal sends Ctrl-C to its whole group: with the parent's there would be two
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _leave)
            if self.ending:
                os._exit(0)
            self._run(replace(sibling, parent=self._lives[0]), lambda: _tell(tells))
            raise SystemExit(0)
        os.close(tells)
        self._alive[pid] = (sibling, time.monotonic())
        serves = os.read(hears, 1) == b"1" if wait else True
        os.close(hears)
        if not serves:
            self.codes.append(self._wait()[1])
        return serves

    def look_after(self) -> None:
        """Until all have ended after they were asked to."""
        while self._alive:
            sibling, code, lived = self._wait()
            if self.ending:
                self.codes.append(code)
                continue
            log.error("gateway process lost", extra={"gateway": sibling.number, "code": code})
            if lived < _SHORT_LIFE_S:
                time.sleep(_PAUSE_S)
            if not self.ending:
                self.start(sibling)

    def _wait(self) -> tuple[Sibling, int, float]:
        """Whichever process ends next: which one, its exit code, the seconds that it lived."""
        pid, status = os.waitpid(-1, 0)
        while pid not in self._alive:
            pid, status = os.waitpid(-1, 0)
        sibling, began = self._alive.pop(pid)
        return sibling, os.waitstatus_to_exitcode(status), time.monotonic() - began


def _leave(*_: object) -> None:
    """Asked to end before the server has taken the signals over: nothing was accepted, so nothing is lost."""
    os._exit(0)


def _tell(pipe: int) -> None:
    with contextlib.suppress(OSError):
        os.write(pipe, b"1")
        os.close(pipe)
