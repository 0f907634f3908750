"""A tier's second engine, for kinds of work that are faster in the way that the tier does not take.

llama.cpp guesses tokens ahead for all requests or for none, as it was started. So where guesses pay for some tags and
cost others (``serve.guessing``), the same file runs a second time, the other way: started when the first such tag is
known, stopped when none is left. Its weights are the mapped file's, which the system holds once; it is only started
where the whole tier would fit in memory a second time, since a GPU holds them twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.errors import BitladderError
from bitladder.serve.guessing import GuessTrial
from bitladder.serve.replicas import ReplicaSet
from bitladder.serve.supervisor import Supervisor

log = logging.getLogger("bitladder.serve")

LOOK_S = 1.0
"""Between looks at whether it is needed."""


@dataclass
class Aside:
    """The engine, its upstream, and what says whose work is for it."""

    trial: GuessTrial
    engine: Supervisor
    replicas: ReplicaSet
    gave_up_on: frozenset[str] = frozenset()
    """Tags that it was to be started for when it did not start."""

    def takes(self, tags: Sequence[str]) -> bool:
        """Whether it answers work with these tags now."""
        return self.engine.state == "ready" and self.trial.goes_aside(tags)

    async def keep(self) -> None:
        """Have it run while it is needed; ends when it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Start it where there is work for it, stop it where none is left and nothing is being answered. While a trial
        is on it stays as it is."""
        stopped = self.engine.state == "stopped"
        wanted = self.trial.apart
        if stopped and wanted and wanted != self.gave_up_on:
            self.gave_up_on = frozenset()
            try:
                await self.engine.start()
            except BitladderError as error:
                self.gave_up_on = wanted
                log.warning("second engine does not start", extra={"tier": self.engine.name, "error": error.found})
                await self.engine.stop()
        elif not stopped and not wanted and not self.trial.in_trial and not any(r.outstanding for r in self.replicas):
            await self.engine.stop()
