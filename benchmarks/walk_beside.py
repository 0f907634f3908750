"""Claim: beside a process that takes a core, a walk whose batches go through a layer side by side is quicker than one
whose threads share every product; on a quiet machine it takes as long.

    scripts/bench walk_beside [--model smollm2-135m] [--levels Q8_0,Q4_K_M] [--windows 8] [--rounds 2]

The source and levels made from it pass all layers on windows of 512 random tokens, both ways in turn, quiet and beside
a busy process. Prints seconds of each, and for every round the share that side by side takes.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bitladder.describe.windows import Window
from bitladder.files.demo import NAME, fetch_demo
from bitladder.files.gguf import GgufFile
from bitladder.stages.fidelity import made_candidates, walk
from bitladder.walk.layers import LayeredModel


def seconds(source: GgufFile, levels: list[str], windows: list[Window], *, beside: bool) -> float:
    """Of one walk, side by side or with shared products."""
    LayeredModel.at_once = beside
    began = time.monotonic()
    walk(source, made_candidates(source, levels, effort="fast", threads=2), windows)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--levels", default="Q8_0,Q4_K_M")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    rng, levels = np.random.default_rng(0), args.levels.split(",")
    with GgufFile.open(fetch_demo() if args.model == NAME else Path(args.model)) as source:
        ids = rng.integers(0, source.model.dims.n_vocab, (args.windows, 512))
        windows = [Window(str(at), tokens) for at, tokens in enumerate(ids)]
        walk(source, made_candidates(source, levels[:1], effort="fast"), windows[:1])  # what is loaded once
        for _ in range(args.rounds):
            for busy in (False, True):
                other = subprocess.Popen([sys.executable, "-c", "while 1: pass"]) if busy else None
                shared, beside = (seconds(source, levels, windows, beside=one) for one in (False, True))
                if other:
                    other.kill()
                    other.wait()
                where = "beside a busy process" if busy else "quiet"
                print(f"{where}: shared {shared:.1f} s, side by side {beside:.1f} s: {beside / shared:.2f}", flush=True)


if __name__ == "__main__":
    main()
