"""Claim: every level from one walk costs at most 1.6 times the walk that builds GPTQ-4bit alone.

    scripts/bench calibration_shared --model MODEL.gguf --out DIR [--windows 64] [--threads 1]
        [--levels GPTQ-4bit-g64,AWQ-4bit-g64,INT8-W8A8] [--gguf Q8_0,Q5_K_M,Q4_K_M,Q3_K_M]

Builds GPTQ-4bit-g64 alone, then everything in one call: checkpoints, the importance matrix, and GGUF files weighed
by it; both from reading the file to the proof of what was written. Processor seconds of one run, so that other work
on the machine does not count; random tokens, as cost does not depend on them. Says what the importance matrix and
the GGUF files took of it. The model is not shipped.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bitladder.describe.windows import WINDOW, Window
from bitladder.files.gguf import GgufFile
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.levels.products import ImportanceVectors, Product
from bitladder.stages.calibrate import Calibrated, Calibration, Reading
from bitladder.stages.write_levels import quantize_levels
from bitladder.walk.checkpoint_walk import Settings

TARGET = 1.6


def calibrated(source: GgufFile, wanted: list[Product], windows: list[Window], out: Path, threads: int) -> Calibrated:
    shutil.rmtree(out, ignore_errors=True)
    job = Calibration(source, wanted, Reading(windows), out_dir=out, name="model", settings=Settings(threads=threads))
    return job.run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--levels", default="GPTQ-4bit-g64,AWQ-4bit-g64,INT8-W8A8")
    parser.add_argument("--gguf", default="Q8_0,Q5_K_M,Q4_K_M,Q3_K_M")
    for name, default in (("--windows", 64), ("--threads", 1)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    levels: list[Product] = [parse_checkpoint(level) for level in options.levels.split(",")]
    with GgufFile.open(options.model) as source:
        n_vocab = source.model.dims.n_vocab
        windows = [Window(f"document {at}", rng.integers(0, n_vocab, WINDOW)) for at in range(options.windows)]
        calibrated(source, levels, windows[:2], options.out, options.threads)  # kernels compile

        started = time.process_time()
        calibrated(source, [parse_checkpoint("GPTQ-4bit-g64")], windows, options.out, options.threads)
        alone = time.process_time() - started
        print(f"GPTQ-4bit-g64 alone, {options.windows} windows: {alone:.1f} CPU s", flush=True)

        started = time.process_time()
        found = calibrated(source, [*levels, ImportanceVectors()], windows, options.out, options.threads)
        walked = time.process_time() - started
        assert found.importance is not None
        quantize_levels(
            source, options.gguf.split(","), options.out, importance=found.importance.vectors(),
            threads=options.threads,
        )  # fmt: skip
        together = time.process_time() - started
    print(f"{options.levels} and the importance matrix: {walked:.1f}; {options.gguf}: {together - walked:.1f}")
    print(f"ratio {together / alone:.2f} (target {TARGET})")
    return int(together > TARGET * alone)


if __name__ == "__main__":
    sys.exit(main())
