"""Claim: levels measured by products of differences in bfloat16 have the losses of a walk in f32, in less time.

    scripts/bench walk_differences --model MODEL.gguf --level FILE.gguf ... [--windows 4] [--rounds 2] [--threads 1]

Walks levels over the first windows of the shipped text, each round both ways in turns. Prints processor seconds (what
other programs take does not count) of each round, and for each level the loss both ways and the median over tokens of
what they differ by. Where the processor has no matrix instructions for bfloat16 a run walks in f32, and this says what
it would have been.
"""

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from bitladder.describe.windows import text_windows
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile
from bitladder.files.texts import shipped_texts
from bitladder.stages.fidelity import file_candidate, token_scores
from bitladder.walk.differences import differences_pay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--level", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with ExitStack() as stack:
        source = stack.enter_context(GgufFile.open(args.model))
        with LlamaServer(Launch(args.model, n_ctx=512, threads=args.threads)) as engine:
            windows = text_windows(shipped_texts(), lambda text: engine.tokenize(text, add_special=True), source.model)[
                : args.windows
            ]
        levels = [file_candidate(source, stack.enter_context(GgufFile.open(path))) for path in args.level]
        print(
            f"matrix instructions for bfloat16: {differences_pay()}; {sum(len(one.tokens) for one in windows)} tokens"
        )
        for number in range(args.rounds):
            found, seconds = {}, {}
            for way in (False, True):
                began = time.process_time()
                found[way] = token_scores(source, levels, windows, differences=way)
                seconds[way] = time.process_time() - began
            ratio = seconds[True] / seconds[False]
            print(f"round {number + 1}: f32 {seconds[False]:.1f} s, differences {seconds[True]:.1f} s, {ratio:.2f}")
        for at, level in enumerate(levels, 1):
            exact, other = found[False][at].kl, found[True][at].kl
            apart = np.median(np.abs(other - exact) / np.maximum(exact, 1e-12))
            moved = other.mean() / exact.mean() - 1
            print(f"{level.level}: KL {exact.mean():.6g}, {other.mean():.6g} ({moved:+.2%}); tokens {apart:.2%} apart")


if __name__ == "__main__":
    main()
