"""Compare two checkouts: every byte of every kind of level, every figure and decision, on this machine.

    scripts/bench golden_levels --before PATH_OF_OTHER_CHECKOUT [--only NAME ...] [--tested]

Both run the commands of tests/golden/commands.py on the same tiny models, each in a process of its own, from this
checkout's copy of the commands. What is compared: the exit code, the record that --json prints, run.json, each header
and each tensor of each file; clocks and the machine's free memory are left out. Exit 0: all is the same; 1: it is not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "golden"))

import make  # noqa: E402

SHOWN = 40


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--after", type=Path, default=ROOT, help="this one")
    parser.add_argument("--before-python", default=sys.executable, help="the interpreter of the other checkout")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="commands whose name holds one of these")
    parser.add_argument("--tested", action="store_true", help="only the commands that tests/golden runs")
    parser.add_argument("--work", type=Path, help="keep what was made in this folder")
    return parser.parse_args()


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    """Where two records differ, each as a line."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = [f"{place}/{key}: only before" for key in before if key not in after]
        found += [f"{place}/{key}: only after" for key in after if key not in before]
        return found + [
            line for key in before if key in after for line in differences(before[key], after[key], f"{place}/{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for at, (one, other) in pairs for line in differences(one, other, f"{place}[{at}]")]
    return [] if before == after else [f"{place}: {before!r:.100} before, {after!r:.100} after"]


def counts(command: dict[str, Any]) -> int:
    return sum(len(file.get("tensors", {})) for file in command["files"].values())


def compare(options: argparse.Namespace, work: Path) -> int:
    found, seconds = [], []
    for name, source, python in (
        ("before", options.before, options.before_python),
        ("after", options.after, sys.executable),
    ):
        started = time.monotonic()
        found.append(
            make.results(
                work / name,
                source=source.resolve(),
                python=python,
                models=work / "sources",
                tested=options.tested,
                names=tuple(options.only),
            )["commands"]
        )
        seconds.append(time.monotonic() - started)
    before, after = found
    wrong = 0
    for name in before | after:
        one, other = (
            {key: value for key, value in side.get(name, {}).items() if key not in ("seconds", "cpu")} for side in found
        )
        lines = differences(one, other)
        wrong += bool(lines)
        if lines:
            print(f"{name}: {len(lines)} differences")
            print("".join(f"  {line}\n" for line in lines[:SHOWN]), end="")
    files = sum(len(one["files"]) for one in before.values())
    tensors = sum(counts(one) for one in before.values())
    refused = [name for name, one in before.items() if one["code"] not in (0, 4, 5)]
    print(f"{len(before)} commands, {files} files, {tensors} tensors: {wrong} commands differ")
    if refused:
        print(f"refused alike before and after, so nothing is held: {', '.join(refused)}")
    print(f"{seconds[0]:.0f} s before, {seconds[1]:.0f} s after")
    return 1 if wrong or set(before) != set(after) else 0


def main() -> None:
    options = arguments()
    if options.work:
        sys.exit(compare(options, options.work.absolute()))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(compare(options, Path(folder)))


if __name__ == "__main__":
    main()
