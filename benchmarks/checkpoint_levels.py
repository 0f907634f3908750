"""Claim: GPTQ, AWQ and INT8 checkpoints from one walk lose no more than peers' on the same tokens, in less
time and memory.

    scripts/bench checkpoint_levels --model MODEL.gguf --calibrate wikitext2-valid.txt --text
    wikitext2-test.txt --out DIR
                                    [--levels GPTQ-4bit-g64,AWQ-4bit-g64] [--calibration-windows 64]
                                    [--windows 20] [--peer NAME=LEVEL=FOLDER ...] [--threads 2]

Builds the levels, then walks source, levels and peers' folders over the same windows of 512 tokens (second
halves scored) and prints seconds, CPU seconds and peak memory of the build, then mean KL with its interval
and perplexity of each. A peer's folder is any checkpoint of the same weights in a layout of
formats/checkpoint.py without activation order in its groups; ``benchmarks/gptqmodel_peer.py`` makes one.
Model and texts are not shipped.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

from bitladder.describe.text import Document
from bitladder.describe.windows import WINDOW
from bitladder.engines.checkpoint_walk import Settings
from bitladder.engines.checkpoint_weights import CheckpointWeights
from bitladder.engines.llama import LlamaServer
from bitladder.engines.weights import FileWeights
from bitladder.files.gguf import GgufFile
from bitladder.formats.checkpoint import parse_level
from bitladder.stages.calibrate import quantize_checkpoints
from bitladder.stages.walk import Candidate, text_windows, walk


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--calibrate", "--text", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--levels", default="GPTQ-4bit-g64,GPTQ-3bit-g64,AWQ-4bit-g64,INT8-W8A8,INT8-W8A16")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=LEVEL=FOLDER")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def say(what: str, done: float, total: float) -> None:
    print(f"\r{what} ({done:.0f}/{total:.0f})".ljust(90), end="", file=sys.stderr, flush=True)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    source = GgufFile.open(options.model)
    with LlamaServer(options.model, n_ctx=WINDOW, threads=options.threads) as server:

        def windows_of(path: Path, count: int) -> list:
            text = path.read_text(encoding="utf-8")[: 8 * WINDOW * count]
            made = text_windows(
                [Document(path.stem, text)], lambda part: server.tokenize(part, add_special=True), source.model
            )
            return made[:count]

        calibration = windows_of(options.calibrate, options.calibration_windows)
        measuring = windows_of(options.text, options.windows)
    levels = options.levels.split(",")
    started, cpu = time.monotonic(), time.process_time()
    reports = quantize_checkpoints(
        source,
        levels,
        options.out,
        calibration,
        name=options.model.stem,
        settings=Settings(threads=options.threads),
        measuring=measuring,
        progress=say,
    )
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\n{len(levels)} levels, {len(calibration)} windows: {seconds:.0f} s, {cpu:.0f} CPU s, peak {peak:.2f} GB")

    folders = [(report.level, report.level, Path(report.path)) for report in reports]
    for peer in options.peer:
        name, level, folder = peer.split("=", 2)
        folders.append((name, level, Path(folder)))
    reference = FileWeights(source, threads=options.threads)
    candidates = [
        Candidate(name, CheckpointWeights(reference, folder, parse_level(level))) for name, level, folder in folders
    ]
    print(f"\n{'level':24} {'mean KL':>8} {'95% interval':>18} {'perplexity':>10} {'(source)':>9} {'top-1':>6}")
    for found in walk(source, candidates, measuring, progress=say, threads=options.threads):
        print(
            f"{found.level:24} {found.kl_mean:8.4f} {found.kl_low:8.4f}..{found.kl_high:8.4f} {found.ppl:10.2f} "
            f"{found.ppl_reference:9.2f} {found.top1:6.1%}"
        )


if __name__ == "__main__":
    main()
