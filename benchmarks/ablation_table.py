"""Pools quality_per_byte's ablations over stretches of calibration text, with intervals that count both.

    for part in 0 1 2; do scripts/bench quality_per_byte ... --ablate --part $part --json part$part.json; done
    scripts/bench ablation_table part0.json part1.json part2.json

Every file measured the same documents, each under recipes fitted to another stretch of the calibration text. Ratios are
of the mean KL over all of both. Their logarithm is linearised, z[text, document] = ours / mean ours - theirs / mean
theirs, and its variance taken as that of the means over texts plus that of the means over documents (what varies with
both is counted twice: intervals are rather too wide than too narrow), with Satterthwaite's degrees of freedom.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

F64 = NDArray[np.float64]
SIDES = {"our search": "our search, its types", "recipe": "our types", "feedback": "feedback, its types", "ours": "all"}


def pooled(ours: F64, theirs: F64) -> tuple[float, float, float]:
    """The ratio of two mean losses f64[texts, documents], and its 95% interval."""
    ratio = ours.mean() / theirs.mean()
    z = ours / ours.mean() - theirs / theirs.mean()
    spreads = [z.mean(axis=1 - axis).var(ddof=1) / z.shape[axis] for axis in (0, 1)]
    whole = sum(spreads)
    freedom = whole**2 / sum(own**2 / (count - 1) for own, count in zip(spreads, z.shape, strict=True))
    reach = stats.t.ppf(0.975, freedom) * np.sqrt(whole)
    return float(ratio), float(ratio * np.exp(-reach)), float(ratio * np.exp(reach))


def losses(files: Sequence[Path], text: str) -> dict[tuple[str, str], F64]:
    """(level, side) -> f64[texts, documents]."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for file in files:
        for row in json.loads(file.read_text())["rows"]:
            if row["text"] == text:
                found.setdefault((row["level"], row["side"]), []).append(row["per_document"])
    short = [key for key, own in found.items() if len(own) != len(files)]
    if short or not found:
        raise SystemExit(f"{text}: not every file has {short[0] if short else 'this text'}")
    return {key: np.array(own) for key, own in found.items()}


def table(found: Mapping[tuple[str, str], F64]) -> None:
    print("| bytes of | " + " | ".join(SIDES.values()) + " | all, by text |")
    print("|---|" + "---|" * (len(SIDES) + 1))
    for level in dict.fromkeys(level for level, _ in found):
        theirs, cells = found[level, "llama.cpp"], []
        for side in SIDES:
            ratio, low, high = pooled(found[level, side], theirs)
            cells.append(f"{ratio:.2f} [{low:.2f}, {high:.2f}]")
        each = found[level, "ours"].sum(axis=1) / theirs.sum(axis=1)
        print(f"| {level} | " + " | ".join(cells) + " | " + ", ".join(f"{one:.2f}" for one in each) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--text", default="in domain")
    options = parser.parse_args()
    if len(options.files) < 2 or not all(file.exists() for file in options.files):
        print("two files or more are pooled; nothing was")
        return 1
    table(losses(options.files, options.text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
