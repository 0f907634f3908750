"""A level that was written to disk, and a file that measurements were made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

_MOST_THREADS = 1024


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
    sha256: str = ""
    """Empty where nothing is measured on the file: hashing reads all of it."""


@dataclass(frozen=True)
class Making:
    """What a level's bytes depend on besides source and recipe, enough to make the file once more."""

    effort: str = "good"
    imatrix: str = "none"
    """``auto``, ``none`` or the path of the importance matrix that was given."""
    importance: str = ""
    """Hash of the importance matrix's vectors (``stages.write_levels.importance_hash``); empty for none."""
    threads: int = 1
    """The order of sums depends on it: in an importance matrix made here, and in codes fitted with error feedback."""

    def __post_init__(self) -> None:
        """Evidence may be somebody else's: nothing of it becomes a path or a number of threads unchecked."""
        if self.effort not in ("fast", "good", "best"):
            raise ValueError(f"effort must be fast, good or best; got {self.effort!r} instead")
        if not re.fullmatch("(?:[0-9a-f]{16})?", self.importance):
            raise ValueError(f"importance must be 16 digits of a hash; got {self.importance!r} instead")
        if not 1 <= self.threads <= _MOST_THREADS:
            raise ValueError(f"threads must lie between 1 and {_MOST_THREADS}; got {self.threads} instead")


@dataclass(frozen=True)
class StoredFile:
    """A level's file as evidence knows it: by its hash, with where it lay and how it was made."""

    source: str
    """SHA-256 of the model it was made from."""
    level: str
    sha256: str
    path: str
    """Absolute."""
    bytes: int
    method: str
    """As its header says it; empty for a file whose making is not known."""
    making: Making
    bitladder: str
    """Version that made it."""


class FileStanding(StrEnum):
    """What evidence says about the very file that is served."""

    MEASURED = "measured"
    CHANGED = "changed"
    """It lies where a measured file lay, or was made as that one was, and has another hash."""
    UNMEASURED = "unmeasured"
