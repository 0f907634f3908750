"""Finished jobs of this machine beside their predictions, kept in the data folder to correct the next prediction."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitladder.describe.machine import Machine
from bitladder.files.atomic import write_whole
from bitladder.files.folders import data_folder
from bitladder.files.measured import machine_key
from bitladder.records import to_json
from bitladder.records.job import JobOutcome
from bitladder.records.reading import read_json

_KEPT = 200
_COUNTED = 9
"""The latest jobs of a kind that a correction is made from."""
_SHORTEST_S = 0.5
"""Shorter jobs are all start-up and say nothing about a rate."""
_ALIKE = 8.0
"""Jobs whose computed seconds differ by no more than this factor are of a like size."""
_LEAST_RANGE = 1.15


@dataclass(frozen=True)
class Correction:
    """How earlier jobs of a kind compare with the formula."""

    factor: float
    """Multiply predicted seconds by it; 1 without earlier jobs."""
    spread: float
    """Factor either way that covers nine in ten of a few such jobs; 0 without earlier jobs."""
    jobs: int


def log_path(machine: Machine) -> Path:
    """Where this machine's jobs are kept."""
    return data_folder("machines", f"{machine_key(machine)}.jobs.json")


def read_jobs(machine: Machine) -> list[JobOutcome]:
    """Oldest first; a damaged log counts as empty, since predictions must not stop work."""
    try:
        return list(read_json(tuple[JobOutcome, ...], log_path(machine).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def correction(jobs: Sequence[JobOutcome], kind: str, seconds: float) -> Correction:
    """The median ratio of taken to computed seconds of the latest jobs of a kind, and how far single jobs stray.

    Jobs of a like size count where there are any: what a short job takes is mostly its start. The range is two
    standard deviations of the logarithms, from the median absolute deviation (times 1.48 for a bell curve).
    """
    latest = [job for job in jobs if job.kind == kind and job.took_s >= _SHORTEST_S and job.by_formula_s > 0]
    alike = [job for job in latest if 1 / _ALIKE <= job.by_formula_s / seconds <= _ALIKE]
    logs = [math.log(job.took_s / job.by_formula_s) for job in (alike or latest)[-_COUNTED:]]
    if not logs:
        return Correction(1.0, 0.0, 0)
    middle = statistics.median(logs)
    away = statistics.median(abs(log - middle) for log in logs)
    spread = max(_LEAST_RANGE, math.exp(2 * 1.48 * away)) if len(logs) > 2 else 1.5
    return Correction(math.exp(middle), spread, len(logs))


def keep_job(machine: Machine, job: JobOutcome) -> None:
    """Add a finished job.

    Raises:
        OutputError: the data folder cannot be written.
    """
    path = log_path(machine)
    rows = [*read_jobs(machine), job][-_KEPT:]
    write_whole(path, json.dumps([to_json(row) for row in rows]), do="Choose another folder with BITLADDER_DATA.")
