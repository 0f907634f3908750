"""Claim: a walk whose products in f32 go through oneDNN takes half of the time of one by torch's own, on an AMD
processor with AVX-512; KL is the same up to rounding.

    scripts/bench walk_products [--model smollm2-135m] [--levels Q8_0,Q4_K_M,Q3_K_M] [--windows 8] [--rounds 3]

The source and levels made from it pass all layers on windows of 512 random tokens, both ways in turn, whatever the
processor is. Prints seconds of each, the share that oneDNN takes in every round, and how far KL of a level moves at
most.
"""

import argparse
import time
from pathlib import Path
from unittest import mock

import numpy as np

from bitladder.describe.windows import Window
from bitladder.files.demo import NAME, fetch_demo
from bitladder.files.gguf import GgufFile
from bitladder.stages.fidelity import made_candidates, walk
from bitladder.walk import products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--levels", default="Q8_0,Q4_K_M,Q3_K_M")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rng, levels = np.random.default_rng(0), args.levels.split(",")
    chosen, asked = products.one_dnn_pays(), [False]
    either_way = mock.patch.object(products, "one_dnn_pays", lambda: asked[0])
    with either_way, GgufFile.open(fetch_demo() if args.model == NAME else Path(args.model)) as source:
        ids = rng.integers(0, source.model.dims.n_vocab, (args.windows, 512))
        windows = [Window(str(at), tokens) for at, tokens in enumerate(ids)]
        walk(source, made_candidates(source, levels[:1], effort="fast"), windows[:1])  # what is loaded once
        for _ in range(args.rounds):
            seconds, losses = [], []
            for asked[0] in (False, True):
                began = time.monotonic()
                found = walk(source, made_candidates(source, levels, effort="fast", threads=2), windows)
                seconds.append(time.monotonic() - began)
                losses.append(np.array([one.kl_mean for one in found]))
            own, one_dnn = seconds
            moved = np.max(np.abs(losses[1] / losses[0] - 1))
            print(
                f"torch {own:.1f} s, oneDNN {one_dnn:.1f} s: {one_dnn / own:.2f}; KL moves by {moved:.1e}", flush=True
            )
    print(f"On this processor walks go through {'oneDNN' if chosen else 'torch'}.")


if __name__ == "__main__":
    main()
