"""Results of academic benchmarks that another tool ran against a level."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One number of one task."""

    task: str
    metric: str
    """With its filter, as lm-evaluation-harness writes it: ``exact_match,strict-match``."""
    value: float
    stderr: float
    """NaN where the tool gives none."""
    samples: int
    """Documents that were asked; 0 when it does not say."""
    shots: int
    task_version: str
    model: str
    """As the tool was told."""
    tool: str
    """Tool and version."""
