"""What happened, counted: one record per request goes to Prometheus, to the log and to the live view of the
page.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import statistics
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bitladder.serve.guessing import Speeds, Told
from bitladder.serve.replicas import Replica, ReplicaState
from bitladder.serve.tiers import Tier

log = logging.getLogger("bitladder.serve")

_FIRST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_RATE_BUCKETS = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000)
RECENT = 100
_KEPT_REPLICAS = 1024
_EMPTY = (None, "", ())
_to_json = json.JSONEncoder(default=str).encode


class RequestOutcome(StrEnum):
    """What became of a request."""

    COMPLETE = "complete"
    REFUSED = "refused"
    CLIENT_LEFT = "client left"
    CUT = "cut"
    """An error after the first byte."""
    ERROR = "error"


@dataclass
class Record:
    """One request, without its text. Times in seconds; ``at`` is Unix time."""

    id: str
    path: str = ""
    asked_for: str = ""
    """The model name in the request."""
    at: float = field(default_factory=time.time)
    tier: str = ""
    level: str = ""
    reason: str = ""
    kind: str = ""
    """The ``router.Routing``; empty where the request was refused before."""
    key: str = ""
    tags: tuple[str, ...] = ()
    """That the client named."""
    work: tuple[str, ...] = ()
    """The same, or the kind of work that it was taken for."""
    stream: bool = False
    status: int = 0
    outcome: RequestOutcome = RequestOutcome.ERROR
    first_s: float | None = None
    """To the first byte of the answer."""
    total_s: float = 0.0
    tokens: int = 0
    """Of a document as the upstream counted them; of a stream its events."""
    replica: str = ""
    """Which of a tier's addresses answered, where it has several."""
    retries: tuple[str, ...] = ()
    """Replicas that were tried before, with the phase they failed in."""
    failures: tuple[str, ...] = ()
    """Tiers that were tried before, with the phase they failed in."""
    escalated: bool = False
    guessing: bool | None = None
    """Whether the engine that answered guesses tokens ahead; None for a tier that never does."""
    guesses: Told = field(default_factory=Told)
    """What that engine told of its guesses."""

    @property
    def tokens_per_s(self) -> float | None:
        """Rate after the first byte of a stream, or over the whole time of a document."""
        spent = self.total_s - (self.first_s or 0.0) if self.stream else self.total_s
        return self.tokens / spent if self.tokens > 1 and spent > 0 else None


class Metrics:
    """Counters of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "bitladder_requests", "Requests", ["tier", "level", "routed_by", "outcome"], registry=registry
        )
        self.first = Histogram(
            "bitladder_first_byte_seconds",
            "Time to the first byte of an answer",
            ["tier"],
            registry=registry,
            buckets=_FIRST_BUCKETS,
        )
        self.rate = Histogram(
            "bitladder_tokens_per_second",
            "Decode rate of each answer",
            ["tier"],
            registry=registry,
            buckets=_RATE_BUCKETS,
        )
        self.tokens = Counter("bitladder_tokens", "Answer tokens (events of streams)", ["tier"], registry=registry)
        self.failures = Counter(
            "bitladder_upstream_failures",
            "Failed attempts at an upstream",
            ["tier", "phase"],
            registry=registry,
        )
        self.escalations = Counter(
            "bitladder_escalations", "Answers of the speed tier that were not sure enough", registry=registry
        )
        self.running = Gauge("bitladder_running", "Requests at the upstream", ["tier"], registry=registry)
        self.queued = Gauge("bitladder_queued", "Requests that wait", ["tier"], registry=registry)
        self.slots = Gauge("bitladder_slots", "Requests the upstream computes at once", ["tier"], registry=registry)
        self.up = Gauge("bitladder_up", "1 when the tier can answer now", ["tier"], registry=registry)
        self.restarts = Gauge(
            "bitladder_engine_restarts", "Times the engine was started again", ["tier"], registry=registry
        )
        self.guessed = Gauge(
            "bitladder_guessed_tokens", "Tokens guessed ahead since the engine started", ["tier"], registry=registry
        )
        self.accepted = Gauge("bitladder_accepted_tokens", "Guesses that were right", ["tier"], registry=registry)
        self.guessing = Gauge("bitladder_guessing", "1 while the engine guesses ahead", ["tier"], registry=registry)
        self.guess_speedup = Gauge(
            "bitladder_guess_speedup", "Speed with guesses over speed without, so far", ["tier"], registry=registry
        )
        self.replica_answers = Counter(
            "bitladder_replica_answers", "Answers of each replica", ["tier", "replica"], registry=registry
        )
        self.replica_retries = Counter(
            "bitladder_replica_retries",
            "Requests that a replica failed and another one got",
            ["replica", "phase"],
            registry=registry,
        )
        self.replica_running = Gauge(
            "bitladder_replica_running", "Requests at each replica", ["tier", "replica"], registry=registry
        )
        self.replica_up = Gauge(
            "bitladder_replica_up", "1 while the replica gets requests", ["tier", "replica"], registry=registry
        )
        self.shadowed = Counter(
            "bitladder_shadow_compared", "Answers compared in idle time", ["same"], registry=registry
        )
        self.alarm = Gauge("bitladder_shadow_alarm", "1 while the tiers agree less than the bar", registry=registry)
        # Looking a child up by its labels costs more than counting.
        self._of_request = functools.cache(self.requests.labels)
        self._of_replica = functools.lru_cache(_KEPT_REPLICAS)(self.replica_answers.labels)
        self._of_tier = functools.cache(
            lambda tier: (self.first.labels(tier), self.tokens.labels(tier), self.rate.labels(tier))
        )
        self._recent: deque[Record] = deque(maxlen=RECENT)
        self._kinds: Tally[str] = Tally()
        self._by_tier: Tally[tuple[str, str]] = Tally()

    def add(self, record: Record) -> None:
        """Count one finished request, log it, and keep it for the live view."""
        tier = record.tier or "none"
        first, tokens, rates = self._of_tier(tier)
        self._of_request(tier, record.level, record.kind, record.outcome).inc()
        if record.first_s is not None:
            first.observe(record.first_s)
        if record.tokens:
            tokens.inc(record.tokens)
        if (rate := record.tokens_per_s) is not None:
            rates.observe(rate)
        for failure in record.failures:
            self.failures.labels(*failure.split(": ", 1)).inc()
        for retry in record.retries:
            self.replica_retries.labels(*retry.rsplit(": ", 1)).inc()
        if record.replica:
            self._of_replica(tier, record.replica).inc()
        if record.escalated:
            self.escalations.inc()
        self._recent.append(record)
        self._kinds[record.kind] += 1
        self._by_tier[tier, record.outcome] += 1
        level = logging.WARNING if record.outcome in (RequestOutcome.CUT, RequestOutcome.ERROR) else logging.INFO
        if log.isEnabledFor(level):  # `log.log` would look for the line of code that logs, which no line shows
            log.handle(log.makeRecord(log.name, level, "", 0, "request", (), None, extra={"record": record}))

    def text(self, tiers: Sequence[Tier]) -> bytes:
        """The Prometheus text format."""
        for tier in tiers:
            self.running.labels(tier.name).set(tier.gate.running)
            self.queued.labels(tier.name).set(tier.gate.queued)
            self.slots.labels(tier.name).set(tier.gate.slots)
            self.up.labels(tier.name).set(tier.usable)
            self.restarts.labels(tier.name).set(tier.engine.restarts if tier.engine else 0)
            if tier.engine and tier.engine.guesses:
                self.guessed.labels(tier.name).set(tier.engine.guesses[0])
                self.accepted.labels(tier.name).set(tier.engine.guesses[1])
            if tier.guessing is not None:
                self.guessing.labels(tier.name).set(tier.guessing.running)
                if (ratio := tier.guessing.all.times_as_fast) is not None:
                    self.guess_speedup.labels(tier.name).set(ratio)
        self.replica_running.clear()  # those that left leave no line
        self.replica_up.clear()
        for tier in tiers:
            for replica in tier.replicas if tier.replicas.several else ():
                self.replica_running.labels(tier.name, replica.name).set(replica.outstanding)
                self.replica_up.labels(tier.name, replica.name).set(replica.state is ReplicaState.UP)
        return generate_latest(self._registry)

    def live(self, tiers: Sequence[Tier]) -> dict[str, Any]:
        """What the page's live view shows; the shape is in docs/serve.md."""
        total = sum(self._kinds.values())
        return {
            "tiers": [self._tier(tier) for tier in tiers],
            "requests": total,
            "routing": {kind: {"requests": n, "share": n / total} for kind, n in self._kinds.most_common()},
            "recent": [self._line(record) for record in reversed(self._recent)],
        }

    def _tier(self, tier: Tier) -> dict[str, Any]:
        mine = [
            record for record in self._recent if record.tier == tier.name and record.outcome is RequestOutcome.COMPLETE
        ]
        firsts = [record.first_s for record in mine if record.first_s is not None]
        rates = [rate for record in mine if (rate := record.tokens_per_s) is not None]
        return {
            "tier": tier.name,
            "names": tier.names,
            "level": tier.spec.level,
            "file_sha256": tier.spec.sha256 or None,
            "evidence": tier.spec.standing,
            "note": tier.spec.note,
            "state": tier.state,
            "resident": tier.turns is None,
            "running": tier.gate.running,
            "queued": tier.gate.queued,
            "slots": tier.gate.slots,
            "restarts": tier.engine.restarts if tier.engine else 0,
            "engine": tier.engine.engine if tier.engine else "",
            "last_error": tier.engine.last_error if tier.engine else "",
            "replicas": [_replica(one) for one in tier.replicas] if tier.replicas.several else [],
            "outcomes": {outcome: n for (name, outcome), n in self._by_tier.items() if name == tier.name},
            "first_byte_s": _middle(firsts),
            "tokens_per_s": _middle(rates),
            **_guesses(tier),
        }

    @staticmethod
    def _line(record: Record) -> dict[str, Any]:
        rate = record.tokens_per_s
        return {**vars(record), "tokens_per_s": None if rate is None else round(rate, 2)}


def _guesses(tier: Tier) -> dict[str, Any]:
    """How good a tier's guesses are, and whether they pay; nothing of one that does not guess."""
    if tier.spec.speculate is None:
        return {}
    guessed, accepted = (tier.engine.guesses if tier.engine else None) or (0, 0)
    share = round(accepted / guessed, 4) if guessed else None
    told: dict[str, Any] = {
        "from": tier.spec.speculate.kind, "guessed": guessed, "accepted": accepted, "acceptance": share, "on": True,
    }  # fmt: skip
    if (trial := tier.guessing) is not None:
        told |= {**_speeds(trial.all), "acceptance": share, "on": trial.running, "because": trial.because}
        told["by_tag"] = {
            tag: {**_speeds(speeds), "apart": tag in trial.apart} for tag, speeds in sorted(trial.by_tag.items())
        }
        told["second_engine"] = tier.aside.engine.state if tier.aside is not None else None
    return {"guesses": told}


def _speeds(speeds: Speeds) -> dict[str, Any]:
    ratio, share = speeds.times_as_fast, speeds.acceptance
    return {
        "acceptance": None if share is None else round(share, 4),
        "times_as_fast": None if ratio is None else round(ratio, 3),
        "answers_with": len(speeds.with_guesses),
        "answers_without": len(speeds.without),
    }


def _replica(replica: Replica) -> dict[str, Any]:
    usual = replica.log_time
    return {
        "replica": replica.name,
        "state": replica.state,
        "running": replica.outstanding,
        "answered": replica.answered,
        "failed": replica.failed,
        "first_byte_s": None if usual is None else round(math.exp(usual), 4),
        "last_error": replica.last_error,
    }


def _middle(values: Sequence[float]) -> dict[str, float] | None:
    """Median and 95th percentile; None when there is nothing to say."""
    if not values:
        return None
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
    }


@functools.lru_cache(maxsize=1)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


class JsonLines(logging.Formatter):
    """One JSON object a line: time, severity, event, and the event's own fields."""

    _PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told: dict[str, Any] = {
            "at": f"{_second(int(record.created))}.{int(record.msecs):03d}Z",
            "severity": record.levelname.lower(),
            "event": record.getMessage(),
        }
        about = getattr(record, "record", None)
        if isinstance(about, Record):
            told.update({key: item for key, item in vars(about).items() if key != "at" and item not in _EMPTY})
        else:
            told.update({name: value for name, value in vars(record).items() if name not in self._PLAIN})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return _to_json(told)
