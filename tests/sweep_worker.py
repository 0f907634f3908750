"""A sweep in a process of its own, whose jobs take a moment and write down when they begin and end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bitladder.records.run import RunRecord
from bitladder.stages.sweep import run_sweep, sweep_jobs
from bitladder.stages.sweep_file import read_sweep
from ladder_examples import run_record


def main(jobs: Path, out: Path, store: str, log: Path, lease_s: float, seconds: float) -> None:
    """Run a sweep; lines of the log are ``begin KEY`` and ``end KEY``."""

    def note(word: str, key: str) -> None:
        with log.open("a") as file:
            file.write(f"{word} {key}\n")

    record = run_record()

    def run(settings, progress, say) -> RunRecord:
        key = f"{settings.out.name}/{settings.bar}"
        note("begin", key)
        time.sleep(seconds)
        note("end", key)
        return record

    made = sweep_jobs(read_sweep(jobs), out, threads=1, device="cpu")
    rows = run_sweep(made, out, run, store_url=store, lease_s=lease_s)
    print("\n".join(f"{row.state} {row.quality}" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), float(sys.argv[5]), float(sys.argv[6]))
