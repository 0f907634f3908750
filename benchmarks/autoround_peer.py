"""Claim: at the bytes of AutoRound's GGUF files, our recipes lose less on held-out text.

    scripts/bench autoround_peer --model reference-f16.gguf --calibrate wikitext2-valid.txt --text wikitext2-test.txt
        --theirs FILE.gguf ... [--ours FILE.gguf|- ...] [--fit-tokens 12288] [--layers N] [--documents 8]
        [--threads 2] [--keep DIR] [--json FILE]

Their files are made beforehand, in an environment of their own, from the same model and the same calibration tokens
(autoround_export.py). For each, ours is a recipe of at most as many bytes of tensors with error feedback; ``--ours``
names files made before by such a recipe instead, one for each of theirs, ``-`` where one is to be made. Files are read
as llama.cpp reads them, so an output matrix that AutoRound stores apart from the embedding counts by its bytes and in
what it does. With ``--layers N`` only N layers, spread evenly, are compared, and all else is the source's on both
sides: their default of 200 rounds takes minutes a layer. Weights that their file holds as NaN are taken from the 16-bit
source, which flatters theirs, and counted. KL against the 16-bit source on the first window of each of several articles
of the test text; ratios of mean KL with paired intervals over documents.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from level_texts import (
    SomeTypes,
    articles,
    first_windows,
    fitting_windows,
    parsed,
    parser_of,
    part_of,
    per_document,
    weighed_only,
    with_the_rest,
)
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
from bitladder.stages.sensitivity import weigh
from bitladder.stats.bootstrap import ratio_interval
from bitladder.walk.feedback import FeedbackSettings
from bitladder.walk.weights import FileWeights


def tensor_bytes(file: GgufFile, layers: int) -> int:
    return sum(tensor.nbytes for tensor in part_of(file.model, layers).tensors)


class Mended(FileWeights):
    """A file's weights, with the source's own where they are NaN or infinite, and outside the layers compared."""

    def __init__(self, file: GgufFile, source: GgufFile, layers: int, *, threads: int) -> None:
        super().__init__(file, threads=threads)
        self._exact, self._cores = FileWeights(source, threads=threads), threads
        self._compared = frozenset(one.name for one in part_of(file.model, layers).tensors)
        self.mended: dict[str, int] = {}

    def __call__(self, name: str, rows: slice | NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """As ``FileWeights``, mended."""
        if name not in self._compared:
            return self._exact(name, rows)
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

    def __init__(self, source: GgufFile, windows: Sequence[Window], layers: int, keep: Path, threads: int) -> None:
        self._source, self._windows, self._keep, self._threads = source, windows, keep, threads
        self._part = part_of(source.model, layers)
        self._table: SensitivityTable | None = None

    def of_size(self, size: int, name: str) -> Path:
        """A file of at most so many bytes of tensors."""
        started = time.perf_counter()
        if self._table is None:
            some = self._windows[:: max(1, len(self._windows) // 8)]
            choices = SomeTypes(frozenset(one.name for one in self._part.tensors), low=False)
            self._table = weighed_only(weigh(self._source, some, threads=self._threads, choices=choices).table)
        chosen = choose(self._table, self._part, Limits(bytes=size))
        recipe = with_the_rest(chosen, self._source.model)
        settings = FeedbackSettings(threads=self._threads)
        made = write_with_feedback(self._source, recipe, self._keep / name, self._windows, settings=settings)
        took = f"{time.perf_counter() - started:.0f} s" + (", was there" if made.file.reused else "")
        print(f"for {name}: {chosen.label}, {chosen.bytes:,} of {size:,} bytes, {took}", flush=True)
        return made.file.path


def pairs(options: argparse.Namespace, ours: Ours) -> Iterator[tuple[GgufFile, GgufFile]]:
    """Each of their files with ours, which is no larger."""
    for path, given in zip(options.theirs, options.ours or ["-"] * len(options.theirs), strict=True):
        theirs = GgufFile.open(path)
        size = tensor_bytes(theirs, options.layers)
        own = GgufFile.open(ours.of_size(size, path.stem) if given == "-" else Path(given))
        if (made := tensor_bytes(own, options.layers)) > size:
            raise SystemExit(f"{own.path} is larger than {path}: {made:,}, {size:,} bytes")
        yield theirs, own


def compare(
    source: GgufFile, found: Sequence[tuple[GgufFile, GgufFile]], windows: Sequence[Window], layers: int, threads: int
) -> list[dict[str, Any]]:
    files = [file for pair in found for file in pair]
    candidates = [file_candidate(source, file, threads=threads) for file in files]
    mended = [Mended(theirs, source, layers, threads=threads) for theirs, _ in found]
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
    for at, pair in enumerate(found):
        ratio = ratio_interval(kl[2 * at + 1], kl[2 * at], np.random.default_rng(0), scale="log")
        sizes = [tensor_bytes(file, layers) for file in pair]
        said_of = ("", f"{ratio.value:.3f}")
        for file, size, loss, said in zip(pair, sizes, kl[2 * at : 2 * at + 2], said_of, strict=True):
            interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]" if said else ""
            name = file.path.stem[:44]
            print(f"{name:44} {size:13,} {loss.sum() / tokens:9.4f} {said:>13} {interval:>17}")
        rows.append({"theirs": pair[0].path.name, "their_bytes": sizes[0], "our_bytes": sizes[1],
                     "their_kl": float(kl[2 * at].sum() / tokens), "kl": float(kl[2 * at + 1].sum() / tokens),
                     "ratio": ratio.value, "low": ratio.low, "high": ratio.high})  # fmt: skip
    return rows


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--theirs", type=Path, nargs="+", required=True)
    parser.add_argument("--ours", nargs="+", help="a file, or '-' to make it, for each of theirs")
    parser.add_argument("--fit-tokens", type=int, default=12288)
    parser.add_argument("--layers", type=int, default=0, help="compare only so many; 0: all, and the embedding")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--keep", type=Path, default=Path("autoround-peer"), help="folder for the files made")
    options = parsed(parser, "theirs", "ours", hint=" (AutoRound's files are made by autoround_export.py)")
    with GgufFile.open(options.model) as source:
        with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=1)) as server:
            fitting = fitting_windows(server, source, options.calibrate, options.fit_tokens)
            measuring = first_windows(server, source, articles(options.text, options.documents))
        found = list(pairs(options, Ours(source, fitting, options.layers, options.keep, options.threads)))
        rows = compare(source, found, measuring, options.layers, options.threads)
    for pair in found:
        for file in pair:
            file.close()
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "autoround_peer", "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
