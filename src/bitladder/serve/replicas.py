"""The replicas of a tier: several addresses that answer for one level, and which of them a request goes to.

    affinity   the beginning of a conversation has a preferred replica, whose prefix cache knows it, while that one has
               no more than `BOUND` times the mean of requests outstanding; else the next in the same order
    load       what has no beginning goes to the replica with the fewest requests outstanding
    slow       one that takes `SLOW` times as long as the others to begin its answers has its load counted as many
               times, and gets no conversation; a single request every `TRIAL_S` shows when it is fast again
    out        one that refuses connections, fails `MOST_IN_A_ROW` times in a row or does not answer probes gets nothing
               until it answers one; what waits there for a first byte is asked of another

Sources: the order is rendezvous hashing (Thaler and Ravishankar 1998), the bound is from consistent hashing with
bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum

from bitladder.serve.backends import Complete, UpstreamFailed
from bitladder.serve.protocol import ModelRequest
from bitladder.serve.watch import Watch

log = logging.getLogger("bitladder.serve")

BOUND = 1.25
SLOW = 2.0
TRIAL_S = 5.0
MOST_IN_A_ROW = 3
MOST_SENT = 3
"""Replicas that one request is sent to; it may be what makes them fail. Those that could not be connected to do not
count.
"""
_KNOWN_FROM = 5
"""Answers of a replica before it can be called slow."""
_WEIGHT = 0.05
"""Of one answer in a replica's usual time."""
_FIRST_OUT_S, _LAST_OUT_S = 1.0, 60.0


class ReplicaState(StrEnum):
    """Whether a replica gets requests."""

    UP = "up"
    OUT = "out"
    """It failed; it is asked again once a probe succeeds."""
    LEAVING = "leaving"
    """Its name no longer resolves to it: what runs there ends, nothing new begins."""


class Replica:
    """One address that answers for a tier."""

    def __init__(self, name: str, complete: Complete, secret: str = "") -> None:
        self.name = name
        self.complete = complete
        self.secret = secret
        """Its key, blotted out of what it says."""
        self.state = ReplicaState.UP
        self.outstanding = 0
        self.answered = 0
        self.failed = 0
        self.last_error = ""
        self.in_a_row = 0
        self.ejections = 0
        """Times that it was put out since it last answered."""
        self.out_until = 0.0
        self.last_used = 0.0
        self.waiting: dict[Watch, None] = {}
        """Requests that have no first byte from it."""
        self._seen = 0
        self._log_time = 0.0

    @property
    def log_time(self) -> float | None:
        """Logarithm of the seconds to the first byte that it usually takes; None while that is not known."""
        return self._log_time if self._seen >= _KNOWN_FROM else None

    def observe(self, seconds: float) -> None:
        """An answer began after so many seconds."""
        self._seen += 1
        weight = max(_WEIGHT, 1 / self._seen)
        self._log_time += weight * (math.log(max(seconds, 1e-4)) - self._log_time)


class ReplicaSet:
    """The replicas of one tier. With a single one nothing is ever put out: there is nothing to ask instead.

    Args:
        replicas: at least one.
        on_change: called when the number of replicas that are up has changed.
        now: a clock, in seconds.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        on_change: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._members = {replica.name: replica for replica in replicas}
        self.on_change = on_change
        self._now = now
        self._turn = 0

    def __iter__(self) -> Iterator[Replica]:
        return iter(tuple(self._members.values()))

    def __len__(self) -> int:
        return len(self._members)

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self._members) > 1

    @property
    def up(self) -> int:
        """How many get requests."""
        return sum(replica.state is ReplicaState.UP for replica in self)

    def become(self, wanted: Mapping[str, Callable[[], Replica]]) -> None:
        """Have these replicas from now on, by their names: new ones are made, the others leave when they are idle."""
        for name, make in wanted.items():
            known = self._members.get(name)
            if known is None:
                self._members[name] = make()
                log.info("replica found", extra={"replica": name})
            elif known.state is ReplicaState.LEAVING:
                known.state = ReplicaState.UP
        for replica in self:
            if replica.name not in wanted:
                if replica.state is not ReplicaState.LEAVING:
                    log.info("replica leaves", extra={"replica": replica.name})
                replica.state = ReplicaState.LEAVING
                if not replica.outstanding:
                    del self._members[replica.name]
        self.on_change()

    def choose(self, key: bytes, tried: frozenset[str] = frozenset()) -> Replica | None:
        """Which replica to ask for a request with this beginning (`affinity_key`); None when all were tried.

        Those that are out are tried where no other is left.
        """
        usable = [one for one in self if one.state is ReplicaState.UP and one.name not in tried]
        usable = usable or [one for one in self if one.name not in tried]
        if len(usable) < 2:
            return usable[0] if usable else None
        slowness = _slowness(usable)
        slow = [one for one in usable if slowness[one.name] >= SLOW]
        now = self._now()
        trial = next((one for one in slow if not one.outstanding and now - one.last_used >= TRIAL_S), None)
        if trial is not None:
            return trial
        self._turn += 1  # of equal ones each gets its turn
        shifted = usable[self._turn % len(usable) :] + usable[: self._turn % len(usable)]
        least = min(shifted, key=lambda one: (one.outstanding + 1) * max(1.0, slowness[one.name]))
        brisk = [one for one in usable if slowness[one.name] < SLOW]
        if not key or least in slow:
            return least
        most = math.ceil(BOUND * (sum(one.outstanding for one in brisk) + 1) / len(brisk))
        return next(one for one in preferred(key, brisk) if one.outstanding < most)

    @contextlib.contextmanager
    def asking(self, replica: Replica, watch: Watch | None = None) -> Iterator[None]:
        """A request is with this replica; ``watch`` is cancelled when it goes silent before the first byte."""
        replica.outstanding += 1
        replica.last_used = self._now()
        if watch is not None:
            replica.waiting[watch] = None
        try:
            yield
        finally:
            replica.outstanding -= 1
            if watch is not None:
                replica.waiting.pop(watch, None)

    def answers(self, replica: Replica, watch: Watch, seconds: float) -> None:
        """It began to answer, after so many seconds."""
        replica.waiting.pop(watch, None)
        replica.observe(seconds)
        replica.answered += 1
        replica.in_a_row = replica.ejections = 0

    def others(self, tried: frozenset[str]) -> bool:
        """Whether there are any that were not tried."""
        return any(replica.name not in tried for replica in self)

    def failed(self, replica: Replica, failure: UpstreamFailed) -> None:
        """It failed a request; one that only had too much to do is as good as before."""
        if failure.phase == "busy":
            return
        replica.failed += 1
        replica.in_a_row += 1
        replica.last_error = failure.found
        if failure.phase == "connect" or replica.in_a_row >= MOST_IN_A_ROW:
            self.put_out(replica, failure.found)

    def put_out(self, replica: Replica, found: str) -> None:
        """Ask it no more until `let_in`; the longer the more often it happened since it last answered."""
        if not self.several or replica.state is not ReplicaState.UP:
            return
        replica.state, replica.last_error = ReplicaState.OUT, found
        replica.out_until = self._now() + min(_LAST_OUT_S, _FIRST_OUT_S * 2**replica.ejections)
        replica.ejections += 1
        log.warning("replica out", extra={"replica": replica.name, "error": found})
        self.on_change()

    def silent(self, replica: Replica, found: str) -> None:
        """It does not answer at all: what waits for a first byte there is asked of another. The last one that is up
        stays: a machine so busy that all seem silent is not helped by asking again.
        """
        if replica.state is ReplicaState.UP and self.up < 2:
            return
        self.put_out(replica, found)
        for watch in tuple(replica.waiting):
            watch.cancel(UpstreamFailed("stalled", found))

    def let_in(self, replica: Replica) -> None:
        """A probe succeeded."""
        if replica.state is ReplicaState.OUT and self._now() >= replica.out_until:
            replica.state, replica.in_a_row = ReplicaState.UP, 0
            log.info("replica back", extra={"replica": replica.name})
            self.on_change()


def _slowness(replicas: Sequence[Replica]) -> dict[str, float]:
    """How many times the usual time of its kind each takes; 1 where that is not known."""
    known = sorted(one.log_time for one in replicas if one.log_time is not None)
    usual = known[(len(known) - 1) // 2] if known else 0.0
    return {one.name: 1.0 if one.log_time is None else math.exp(one.log_time - usual) for one in replicas}


def preferred(key: bytes, replicas: Sequence[Replica]) -> list[Replica]:
    """Replicas in the order that a beginning prefers them in. It depends on their names alone, so that every gateway
    has the same, and one that comes or goes moves only its own.
    """

    def score(replica: Replica) -> bytes:
        return hashlib.blake2b(replica.name.encode(), key=key[:64], digest_size=8).digest()

    return sorted(replicas, key=score)


def affinity_key(request: ModelRequest) -> bytes:
    """What requests have in common that begin alike, 16 bytes; empty for what has no beginning to keep.

    OpenAI's ``prompt_cache_key`` where the client gives one; else the system's words and the first message of the user,
    or how a prompt begins.
    """
    given = request.value("prompt_cache_key")
    beginning = given if isinstance(given, str) and given else request.beginning
    return hashlib.blake2b(beginning.encode("utf-8", "replace"), digest_size=16).digest() if beginning else b""
