"""A model and rival files of it, measured on the same texts in the same way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from bitladder.records import Real
from bitladder.records.fidelity import Fidelity


@dataclass(frozen=True)
class Rival:
    """A file, or a checkpoint folder, that was compared."""

    name: str
    given: str
    """Where it was said to be: a path, or a name on the hub."""
    path: str
    bytes: int
    """Of the file with all its parts, or of the folder's weights."""
    sha256: str
    bpw: Real = math.nan
    """Bits per weight over the tensors of a GGUF file."""


@dataclass(frozen=True)
class BenchFigure:
    """What one rival loses on one text."""

    rival: str
    fidelity: Fidelity
    ratio: Real = math.nan
    """Its KL over that of the first rival, paired by document; 1 for that one itself."""
    ratio_low: Real = math.nan
    ratio_high: Real = math.nan


@dataclass(frozen=True)
class BenchText:
    """One text, and what everyone loses on it; rivals in the order of the record's."""

    name: str
    sha256: str
    """Of names and texts of its documents."""
    figures: tuple[BenchFigure, ...]


@dataclass(frozen=True)
class BenchRecord:
    """All that was compared, the smallest file first."""

    model: str
    model_sha256: str
    rivals: tuple[Rival, ...]
    texts: tuple[BenchText, ...]
    against: str
    """The rival that ratios are to: the first that was named and could be compared."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Rivals that could not be compared, and why."""
    bitladder: str = ""
    """The version that measured."""
