"""Claim: walking a ladder of eight levels costs at most 1.3 times the bare forward passes of its nine models.

    scripts/bench walk_overhead --model model-F16.gguf [--windows 4] [--threads 2]

Bare passes: for each of nine models every layer once over the same hidden states and the output matrix once
over the scored positions, weights already in memory as float32. The walk: reading, quantizing and
dequantizing eight levels, nine sets of hidden states, KL, perplexity and top-1 of every token. Both in
processor seconds of one run, so that other work on the machine does not count. Random tokens: cost does not
depend on them.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bitladder.describe.windows import WINDOW, Window
from bitladder.files.gguf import GgufFile
from bitladder.stages.fidelity import made_candidates, walk
from bitladder.walk.layers import LayeredModel, inference
from bitladder.walk.states import batches_of
from bitladder.walk.weights import FileWeights

LEVELS = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K")


def bare_seconds(source: GgufFile, windows: list[Window]) -> float:
    """Processor seconds of one model's layers and output matrix; nothing else is on the clock."""
    weights = FileWeights(source)
    model = LayeredModel(source.model, weights)
    spent = 0.0
    for batch in batches_of(windows):
        states = model.embed(batch.tokens, weights)
        for layer in range(model.n_layer):
            block = model.layer(layer, weights)
            started = time.process_time()
            states = model.run(block, layer, states)
            spent += time.process_time() - started
        head = torch.from_numpy(weights(model.output))
        scored = states[:, WINDOW // 2 : -1].reshape(-1, states.shape[-1])
        with inference():
            started = time.process_time()
            for part in torch.split(scored, 512):
                part @ head.T
            spent += time.process_time() - started
    return spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    with GgufFile.open(options.model) as source:
        n_vocab = source.model.dims.n_vocab
        windows = [Window(f"document {at}", rng.integers(0, n_vocab, WINDOW)) for at in range(options.windows)]
        walk(source, made_candidates(source, LEVELS), windows[:1])  # kernels compile, files come into the cache
        bare = (1 + len(LEVELS)) * bare_seconds(source, windows)
        candidates = made_candidates(source, LEVELS, threads=options.threads)
        started = time.process_time()
        walk(source, candidates, windows, threads=options.threads)
        walked = time.process_time() - started
    print(
        f"{options.windows} windows of {WINDOW}, {len(LEVELS)} levels: bare passes {bare:.1f}, walk {walked:.1f} CPU s"
    )
    print(f"ratio {walked / bare:.2f}")
    return int(walked > 1.3 * bare)


if __name__ == "__main__":
    sys.exit(main())
