"""A level that was written to disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LevelFile:
    """A level's GGUF file; of a split one the first part. ``bytes`` counts all parts, ``bpw`` tensor data
    only.
    """

    level: str
    path: Path
    bytes: int
    bpw: float
    seconds: float
    """Wall time of the pass that wrote it. Levels written in one pass share it."""
    reused: bool = False
    """The very same file was already there."""
