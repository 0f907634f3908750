"""Claim: a run of the demo takes so long, quiet and beside a busy process, and runs from nothing name the same pair.

    scripts/bench demo_repeats [--runs 20] [--model smollm2-135m] [-- --within 3m ...]

Runs the demo so often, each with a cache and evidence of its own in which nothing but the model's file lies, every
second one beside a process that takes a whole core. Prints seconds and the pair of each run, then how often each pair
was named, the median time of quiet and of busy runs, and how often the commonest pair was among those that a decision
names as what other runs would choose.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitladder.files.demo import NAME, fetch_demo


@contextmanager
def busy(*, wanted: bool) -> Iterator[None]:
    """Beside a process that takes a core, or not."""
    if not wanted:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while 1: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def one_run(file: Path, model: str, more: list[str]) -> tuple[float, dict[str, Any]]:
    """Seconds, and the decision."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if model == NAME:
            (home / "cache" / "models").mkdir(parents=True)
            shutil.copy(file, home / "cache" / "models")
        own = os.environ | {"BITLADDER_CACHE": str(home / "cache"), "BITLADDER_DATA": str(home / "data")}
        began = time.monotonic()
        command = [sys.executable, "-m", "bitladder", "run", model, "--out", str(home / "out"), *more]
        done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - began
        if not (home / "out" / "run.json").exists():
            sys.exit(f"The run failed:\n{done.stderr[-2000:]}")
        return seconds, json.loads((home / "out" / "run.json").read_text())["decision"]


def pair(found: dict[str, Any]) -> str:
    """As one reads it."""
    quality, speed = found["quality"], found["speed"]
    return str(quality) if quality == speed else f"{quality} with {speed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--model", default=NAME)
    parser.add_argument("more", nargs="*", help="options of the run")
    args = parser.parse_args()
    file = fetch_demo() if args.model == NAME else Path(args.model)
    times: dict[bool, list[float]] = {False: [], True: []}
    decisions = []
    for number in range(args.runs):
        beside = number % 2 == 1
        with busy(wanted=beside):
            seconds, decision = one_run(file, args.model, args.more)
        times[beside].append(seconds)
        decisions.append(decision)
        said = ", ".join(f"{pair(one)} {one['share']:.0%}" for one in decision["certainty"])
        print(
            f"run {number + 1}, {'busy' if beside else 'quiet'}: {seconds:.0f} s: {pair(decision)} ({said})", flush=True
        )
    counts = Counter(map(pair, decisions))
    print("named:", ", ".join(f"{name} {count} times" for name, count in counts.most_common()))
    most = counts.most_common(1)[0][0]
    told = sum(most in map(pair, one["certainty"]) for one in decisions)
    print(f"{most} is the pair, or among those that other runs would choose, in {told} of {len(decisions)} decisions")
    for beside, name in ((False, "quiet"), (True, "beside a busy process")):
        if times[beside]:
            low, high = min(times[beside]), max(times[beside])
            print(f"{name}: {statistics.median(times[beside]):.0f} s (median; {low:.0f} to {high:.0f})")


if __name__ == "__main__":
    main()
