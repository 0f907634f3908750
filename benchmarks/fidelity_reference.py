"""Claim: levels made here lose no more than llama-quantize's own, under 2.5 GB, the whole ladder in one pass.

    scripts/bench fidelity_reference --model reference-f16.gguf --text wikitext2-test.txt
        [--levels Q4_K_M,...] [--calibrate wikitext2-valid.txt] [--effort good] [--exact]
        [--threads 2] [--keep DIR] [--json FILE]

Walks the reference model (made by make_reference.py of the reference material) over the first 30,000 bytes of
WikiText-2's test part, in windows of 512 tokens whose second halves are scored, and prints mean KL, top-1
agreement and perplexity beside what llama.cpp b11434 gives for files of its own llama-quantize on the same
tokens. With ``--calibrate`` an importance matrix is gathered from the first 120,000 bytes of that text, as
llama-imatrix was there. Activations are rounded as llama.cpp rounds them, unless ``--exact``. Peak memory is
this process's. Model and texts are not shipped; without them there is nothing to run.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.describe.text import Document
from bitladder.describe.windows import WINDOW, Window, text_windows
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile
from bitladder.records import to_json
from bitladder.stages.fidelity import made_candidates, walk
from bitladder.stages.imatrix import importance_matrix

MEASURE_BYTES, CALIBRATE_BYTES = 30_000, 120_000

# llama.cpp b11434: llama-quantize, then llama-perplexity -c 512 --kl-divergence against the F16 file (ppl
# 31.55): mean KL, top-1 percent, perplexity; then the first two with llama-imatrix's matrix.
LLAMA_CPP = {
    "Q8_0": (0.0043, 96.1, 31.53, None, None),
    "Q6_K": (0.0318, 88.6, 32.83, 0.0261, 89.4),
    "Q5_K_M": (0.0552, 86.1, 33.99, 0.0355, 87.1),
    "Q5_K_S": (0.0739, 84.1, 34.41, 0.0369, 87.8),
    "Q4_K_M": (0.1596, 76.4, 37.13, 0.0796, 83.2),
    "Q4_K_S": (0.2321, 71.1, 39.11, 0.0844, 83.1),
    "Q3_K_L": (0.3999, 67.7, 51.44, 0.2002, 75.3),
    "Q3_K_M": (0.5667, 61.1, 59.79, 0.2220, 74.1),
    "Q3_K_S": (0.8261, 55.3, 66.35, 0.4325, 63.9),
    "Q2_K": (2.7952, 23.3, 563.08, 0.6999, 55.8),
}
DONE_WHEN = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q3_K_M,Q2_K"


def whole_windows(server: LlamaServer, source: GgufFile, text: Path, size: int) -> list[Window]:
    """The full windows of the text's first ``size`` bytes; llama-perplexity drops the last, shorter one."""
    document = Document(text.stem, text.read_bytes()[:size].decode("utf-8", "ignore"))
    windows = text_windows([document], lambda part: server.tokenize(part, add_special=True), source.model)
    return [window for window in windows if len(window.tokens) == WINDOW]


def peak_bytes() -> int:
    """This process's own peak; ru_maxrss would count whoever started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--levels", default=DONE_WHEN)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--effort", default="good")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder in which a killed run leaves its states and finds them")
    parser.add_argument("--exact", action="store_true", help="leave activations unrounded, unlike llama.cpp")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    absent = [path for path in (options.model, options.text, options.calibrate) if path and not path.exists()]
    if absent:
        print(f"{absent[0]} is absent; nothing was measured")
        return 1
    torch.set_num_threads(options.threads)
    levels = options.levels.split(",")
    importance: Mapping[str, NDArray[np.float32]] | None = None
    with GgufFile.open(options.model) as source:
        with LlamaServer(Launch(options.model, n_ctx=512, threads=options.threads)) as server:
            windows = whole_windows(server, source, options.text, MEASURE_BYTES)
            if options.calibrate:
                fitted = whole_windows(server, source, options.calibrate, CALIBRATE_BYTES)
        started = time.perf_counter()
        if options.calibrate:
            importance = importance_matrix(source, fitted, threads=options.threads).vectors()
            print(f"importance matrix: {len(fitted)} windows, {time.perf_counter() - started:.0f} s")
            started = time.perf_counter()
        candidates = made_candidates(
            source, levels, importance=importance, effort=options.effort, threads=options.threads
        )
        found = walk(
            source,
            candidates,
            windows,
            threads=options.threads,
            keep=options.keep,
            engine_rounding=not options.exact,
        )
        seconds, peak = time.perf_counter() - started, peak_bytes()
    tokens = found[0].tokens
    print(f"{len(windows)} windows, {tokens} scored tokens, reference perplexity {found[0].ppl_reference:.2f}")
    print(
        f"{'level':8} {'KL':>8} {'95% interval':>19} {'llama.cpp':>9} {'top-1':>6} {'there':>6} {'ppl':>8} {'there':>8}"
    )
    worse = 0
    for one in found:
        theirs = LLAMA_CPP.get(one.level, (None,) * 5)
        kl, top1 = (theirs[3], theirs[4]) if importance else theirs[:2]
        worse += kl is not None and one.kl_mean > kl
        ppl = theirs[2] if not importance else None
        print(
            f"{one.level:8} {one.kl_mean:8.4f} [{one.kl_low:8.4f},{one.kl_high:8.4f}] {kl or float('nan'):9.4f} "
            f"{100 * one.top1:6.1f} {top1 or float('nan'):6.1f} {one.ppl:8.2f} {ppl or float('nan'):8.2f}"
        )
    print(f"{seconds:.0f} s, peak {peak / 1e9:.2f} GB; {worse} of {len(found)} levels above llama.cpp's")
    if options.json:
        options.json.write_text(json.dumps({"levels": to_json(found), "seconds": seconds, "peak_bytes": peak}))
    return int(worse > 0 or peak > 2.5e9)


if __name__ == "__main__":
    sys.exit(main())
