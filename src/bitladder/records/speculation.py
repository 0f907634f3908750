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

    @property
    def acceptance(self) -> float:
        """Share of guesses that were right; NaN without any."""
        return self.accepted / self.drafted if self.drafted else math.nan


@dataclass(frozen=True)
class SpeculationResult:
    """One way to guess."""

    mode: str
    """``ngram`` or ``draft:FILE``."""
    tokens_per_s: Real
    """Median over inputs."""
    extra_bytes: int
    """Memory of the draft model and its cache at the context."""
    gains: tuple[Gain, ...]
    """Over all inputs, then by tag."""
    differing: tuple[str, ...]
    """Inputs whose greedy answer is another than without guesses, though that one repeats itself."""

    @property
    def lossless(self) -> bool:
        """Every answer was the same."""
        return not self.differing

    @property
    def pays(self) -> bool:
        """Surely faster over all inputs, with the same answers."""
        return self.lossless and self.gains[0].low > 1


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

    @property
    def best(self) -> SpeculationResult | None:
        """What surely pays most; None: nothing does."""
        paying = [one for one in self.results if one.pays]
        return max(paying, key=lambda one: one.gains[0].low, default=None)
