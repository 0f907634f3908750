"""A tier while it serves: its spec, its upstream, its queue, and whether it can answer now."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from bitladder.serve.aside import Aside
from bitladder.serve.guessing import GuessTrial
from bitladder.serve.limits import Gate
from bitladder.serve.protocol import header_text
from bitladder.serve.replicas import ReplicaSet
from bitladder.serve.rewording import TRANSLATED
from bitladder.serve.settings import TierSpec
from bitladder.serve.supervisor import Supervisor, Turns

LONGEST_CHANGE_S = 30.0
"""That a request waits for an engine which is started in another way; it took a few seconds before."""


@dataclass
class Tier:
    """One served level. ``names`` are the model names that mean it, its role or roles first."""

    names: tuple[str, ...]
    spec: TierSpec
    replicas: ReplicaSet
    """What answers for it: one engine of our own, or the addresses of an endpoint."""
    gate: Gate
    engine: Supervisor | None = None
    """None for an endpoint by URL."""
    turns: Turns | None = None
    """When it shares the memory with another tier."""

    guessing: GuessTrial | None = None
    """Whether guesses pay on its requests; None where it has none, or takes turns in memory."""

    aside: Aside | None = None
    """Its second engine, for kinds of work for which the other way is faster; None where there is no room for one."""

    unspoken: set[str] = field(default_factory=set)
    """Paths that its endpoint was found not to know."""

    def __post_init__(self) -> None:
        self.replicas.on_change = self._resize
        self._resize()
        self.headers = (
            (b"x-bitladder-level", header_text(self.spec.level).encode()),
            (b"x-bitladder-file-sha256", header_text(self.spec.sha256 or "unknown").encode()),
            (b"x-bitladder-evidence", (self.spec.standing or "unknown").encode()),
        )

    def _resize(self) -> None:
        """Each replica computes as many requests at once as the spec says."""
        self.gate.resize(self.spec.slots * max(1, self.replicas.up))

    @property
    def name(self) -> str:
        """Its role, or its level's name when it has none."""
        return self.names[0]

    @property
    def state(self) -> str:
        """``ready``, ``starting``, ``waiting``, ``stopped``, or ``endpoint`` when somebody else runs it."""
        return "endpoint" if self.engine is None else self.engine.state

    @property
    def usable(self) -> bool:
        """Whether a request sent now has an engine to go to (perhaps after waiting for its turn)."""
        if self.engine is None:
            return not self.replicas.several or self.replicas.up > 0
        return self.turns is not None or self.engine.state == "changing" or self.engine.address() is not None

    def speaks(self, path: str) -> bool:
        """Whether a request to this path is sent on to it as it came.

        llama.cpp answers Responses and Messages, too, but leaves out of their streams what OpenAI's own client needs
        (``output_index``), and calls answers that were cut complete; chat completions lose nothing, since that is what
        it makes of them itself.
        """
        return path not in self.unspoken and (self.engine is None or path not in TRANSLATED)

    def answering(self, work: Sequence[str]) -> tuple[ReplicaSet, bool | None]:
        """What answers work of these tags, and whether it guesses ahead; None of a tier that never does."""
        trial = self.guessing
        if self.aside is not None and trial is not None and self.aside.takes(work):
            return self.aside.replicas, not trial.usual
        return self.replicas, trial.running if trial is not None else None

    @contextlib.asynccontextmanager
    async def hold(self) -> AsyncIterator[bool]:
        """Hold a slot, and the engine loaded; gives whether it had to be loaded for this.

        Raises:
            Refused: the queue is full.
            EngineError: the engine does not load.
            UpstreamFailed: it was started in another way, and does not come back.
        """
        await self.gate.enter()
        began = time.monotonic()
        try:
            if self.turns is not None and self.engine is not None:
                async with self.turns.use(self.engine) as changed:
                    yield changed
            else:
                if self.engine is not None and self.engine.state == "changing":
                    await self.engine.wait_ready(LONGEST_CHANGE_S)
                yield False
        finally:
            self.gate.leave(time.monotonic() - began)
