"""A model whose residual stream was rotated: the file, and how far its predictions are from the source's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RotatedFile:
    """What ``rotate`` wrote."""

    path: Path
    bytes: int
    seconds: float
    """Wall time, with the comparison."""
    kl: float
    """Mean KL divergence of its predictions from the source's: what rounding to 16 bits costs."""
    tokens: int
    """Scored for that."""
    reused: bool
    """The very same file was already there."""
