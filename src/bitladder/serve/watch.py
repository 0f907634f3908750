"""One watch per request: cancels its work when the client leaves or a phase takes too long, and says which.

A timer per piece of an answer would cost more than relaying the piece. Here a piece only notes the time,
and one task for the whole gateway looks at all watches a few times a second.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable

from starlette.types import Receive, Scope

from bitladder.serve.wire import WHEN_GONE

FOREVER = float("inf")


class ClientGone(Exception):
    """The client closed its connection."""


class PhaseTimeout(Exception):
    """A phase of the request took longer than allowed; the message names it."""


class Watch:
    """What one request is doing since when. Set by `phase`, looked at by `Watchman`. Stands in a ``with`` block around
    the request's work.

    Raises:
        ClientGone: the client left while the block ran.
        PhaseTimeout: a phase was over its time, and the block did not ask for the cause itself.
    """

    __slots__ = ("_allowed", "_cause", "_phase", "_since", "_stop_listening", "_task", "_watches")

    def __init__(self, task: asyncio.Task[object], watches: set[Watch]) -> None:
        self._task = task
        self._watches = watches
        self._cause: Exception | None = None
        self._stop_listening: Callable[[], object] | None = None
        self._phase, self._allowed, self._since = "", FOREVER, 0.0

    def __enter__(self) -> Watch:
        self._watches.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._watches.discard(self)
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None  # a task that listened refers to this watch
        if kind is asyncio.CancelledError and (cause := self.cause()) is not None:
            raise cause from None

    def listen(self, scope: Scope, receive: Receive) -> None:
        """From now on notice when the client leaves. ``receive`` is the request's, its body already read."""
        when_gone = scope.get("extensions", {}).get(WHEN_GONE)
        if when_gone is not None:
            when_gone(self._gone)
            self._stop_listening = functools.partial(when_gone, None)
        else:  # a task for each request costs more, and any ASGI server can do it
            self._stop_listening = asyncio.create_task(self._until_gone(receive)).cancel

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone()

    def _gone(self) -> None:
        self.cancel(ClientGone())

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

    def watch(self) -> Watch:
        """A watch of the current task."""
        task = asyncio.current_task()
        assert task is not None
        return Watch(task, self._watches)
