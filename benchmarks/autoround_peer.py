"""Claim: at the bytes of AutoRound's GGUF files, our recipes lose less on held-out text.

    scripts/bench autoround_peer --model reference-f16.gguf --calibrate wikitext2-valid.txt --text wikitext2-test.txt
        --theirs FILE.gguf ... [--ours FILE.gguf|- ...] [--fit-tokens 12288] [--documents 8] [--threads 2]
        [--keep DIR] [--json FILE]

Their files are made beforehand, in an environment of their own, from the same model and the same calibration tokens
(autoround_export.py). For each, ours is a recipe of at most as many bytes of tensors with error feedback; ``--ours``
names files made before by such a recipe instead, one for each of theirs, ``-`` where one is to be made. Files are read
as llama.cpp reads them, so an output matrix that AutoRound stores apart from the embedding counts by its bytes and in
what it does. Weights that their file holds as NaN are taken from the 16-bit source, which flatters theirs, and counted.
KL against the 16-bit source on the first window of each of several articles of the test text; ratios of
mean KL with paired intervals over documents.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from level_texts import articles, first_windows, fitting_windows, parsed, parser_of, per_document
from numpy.typing import NDArray

from bitladder.describe.windows import WINDOW, Window
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile
from bitladder.kernels import dequantize
from bitladder.plan.recipe import Limits, choose
from bitladder.records.recipe import SensitivityTable
from bitladder.stages.feedback import write_with_feedback
from bitladder.stages.fidelity import Candidate, file_candidate, token_scores
from bitladder.stages.sensitivity import sensitivity_table
from bitladder.stats.bootstrap import ratio_interval
from bitladder.walk.feedback import FeedbackSettings
from bitladder.walk.weights import FileWeights


def tensor_bytes(file: GgufFile) -> int:
    return sum(tensor.nbytes for tensor in file.model.tensors)


class Mended(FileWeights):
    """A file's weights, with the source's own where they are NaN or infinite."""

    def __init__(self, file: GgufFile, source: GgufFile, *, threads: int) -> None:
        super().__init__(file, threads=threads)
        self._exact, self._cores = FileWeights(source, threads=threads), threads
        self.mended: dict[str, int] = {}

    def __call__(self, name: str, rows: slice | NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """As ``FileWeights``, mended."""
        info = self.file.info(name)
        data = np.ascontiguousarray(self.file.raw(name) if rows is None else self.file.raw(name)[rows])
        values = dequantize(data, info.qtype, threads=self._cores)
        values = values.reshape(info.shape) if rows is None else values
        wrong = ~np.isfinite(values)
        if wrong.any():
            values[wrong] = self._exact(name, rows)[wrong]
            self.mended[name] = int(wrong.sum())
        return values


class Ours:
    """Recipes of ours for given bytes; the sensitivities are found once, when first needed."""

    def __init__(self, source: GgufFile, windows: Sequence[Window], keep: Path, threads: int) -> None:
        self._source, self._windows, self._keep, self._threads = source, windows, keep, threads
        self._table: SensitivityTable | None = None

    def of_size(self, size: int, name: str) -> Path:
        """A file of at most so many bytes of tensors."""
        started = time.perf_counter()
        if self._table is None:
            some = self._windows[:: max(1, len(self._windows) // 8)]
            self._table = sensitivity_table(self._source, some, threads=self._threads)
        recipe = choose(self._table, self._source.model, Limits(bytes=size))
        settings = FeedbackSettings(threads=self._threads)
        made = write_with_feedback(self._source, recipe, self._keep / name, self._windows, settings=settings)
        took = f"{time.perf_counter() - started:.0f} s" + (", was there" if made.file.reused else "")
        print(f"for {name}: {recipe.label}, {recipe.bytes:,} of {size:,} bytes, {took}", flush=True)
        return made.file.path


def pairs(options: argparse.Namespace, ours: Ours) -> Iterator[tuple[GgufFile, GgufFile]]:
    """Each of their files with ours, which is no larger."""
    for path, given in zip(options.theirs, options.ours or ["-"] * len(options.theirs), strict=True):
        theirs = GgufFile.open(path)
        own = GgufFile.open(ours.of_size(tensor_bytes(theirs), path.stem) if given == "-" else Path(given))
        if tensor_bytes(own) > tensor_bytes(theirs):
            raise SystemExit(f"{own.path} is larger than {path}: {tensor_bytes(own):,}, {tensor_bytes(theirs):,} bytes")
        yield theirs, own


def compare(
    source: GgufFile, found: Sequence[tuple[GgufFile, GgufFile]], windows: Sequence[Window], threads: int
) -> list[dict[str, Any]]:
    files = [file for pair in found for file in pair]
    candidates = [file_candidate(source, file, threads=threads) for file in files]
    mended = [Mended(theirs, source, threads=threads) for theirs, _ in found]
    candidates[::2] = [Candidate(weights.file.path.stem, weights) for weights in mended]
    scores = token_scores(source, candidates, windows, threads=threads)[1:]
    kl = [per_document(one.kl, windows) for one in scores]
    tokens = sum(window.scored for window in windows)
    for weights in mended:
        count, tensors = sum(weights.mended.values()), len(weights.mended)
        print(f"{weights.file.path.name}: {count:,} weights of {tensors} tensors are NaN, taken from the source")
    print(f"\n{len(windows)} documents, {tokens} scored tokens")
    print(f"{'file':44} {'tensor bytes':>13} {'mean KL':>9} {'of AutoRound':>13} {'95% interval':>17}")
    rows = []
    for at, (theirs, own) in enumerate(found):
        ratio = ratio_interval(kl[2 * at + 1], kl[2 * at], np.random.default_rng(0), scale="log")
        for file, loss, said in ((theirs, kl[2 * at], ""), (own, kl[2 * at + 1], f"{ratio.value:.3f}")):
            interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]" if said else ""
            name = file.path.stem[:44]
            print(f"{name:44} {tensor_bytes(file):13,} {loss.sum() / tokens:9.4f} {said:>13} {interval:>17}")
        rows.append({"theirs": theirs.path.name, "their_bytes": tensor_bytes(theirs), "our_bytes": tensor_bytes(own),
                     "their_kl": float(kl[2 * at].sum() / tokens), "kl": float(kl[2 * at + 1].sum() / tokens),
                     "ratio": ratio.value, "low": ratio.low, "high": ratio.high})  # fmt: skip
    return rows


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--theirs", type=Path, nargs="+", required=True)
    parser.add_argument("--ours", nargs="+", help="a file, or '-' to make it, for each of theirs")
    parser.add_argument("--fit-tokens", type=int, default=12288)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--keep", type=Path, default=Path("autoround-peer"), help="folder for the files made")
    options = parsed(parser, "theirs", "ours", hint=" (AutoRound's files are made by autoround_export.py)")
    with GgufFile.open(options.model) as source:
        with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=1)) as server:
            fitting = fitting_windows(server, source, options.calibrate, options.fit_tokens)
            measuring = first_windows(server, source, articles(options.text, options.documents))
        found = list(pairs(options, Ours(source, fitting, options.keep, options.threads)))
        rows = compare(source, found, measuring, options.threads)
    for pair in found:
        for file in pair:
            file.close()
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "autoround_peer", "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
