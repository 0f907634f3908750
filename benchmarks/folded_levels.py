"""Claim: AWQ's scales, folded in before packing K-quants, lose less than the same levels with an importance matrix.

    scripts/bench folded_levels --model MODEL.gguf --text wikitext2-test.txt --out DIR
                                [--calibrate TEXT] [--levels Q4_K_M,Q3_K_M,Q2_K] [--windows 40] [--threads 2]

Gathers the importance matrix and the scales of every level in one walk over the calibration text (the one that ships,
or 32 windows of another), writes each level plainly and folded, both weighed by that importance matrix, and walks
source and files over the same windows of 512 tokens (second halves scored). Prints mean KL of both with intervals
that resample windows, perplexity and top-1 agreement. Model and text are not shipped.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from bitladder.describe.text import Document
from bitladder.describe.windows import WINDOW, Window, text_windows
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile
from bitladder.files.texts import shipped_texts
from bitladder.levels import FoldedLevel
from bitladder.levels.products import ImportanceVectors
from bitladder.progress import StepsOnly
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.stages.fidelity import file_candidate, walk
from bitladder.stages.write_levels import quantize_levels
from bitladder.walk.checkpoint_walk import Settings


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--text", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--levels", default="Q4_K_M,Q3_K_M,Q2_K")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def say(what: str, done: float, total: float) -> None:
    print(f"\r{what} ({done:.0f}/{total:.0f})".ljust(110), end="", file=sys.stderr, flush=True)


def read(
    source: GgufFile, calibrate: Path | None, text: Path, count: int, threads: int
) -> tuple[list[Window], list[Window]]:
    """Windows to calibrate on and to measure on; each measuring window is a document of its own."""
    with LlamaServer(Launch(source.path, n_ctx=WINDOW, threads=threads)) as server:

        def windows_of(documents: list[Document]) -> list[Window]:
            return text_windows(documents, lambda part: server.tokenize(part, add_special=True), source.model)

        own = [Document(calibrate.stem, calibrate.read_text()[: 32 * 6 * WINDOW])] if calibrate else None
        calibration = windows_of(own or shipped_texts("calibration"))[: 32 if own else None]
        measured = windows_of([Document(text.stem, text.read_text()[: 6 * WINDOW * count])])[:count]
    return calibration, [Window(f"{at}", window.tokens) for at, window in enumerate(measured)]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    source = GgufFile.open(options.model)
    calibration, measuring = read(source, options.calibrate, options.text, options.windows, options.threads)
    levels = options.levels.split(",")
    job = Calibration(
        source,
        [ImportanceVectors(), *(FoldedLevel(level) for level in levels)],
        Reading(calibration, measuring=measuring),
        out_dir=options.out,
        name=source.model.name,
        settings=Settings(threads=options.threads),
    )
    found = job.run(StepsOnly(say))
    assert found.importance is not None
    importance = found.importance.vectors()
    for scales in found.report.folded:
        worst = np.nanmean([one.loss for one in scales.linears])
        print(f"\n{scales.level}: {scales.scaled} of {len(scales.linears)} tensors scaled, mean error {worst:.2%}")
    files = []
    for level in levels:
        for folds in (None, found.folds[f"AWQ-{level}"]):
            files += quantize_levels(
                source, [level], options.out, importance=importance, folds=folds, threads=options.threads
            )
    candidates = [file_candidate(source, GgufFile.open(file.path), level=file.level) for file in files]
    print(f"\n{'level':12} {'bytes':>12} {'mean KL':>8} {'95% interval':>18} {'perplexity':>10} {'top-1':>6}")
    found_levels = walk(source, candidates, measuring, progress=StepsOnly(say), threads=options.threads)
    for file, one in zip(files, found_levels, strict=True):
        print(
            f"\n{one.level:12} {file.bytes:12,} {one.kl_mean:8.4f} {one.kl_low:8.4f}..{one.kl_high:8.4f} "
            f"{one.ppl:10.2f} {one.top1:6.1%}",
            end="",
        )
    print()


if __name__ == "__main__":
    main()
