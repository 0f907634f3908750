"""Reading what lm-evaluation-harness wrote, so that its numbers stand beside ours in the evidence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bitladder.errors import BadInput
from bitladder.records.benchmark import Benchmark

_MAX_BYTES = 64 * 1024**2


def read_results(path: Path) -> tuple[Benchmark, ...]:
    """The numbers of a ``results_*.json``, or of the newest one beneath a folder (its ``--output_path``).

    Raises:
        BadInput: there is none, or it is not in the tool's format.
    """
    if path.is_dir():
        found = sorted(path.rglob("results_*.json"))
        if not found:
            raise BadInput(f"There is no results_*.json beneath '{path}'.", do="Run lm_eval with --output_path.")
        path = found[-1]  # the tool ends its names with the time
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadInput(f"'{path}' is {path.stat().st_size} bytes; results have at most {_MAX_BYTES}.")
        plain = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"'{path}' cannot be read: {error.strerror}.", do="Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"'{path}' is no JSON: {error}.") from error
    results = plain.get("results") if isinstance(plain, dict) else None
    if not isinstance(results, dict) or not all(isinstance(numbers, dict) for numbers in results.values()):
        raise BadInput(
            f"'{path}' has no results in the format of lm-evaluation-harness.", do="Give its results_*.json."
        )
    return tuple(
        _benchmark(plain, task, name, value)
        for task, numbers in results.items()
        for name, value in numbers.items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    )


def _benchmark(plain: dict[str, Any], task: str, name: str, value: float) -> Benchmark:
    metric, _, filtered = name.partition(",")
    stderr = plain["results"][task].get(f"{metric}_stderr,{filtered}")
    samples = _section(plain, "n-samples").get(task)
    shots = _section(plain, "n-shot").get(task)
    return Benchmark(
        task=task,
        metric=name.removesuffix(",none"),
        value=float(value),
        stderr=float(stderr) if isinstance(stderr, int | float) else math.nan,
        samples=int(samples.get("effective", 0)) if isinstance(samples, dict) else 0,
        shots=int(shots) if isinstance(shots, int) else 0,
        task_version=str(_section(plain, "versions").get(task, "")),
        model=str(plain.get("model_name") or _section(plain, "config").get("model_args", "")),
        tool=f"lm_eval {plain.get('lm_eval_version', '')}".strip(),
    )


def _section(plain: dict[str, Any], name: str) -> dict[str, Any]:
    section = plain.get(name)
    return section if isinstance(section, dict) else {}
