"""Academic benchmarks that another tool ran against a level, kept beside our own evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.records.benchmark import Benchmark

if TYPE_CHECKING:
    from bitladder.store.evidence import Evidence


def keep_lm_eval(results: Path, *, source: str, level: str, store: Evidence) -> tuple[Benchmark, ...]:
    """Read the results of lm-evaluation-harness and store each number under what it was measured on.

    Args:
        results: a ``results_*.json``, or the folder given as ``--output_path``.
        source: SHA-256 of the source model's file, as the other evidence of the model has it.
        level: the level that was asked.
        store: where to.

    Raises:
        BadInput: there are no results, or they are not in the tool's format.
    """
    from bitladder.files.lm_eval import read_results

    numbers = read_results(results)
    for number in numbers:
        key = {
            "source": source,
            "level": level,
            "task": number.task,
            "metric": number.metric,
            "shots": number.shots,
            "samples": number.samples,
            "task_version": number.task_version,
            "tool": number.tool,
        }
        store.put("benchmark", key, number)
    return numbers
