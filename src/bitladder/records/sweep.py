"""A sweep: many runs, planned and told together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from bitladder.records import Real


class SweepState(StrEnum):
    """What became of a job."""

    WAITING = "waiting"
    DONE = "done"
    STORED = "stored"
    """It was done before, or by another sweep on the same store."""
    FAILED = "failed"


@dataclass(frozen=True)
class SweepCost:
    """What a job is expected to take, beside what earlier jobs of the sweep did for it."""

    seconds: Real = 0.0
    low_s: Real = 0.0
    high_s: Real = 0.0
    disk_bytes: int = 0
    money: Real = math.nan
    """In the currency of the sweep's price; NaN without one."""
    note: str = ""
    """Why nothing is known, or what to know."""

    def __add__(self, other: SweepCost) -> SweepCost:
        return SweepCost(
            self.seconds + other.seconds, self.low_s + other.low_s, self.high_s + other.high_s,
            self.disk_bytes + other.disk_bytes, self.money + other.money,
        )  # fmt: skip


@dataclass(frozen=True)
class SweepRow:
    """One job: a model, a ladder, a workload and a bar; and what was decided."""

    key: str
    """Hash of everything that the result follows from."""
    model: str
    levels: tuple[str, ...]
    """Empty: the usual ladder."""
    workload: str
    bar: str
    """Empty: the usual one."""
    state: SweepState = SweepState.WAITING
    outcome: str = ""
    quality: str = ""
    speed: str = ""
    summary: str = ""
    machine: str = ""
    """Where it was decided, in cores and memory."""
    file_bytes: int = 0
    """Of the quality tier's file."""
    kl: Real = math.nan
    passes: str = ""
    decode: Real = math.nan
    """Tokens per second of the quality tier."""
    seconds: Real = math.nan
    report: str = ""
    """The job's own report, beside the sweep's."""
    error: str = ""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as ``sweep.json`` has it."""

    bitladder: str
    created: str
    """UTC, ISO 8601, seconds."""
    name: str
    rows: tuple[SweepRow, ...]
    costs: tuple[SweepCost, ...] = ()
    """What was expected, a cost for each row; of what was stored already nothing."""
    currency: str = ""
    warnings: tuple[str, ...] = field(default=())
