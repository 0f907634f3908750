"""What a calibrating walk gathers beside checkpoints: vectors per tensor that GGUF levels are made with."""

from __future__ import annotations

from dataclasses import dataclass

from bitladder.levels.kinds import CheckpointLevel, FoldedLevel
from bitladder.levels.methods import Statistics

COLUMNS, ROWS, SQUARES, COUNT = "columns", "rows", "squares", "count"
"""Kinds of vectors, after a tensor's name: a fold's multipliers and divisors, sums of squares and how many."""


@dataclass(frozen=True)
class ImportanceVectors:
    """The importance matrix: mean squared inputs of every tensor."""

    name: str = "importance"


Product = CheckpointLevel | FoldedLevel | ImportanceVectors
"""What a calibrating walk can make."""


def statistics_of(product: Product) -> Statistics:
    """What making it reads off the calibration text."""
    return Statistics.ENERGIES if isinstance(product, ImportanceVectors) else product.method.statistics
