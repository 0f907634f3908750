"""Child engines: start them, notice when they die or hang, start them again, and let two take turns in one
memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from bitladder.engines.base import Running, TellsOfTools
from bitladder.errors import BitladderError, EngineError
from bitladder.serve.backends import UpstreamFailed
from bitladder.serve.connections import ConnectionPool

log = logging.getLogger("bitladder.serve")

_POLL_S = 0.1
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.25, 15.0
_STEADY_S = 60.0  # running for so long forgives earlier deaths


class EngineFingerprint:
    """Size and time of a model when it was hashed: a file swapped under a running gateway is not served, nor one in a
    folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._look()

    def _look(self) -> tuple[int, ...]:
        stats = [path.stat() for path in (self._path, *(sorted(self._path.iterdir()) if self._path.is_dir() else ()))]
        return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats), stats[0].st_ino

    def check(self) -> None:
        """Raise EngineError when the file is another one by now."""
        try:
            now = self._look()
        except OSError as error:
            raise EngineError(f"The model file '{self._path}' is gone: {error}.") from None
        if now != self._seen:
            raise EngineError(
                f"The model file '{self._path}' had {self._seen[0]} bytes and has {now[0]}, or another time.",
                means="It was replaced while the gateway ran; the hash in the replies would be wrong.",
                do="Restart the gateway.",
            )


_GUESSED = "llamacpp:spec_decode_num_draft_tokens_total"
_ACCEPTED = "llamacpp:spec_decode_num_accepted_tokens_total"


def guess_counters(text: str) -> tuple[int, int] | None:
    """Tokens that llama.cpp guessed, and those of them that were right, from its ``/metrics``; None where it says
    neither."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name in (_GUESSED, _ACCEPTED) and value.strip().isdigit() and len(value) < 20:
            found[name] = int(value)
    return (found[_GUESSED], found[_ACCEPTED]) if len(found) == 2 else None


class Supervisor:
    """Keeps one engine running. States: ``stopped``, ``starting``, ``ready``, ``changing`` (to one started in another
    way), ``waiting`` (to restart)."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Running],
        pool: ConnectionPool,
        *,
        check_file: Callable[[], None] = lambda: None,
        health_every_s: float = 2.0,
        health_timeout_s: float = 5.0,
        health_misses: int = 2,
        guesses_key: str | None = None,
        should_change: Callable[[], bool] = lambda: False,
        on_ready: Callable[[float], None] = lambda _: None,
    ) -> None:
        """``guesses_key``: the key that the engine tells by how good its guesses are; None where it does not guess.
        ``should_change``: asked often whether it is to be started anew because ``make`` would make another one now, and
        nobody uses it. ``on_ready``: told the seconds that it took to load.
        """
        self.name = name
        self.state = "stopped"
        self.restarts = 0
        self.last_error = ""
        self.engine = ""
        """Engine and version, once it ran."""
        self.takes_tools: bool | None = None
        """Whether its model can be told of tools; None while that is not known."""
        self.guesses: tuple[int, int] | None = None
        """Tokens guessed ahead since the engine started, and those that were right; None where it does not guess."""
        self._guesses_key = guesses_key
        self._should_change, self._on_ready = should_change, on_ready
        self._make = make
        self._pool = pool
        self._check_file = check_file
        self._every = health_every_s
        self._health_timeout_s = health_timeout_s
        self._misses = health_misses
        self._process: Running | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    def address(self) -> str | None:
        """Base URL while the engine is ready."""
        self._notice_end()
        return self._process.base_url if self._ready.is_set() and self._process else None

    def _notice_end(self) -> None:
        """An engine that has ended is ready for nobody, before the next look at it."""
        if self._process is not None and self._process.poll() is not None:
            self._ready.clear()

    async def start(self) -> None:
        """Start it once, and from then on keep it running.

        Raises:
            BitladderError: this first start failed.
        """
        await self._launch()
        self._task = asyncio.create_task(self._keep(), name=f"supervise {self.name}")

    async def stop(self, grace_s: float = 5.0) -> None:
        """End it, and keep it ended."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self._end(grace_s)
        self.state = "stopped"

    async def wait_ready(self, seconds: float) -> None:
        """Wait until it answers.

        Raises:
            UpstreamFailed: it does not within ``seconds``.
        """
        self._notice_end()
        try:
            async with asyncio.timeout(seconds):
                await self._ready.wait()
        except TimeoutError:
            raise UpstreamFailed("down", f"The engine of {self.name} is {self.state}.") from None

    async def _launch(self) -> None:
        self._check_file()
        self.state = "starting"
        began = time.monotonic()
        self._process = await asyncio.to_thread(self._make)  # an engine may have to be asked for its version
        await asyncio.to_thread(self._process.start)
        if isinstance(self._process, TellsOfTools):
            self.takes_tools = await asyncio.to_thread(self._process.takes_tools)
        self.state, self.engine = "ready", str(self._process.identity)
        self._on_ready(time.monotonic() - began)
        self._ready.set()
        log.info(
            "engine ready",
            extra={"tier": self.name, "engine": self.engine, "seconds": round(time.monotonic() - began, 3)},
        )

    async def _end(self, grace_s: float) -> None:
        self._ready.clear()
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(process.stop, grace_s)

    async def _keep(self) -> None:
        backoff = _FIRST_BACKOFF_S
        while True:
            began = time.monotonic()
            if self.state == "ready":
                lost = await self._until_bad()
                if lost is None:
                    await self._change()
                    continue
                self.last_error = lost
                log.error("engine lost", extra={"tier": self.name, "error": self.last_error})
            self.state = "waiting"
            await self._end(grace_s=0.0)
            if time.monotonic() - began > _STEADY_S:
                backoff = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _LAST_BACKOFF_S)
            self.restarts += 1
            try:
                await self._launch()
            except BitladderError as error:
                self.last_error = error.found
                log.error("engine does not start", extra={"tier": self.name, "error": str(error)})

    async def _change(self) -> None:
        """Start it anew, in another way; where that fails the next try is `_keep`'s."""
        log.info("engine changes", extra={"tier": self.name})
        await self._end(grace_s=5.0)
        try:
            await self._launch()
        except BitladderError as error:
            self.state, self.last_error = "waiting", error.found
            log.error("engine does not start", extra={"tier": self.name, "error": str(error)})

    async def _until_bad(self) -> str | None:
        """Wait until the process died or stopped answering, and say which; None where it is to be started in another
        way, for which it is ``changing`` from then on.
        """
        assert self._process is not None
        missed, next_health = 0, time.monotonic() + self._every
        while (code := self._process.poll()) is None:
            await asyncio.sleep(_POLL_S)
            if self._should_change():
                self.state = "changing"  # at once: no request may find it ready after nobody was found to use it
                self._ready.clear()
                return None
            if time.monotonic() >= next_health:
                missed = 0 if await self._healthy(self._process.base_url) else missed + 1
                if missed >= self._misses:
                    return f"it did not answer /health {missed} times"
                await self._look_at_guesses(self._process.base_url)
                next_health = time.monotonic() + self._every
        return f"it ended with code {code}: {self._process.last_log()}"

    async def _look_at_guesses(self, base_url: str) -> None:
        if self._guesses_key is None:
            return
        headers = {"authorization": f"Bearer {self._guesses_key}"}
        with contextlib.suppress(UpstreamFailed, TimeoutError):
            status, body = await self._pool.get(base_url, "/metrics", self._health_timeout_s, headers)
            if status == 200:
                self.guesses = guess_counters(body.decode(errors="replace"))

    async def _healthy(self, base_url: str) -> bool:
        try:
            status, _ = await self._pool.get(base_url, "/health", self._health_timeout_s)
        except (UpstreamFailed, TimeoutError):
            return False
        return status == 200


class Turns:
    """Two engines that do not fit together: one is loaded at a time, and changes when nobody uses it.

    Requests are served in the order they came, so neither tier starves; each change costs a model load,
    which replies and logs say.
    """

    def __init__(self) -> None:
        self._order = asyncio.Lock()
        self._loaded: Supervisor | None = None
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        self.changes = 0

    @contextlib.asynccontextmanager
    async def use(self, engine: Supervisor) -> AsyncIterator[bool]:
        """Hold ``engine`` loaded; gives whether it had to be loaded first."""
        async with self._order:
            changed = self._loaded is not engine
            if changed:
                await self._unused.wait()
                await self._change(engine)
            self._users += 1
            self._unused.clear()
        try:
            yield changed
        finally:
            self._users -= 1
            if self._users == 0:
                self._unused.set()

    async def _change(self, engine: Supervisor) -> None:
        leaving, self._loaded = self._loaded, None
        if leaving is not None:
            log.info("tiers take turns", extra={"tier": engine.name, "instead_of": leaving.name})
            await leaving.stop()
            self.changes += 1
        await engine.start()
        self._loaded = engine
