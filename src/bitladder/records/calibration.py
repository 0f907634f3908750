"""What a calibrated checkpoint was made from, and what each of its tensors cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearLoss:
    """One quantized linear layer. ``loss``: squared error of its outputs as a share of their energy on the
    calibration set."""

    name: str
    loss: float
    tokens: int
    damp: float = 0.0
    """Share of the mean diagonal added to the Hessian (GPTQ); above 0.05 when factoring had to be rescued."""
    note: str = ""
    """What was done differently here and why; empty when nothing was."""


@dataclass(frozen=True)
class CalibrationText:
    """The text behind the statistics."""

    documents: int
    windows: int
    tokens: int
    shortest: int
    longest: int
    """Tokens of the shortest and longest window."""
    hash: str
    overlap: float
    """Share of the measuring text's token runs that occur here too; must be 0 unless it was forced."""


@dataclass(frozen=True)
class CheckpointReport:
    """A written checkpoint."""

    level: str
    path: str
    bytes: int
    bpw: float
    """Bits per weight of the quantized linear layers, scales included."""
    seconds: float
    text: CalibrationText | None
    linears: tuple[LinearLoss, ...]
    notes: tuple[str, ...]
    """What a user should know: engines that refuse the level, experts with too few tokens, rescued
    Hessians."""


@dataclass(frozen=True)
class Preflight:
    """What a calibration will take, predicted before it starts. Bytes and seconds."""

    seconds: float
    ram_bytes: int
    disk_bytes: int
