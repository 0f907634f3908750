"""What speculative decoding gains on a workload."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitladder.records import Real


@dataclass(frozen=True)
class Gain:
    """Decoding with guesses over decoding without, on the same inputs asked in turns.

    ``ratio`` is the time without over the time with, for the same tokens; its 95% interval resamples inputs.
    """

    tag: str
    """Of the inputs; empty for all of them."""
    inputs: int
    drafted: int
    accepted: int
    ratio: Real
    low: Real
    high: Real
    p_value: Real = math.nan
    """Chance of a ratio like this, or a larger one, if guesses gained nothing (Student's test, one-sided)."""

    @property
    def acceptance(self) -> float:
        """Share of guesses that were right; NaN without any."""
        return self.accepted / self.drafted if self.drafted else math.nan


@dataclass(frozen=True)
class SpeculationResult:
    """One way to guess."""

    mode: str
    """``ngram``, ``mtp`` or ``draft:FILE``."""
    tokens_per_s: Real
    """Median over inputs."""
    extra_bytes: int
    """Memory that guessing takes beside the model at the context: a draft with its cache, or the heads' cache."""
    gains: tuple[Gain, ...]
    """Over all inputs, then by tag."""
    differing: tuple[str, ...]
    """Inputs whose greedy answer is another than without guesses, though that one repeats itself."""
    draft_sha256: str = ""
    """Of the draft's file."""

    @property
    def lossless(self) -> bool:
        """Every answer was the same."""
        return not self.differing


@dataclass(frozen=True)
class SpeculationReport:
    """All ways that were tried."""

    model: str
    workload: str
    inputs: int
    tokens_per_s: Real
    """Without guesses; median over inputs."""
    results: tuple[SpeculationResult, ...]
    unstable: tuple[str, ...]
    """Inputs whose answer without guesses is not the same twice; they say nothing about guesses."""
    warnings: tuple[str, ...] = ()
    level: str = ""
    """The level that it is about, in a run."""
