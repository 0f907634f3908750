"""One watch per request: cancels its work when the client leaves or a phase takes too long, and says which.

A timer per piece of an answer would cost more than relaying the piece. Here a piece only notes the time,
and one task for the whole gateway looks at all watches a few times a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.types import Receive

FOREVER = float("inf")


class ClientGone(Exception):
    """The client closed its connection."""


class PhaseTimeout(Exception):
    """A phase of the request took longer than allowed; the message names it."""


class Watch:
    """What one request is doing since when. Set by `phase`, looked at by `Watchman`."""

    __slots__ = ("_allowed", "_cause", "_phase", "_since", "_task")

    def __init__(self, task: asyncio.Task[object]) -> None:
        self._task = task
        self._cause: Exception | None = None
        self._phase, self._allowed, self._since = "", FOREVER, 0.0

    def phase(self, name: str, allowed_s: float) -> None:
        """A new phase begins now."""
        self._phase, self._allowed, self._since = name, allowed_s, time.monotonic()

    def cancel(self, cause: Exception) -> None:
        """End the request's work; the first cause counts."""
        if self._cause is None:
            self._cause = cause
            self._task.cancel()

    def look(self, now: float) -> None:
        """Cancel when the phase is over its time."""
        if now - self._since > self._allowed:
            self.cancel(PhaseTimeout(f"{self._phase} took longer than {self._allowed:g} s"))

    def cause(self) -> Exception | None:
        """Why we cancelled, once; the cancellation is then over and the task may go on."""
        cause, self._cause = self._cause, None
        if cause is not None:
            self._task.uncancel()
            self._allowed = FOREVER
        return cause


class Watchman:
    """Looks at all watches every ``every_s``."""

    def __init__(self, every_s: float = 0.25) -> None:
        self._every = every_s
        self._watches: set[Watch] = set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._every)
            now = time.monotonic()
            for watch in tuple(self._watches):
                watch.look(now)

    @contextlib.asynccontextmanager
    async def watch(self, receive: Receive) -> AsyncIterator[Watch]:
        """Watch the current task until the block ends. ``receive`` is the request's, its body already read.

        Raises:
            ClientGone: the client left while the block ran.
            PhaseTimeout: a phase was over its time, and the block did not ask for the cause itself.
        """
        task = asyncio.current_task()
        assert task is not None
        watch = Watch(task)
        self._watches.add(watch)
        listener = asyncio.create_task(self._listen(receive, watch))
        try:
            yield watch
        except asyncio.CancelledError:
            cause = watch.cause()
            if cause is None:
                raise
            raise cause from None
        finally:
            self._watches.discard(watch)
            listener.cancel()

    @staticmethod
    async def _listen(receive: Receive, watch: Watch) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        watch.cancel(ClientGone())
