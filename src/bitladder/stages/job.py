"""What a run has to tell beside its results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bitladder.records.job import JobOutcome

Say = Callable[[str], None]


@dataclass
class Journal:
    """Seconds per stage, jobs beside their predictions, what was reused, and what the user should know."""

    say: Say = lambda _: None
    timings: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    jobs: list[JobOutcome] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.monotonic() - start

    def warn(self, *warnings: str) -> None:
        """Say it now, and again in the report."""
        for warning in warnings:
            self.warnings.append(warning)
            self.say(f"! {warning}")

    def reuse(self, what: str, levels: Sequence[str]) -> None:
        """Say what is not done again."""
        if levels:
            line = f"{what} of {', '.join(levels)}"
            self.reused.append(line)
            self.say(f"Reused: {line}.")
