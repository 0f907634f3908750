"""Claim: at the bytes of llama.cpp's levels, our recipes with error feedback lose a fraction, on held-out text.

    scripts/bench quality_per_byte --model reference-f16.gguf --calibrate wikitext2-valid.txt
        --text wikitext2-test.txt [--other TEXT_OR_FOLDER] [--levels Q4_K_M,...] [--fit-tokens 12288] [--part N]
        [--wide] [--tune-tokens N] [--effort good] [--documents 16] [--in-domain-only] [--share 1] [--layers N]
        [--ablate] [--threads 2] [--keep DIR] [--json FILE]

Both sides see the same calibration tokens. Theirs: llama.cpp's mix of types (all 96 recorded mixes are reproduced
tensor by tensor, tests/formats/test_recipes.py), quantized by ggml's own reference code (libgguf) under an importance
matrix of those tokens. Ours: a recipe of at most as many bytes, or a share of them, codes chosen with error feedback;
of types as ``bitladder recipe`` chooses them, so of codebook types, too, at the bytes of Q3_K_S and below. A killed
run goes on from what ``--keep`` holds. With ``--wide`` both sides see all calibration text that ships, too
(``--fit-tokens 0``: that alone). With ``--tune-tokens N`` scales of ours are tuned on the N tokens of the calibration
text after those that codes are fitted to; the importance matrix, of both sides, counts these too. With ``--layers N``
only N layers, spread evenly, are quantized on both sides and all else stays 16 bits: for types that take long to
write. KL against the 16-bit source on the first window of each of several articles of the test text, and of texts of
another kind (the ones that ship to measure on); ratios of mean KL with paired intervals over documents. ``--ablate``
adds each ingredient alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from level_texts import (
    Side,
    SomeTypes,
    compare,
    fitting_windows,
    measuring_texts,
    parsed,
    parser_of,
    part_of,
    weighed_only,
    with_the_rest,
)
from libgguf_here import libgguf_or_exit
from numpy.typing import NDArray

from bitladder.describe.windows import WINDOW, Window, text_windows, tokens_hash
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.atomic import write_whole, written_aside
from bitladder.files.folders import cache_key
from bitladder.files.gguf import GgufFile
from bitladder.files.imatrix import read_imatrix, write_imatrix
from bitladder.files.texts import read_texts, shipped_texts
from bitladder.formats.recipes import assign
from bitladder.plan.recipe import Limits, choose, recipe_bytes, wants_low
from bitladder.progress import StepsOnly
from bitladder.records import to_json
from bitladder.records.reading import read_json
from bitladder.records.recipe import Recipe, SensitivityTable
from bitladder.stages.feedback import write_with_feedback
from bitladder.stages.fidelity import Candidate, file_candidate
from bitladder.stages.imatrix import importance_matrix
from bitladder.stages.sensitivity import MADE_BY, BlockTypes, weigh
from bitladder.walk.feedback import FeedbackSettings
from bitladder.walk.weights import FileWeights, MadeWeights, Quantizer

F32 = NDArray[np.float32]
LEVELS = "Q4_K_M,Q4_K_S,Q3_K_M,Q3_K_S,Q2_K"


class GgmlQuantizer(Quantizer):
    """Tensors in the bytes of ggml's own code, kept in a folder: its codebook types take minutes."""

    def __init__(self, source: FileWeights, importance: Mapping[str, F32], keep: Path) -> None:
        super().__init__(source, importance=importance)
        self.libgguf, self.keep = libgguf_or_exit(), keep

    def identity(self, name: str, qtype: str) -> Any:
        """Not to be taken for our bytes."""
        own = super().identity(name, qtype)
        assert isinstance(own, tuple)
        return "ggml", *own

    def _pack(self, name: str, weights: F32, qtype: str, rows: Any) -> NDArray[np.uint8]:
        kept = self.keep / f"{cache_key(name, qtype, repr(self.identity(name, qtype)))[:32]}.npy"
        if rows is None and kept.exists():
            return np.asarray(np.load(kept), np.uint8)
        kind = self.libgguf.GGMLQuantizationType[qtype]
        stored = self.libgguf.quantize_rows(weights, kind, imatrix=self._importance.get(name))
        made = np.asarray(stored, np.uint8).reshape(len(weights), -1)
        if rows is None:
            with written_aside(kept) as file:
                np.save(file, made)
        return made


def kept_importance(source: GgufFile, windows: Sequence[Window], options: argparse.Namespace) -> Mapping[str, F32]:
    """The importance matrix of these tokens, gathered once."""
    kept = options.keep / f"importance-{cache_key(source.sha256, tokens_hash(windows))[:16]}.gguf"
    if not kept.exists():
        write_imatrix(kept, importance_matrix(source, windows, threads=options.threads, keep=options.keep / "walks"))
    return read_imatrix(kept).vectors()


def kept_table(
    source: GgufFile, windows: Sequence[Window], choices: BlockTypes, options: argparse.Namespace
) -> SensitivityTable:
    """Sensitivities by these tokens, found once."""
    kept = options.keep / f"table-{cache_key(*MADE_BY, source.sha256, tokens_hash(windows), choices.key)[:16]}.json"
    if not kept.exists():
        started = time.perf_counter()
        own = weigh(source, windows, threads=options.threads, choices=choices, keep=options.keep / "walks").table
        write_whole(kept, json.dumps(to_json(own)))
        print(f"sensitivities: {time.perf_counter() - started:.0f} s", flush=True)
    return read_json(SensitivityTable, kept.read_bytes())


def candidates(
    source: GgufFile,
    windows: Sequence[Window],
    tuning: Sequence[Window],
    options: argparse.Namespace,
    opened: list[GgufFile],
) -> list[Side]:
    """Everything that is compared; files of ours are made in ``--keep``."""
    weights = FileWeights(source, threads=options.threads)
    importance = kept_importance(source, [*windows, *tuning], options)
    theirs = GgmlQuantizer(weights, importance, options.keep / "ggml")
    ours = Quantizer(weights, importance=importance, threads=options.threads)
    part = part_of(source.model, options.layers)
    names = frozenset(one.name for one in part.tensors)
    found: list[Side] = []
    for level in options.levels.split(","):
        mix = assign(level, source.model.tensors, source.model.dims, has_importance=True)
        mix = {name: qtype for name, qtype in mix.items() if name in names}
        size, bpw = recipe_bytes(part, mix)
        named = Recipe(f"{level}-fed", source.model.dims.architecture, mix, size, bpw, None, (), True)
        limits = Limits(bytes=int(size * options.share))
        low = wants_low(part, limits)
        choices = SomeTypes(names, low=low) if options.layers else BlockTypes(low=low)
        table = weighed_only(kept_table(source, windows[:: max(1, len(windows) // 8)], choices, options))
        chosen = choose(table, part, limits)
        first = len(found)

        def add(side: str, candidate: Candidate, level: str = level, against: int = first) -> None:
            found.append(Side({"level": level, "side": side}, candidate, against))

        add("llama.cpp", Candidate(f"{level} llama.cpp", MadeWeights(theirs, mix)))
        fed = [("ours", chosen)]
        if options.ablate:
            add("our search", Candidate(f"{level} search", MadeWeights(ours, mix)))
            add("recipe", Candidate(f"{level} recipe", MadeWeights(ours, chosen.qtypes)))
            fed.append(("feedback", named))
        for side, recipe in fed:
            started = time.perf_counter()
            whole = with_the_rest(recipe, source.model)
            settings = FeedbackSettings(threads=options.threads, effort=options.effort)
            fitted = write_with_feedback(
                source, whole, options.keep / level, windows, settings=settings, tuning=tuning,
                progress=StepsOnly(tuning_told),
            )  # fmt: skip
            took = f"{time.perf_counter() - started:.0f} s" + (", was there" if fitted.file.reused else "")
            print(f"{level} {side}: {recipe.label}, {recipe.bytes:,} of {size:,} bytes, {took}", flush=True)
            opened.append(GgufFile.open(fitted.file.path))
            add(side, file_candidate(source, opened[-1], threads=options.threads))
    return found


def tuning_told(what: str, step: float, _steps: float) -> None:
    """Says what held-out text loses while numbers are tuned."""
    if "held-out" in what:
        print(f"step {step:g}: {what}", flush=True)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--levels", default=LEVELS)
    parser.add_argument("--fit-tokens", type=int, default=12288)
    parser.add_argument("--wide", action="store_true", help="fit to the text that ships, too, all of it")
    parser.add_argument("--tune-tokens", type=int, default=0, help="tune on so many tokens after those fitted to")
    parser.add_argument("--effort", default="good", choices=("good", "best"))
    parser.add_argument("--part", type=int, default=0, help="which stretch of the calibration text to fit to")
    parser.add_argument("--in-domain-only", action="store_true")
    parser.add_argument("--share", type=float, default=1.0, help="our bytes as a share of theirs")
    parser.add_argument("--layers", type=int, default=0, help="quantize only so many; 0: all, and the embedding")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--keep", type=Path, default=Path("quality-per-byte"), help="folder for the files made")
    options = parsed(parser)
    opened: list[GgufFile] = []
    with GgufFile.open(options.model) as source:
        other = read_texts([options.other]) if options.other else ()
        with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=1)) as server:
            tokens, part = options.fit_tokens, options.part
            wanted = tokens + options.tune_tokens
            given = fitting_windows(server, source, options.calibrate, wanted, part) if wanted else []
            fitting, tuning = given[: tokens // WINDOW], given[tokens // WINDOW :]
            if options.wide:
                shipped = shipped_texts("calibration") + shipped_texts("calibration/wide")
                fitting += text_windows(shipped, lambda text: server.tokenize(text, add_special=True), source.model)
            texts = measuring_texts(server, source, options, other)
        if options.in_domain_only:
            del texts["other domain"]
        all_of = candidates(source, fitting, tuning, options, opened)
        how: dict[str, Any] = {"of": "llama.cpp", "threads": options.threads, "keep": options.keep / "walks"}
        rows = [row for name, own in texts.items() for row in compare(source, all_of, own, name, (8, 10), **how)]
    for file in opened:
        file.close()
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "quality_per_byte", "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
