"""What a job was expected to take and what it took."""

from __future__ import annotations

from dataclasses import dataclass

from bitladder.records import Real
from bitladder.units import Basis


@dataclass(frozen=True)
class JobOutcome:
    """A finished job beside its prediction."""

    kind: str
    """``quantize``, ``walk`` or ``importance``: jobs that one correction holds for."""
    what: str
    """In words: the levels, the text."""
    when: str
    """When it ended, UTC, ISO 8601."""
    by_formula_s: Real
    """Seconds by the formula alone, before earlier jobs corrected it."""
    predicted_s: Real
    low_s: Real
    high_s: Real
    """Seconds that were predicted, and the range around them."""
    label: Basis
    """Measured when earlier jobs here corrected the prediction, else assumed."""
    took_s: Real
    ram_bytes: int
    """Peak memory that was predicted, bytes."""
    disk_bytes: int
