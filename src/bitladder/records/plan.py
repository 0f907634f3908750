"""What fits on this machine, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LevelPlan:
    """One level of the ladder on one machine at one context. All sizes in bytes."""

    level: str
    tensor_bytes: int
    file_bytes: int
    bpw: float
    on_label_share: float
    """Share of quantizable weights that really get the type in the name; the rest fell back or was promoted."""
    fallbacks: int
    """Tensors whose rows do not divide into the wanted block and got another type."""
    kv_bytes: int
    compute_bytes: int
    total_bytes: int
    fits: bool
    reason: str


@dataclass(frozen=True)
class Plan:
    """The ladder of one model on one machine, largest level first."""

    model: str
    architecture: str
    machine: str
    n_ctx: int
    budget_bytes: int
    levels: tuple[LevelPlan, ...]
