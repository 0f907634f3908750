"""Claim: a scheme for every linear layer loses less than one scheme for all of them, at the same bytes.

    scripts/bench mixed_checkpoint --model MODEL.gguf --calibrate wikitext2-valid.txt --text wikitext2-test.txt
        [--against W4A16-g64,NVFP4A16] [--schemes S1,S2] [--fit-tokens 6144] [--documents 8] [--threads 2]
        [--keep DIR] [--json FILE]

Both sides are Bitladder's, fitted with error feedback to the same calibration tokens: each uniform level of
``--against``, and a mix of at most as many bytes, whose schemes are chosen by sensitivities over a part of the same
tokens. Weights are compared as they are read back from the folders. KL against the source on the first window of each
of several articles of the test text, and of texts of another kind (the ones that ship to measure on); ratios of mean
KL with paired intervals over documents.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from level_texts import articles, first_windows, fitting_windows, parsed, parser_of, per_document

from bitladder.describe.windows import WINDOW, Window
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.checkpoint_check import format_of_folder
from bitladder.files.gguf import GgufFile
from bitladder.files.texts import shipped_texts
from bitladder.levels import CheckpointLevel
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.levels.checkpoints.mixed import SCHEMES
from bitladder.plan.recipe import Limits
from bitladder.plan.schemes import choose_schemes
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.stages.fidelity import Candidate, folder_candidate, token_scores
from bitladder.stages.schemes import SchemeStorage
from bitladder.stages.sensitivity import weigh
from bitladder.stats.bootstrap import ratio_interval
from bitladder.walk.checkpoint_walk import Settings


def levels_of(source: GgufFile, windows: Sequence[Window], options: argparse.Namespace) -> dict[str, CheckpointLevel]:
    """Each uniform level, and before it the mix of at most its bytes, by what they are called in the table."""
    started = time.perf_counter()
    storage = SchemeStorage(source, options.schemes.split(","), threads=options.threads)
    some = windows[:: max(1, len(windows) // 8)]
    table = weigh(source, some, threads=options.threads, choices=storage.choices).table
    print(f"sensitivities: {time.perf_counter() - started:.0f} s", flush=True)
    tensors = {tensor.name: tensor for tensor in source.model.tensors}
    names = [name for group in storage.linears.groups for name in group]
    found = {}
    for uniform in options.against.split(","):
        level = parse_checkpoint(uniform)
        size = sum(level.format.stored_bytes(*tensors[name].shape[-2:]) for name in names)
        bits = 8 * size / sum(tensors[name].elements for name in names)
        recipe = choose_schemes(table, storage.linears.groups, source.model, Limits(bpw=bits))
        counts = Counter(recipe.qtypes[name] for name in names)
        print(f"{uniform}: {size:,} bytes, {bits:.3f} bits; mix: {recipe.bpw:.3f} bits, {dict(counts)}", flush=True)
        found[f"{uniform} mix"] = storage.level(recipe, round(recipe.bpw, 4))
        found[uniform] = level
    return found


def written(
    source: GgufFile, levels: dict[str, CheckpointLevel], windows: Sequence[Window], options: argparse.Namespace
) -> dict[str, Candidate]:
    """Their folders, made and read back."""
    started = time.perf_counter()
    settings = Settings(threads=options.threads)
    wanted = list(levels.values())
    walk = Calibration(source, wanted, Reading(windows), out_dir=options.keep, name="mixed", settings=settings)
    reports = {report.level: report for report in walk.run().checkpoints}
    print(f"calibration: {time.perf_counter() - started:.0f} s", flush=True)
    found = {}
    for label, level in levels.items():
        folder = Path(reports[level.name].path)
        found[label] = folder_candidate(source, folder, format_of_folder(folder), level=label)
    return found


def compare(
    source: GgufFile, candidates: dict[str, Candidate], windows: Sequence[Window], name: str, threads: int
) -> list[dict[str, Any]]:
    scores = token_scores(source, list(candidates.values()), windows, threads=threads)[1:]
    kl = {label: per_document(one.kl, windows) for label, one in zip(candidates, scores, strict=True)}
    tokens = per_document(np.ones(len(scores[0].kl)), windows)
    print(f"\n{name}: {len(windows)} documents, {int(tokens.sum())} scored tokens")
    rows = []
    for label, own in kl.items():
        ratio = ratio_interval(own, kl[label.removesuffix(" mix")], np.random.default_rng(0), scale="log")
        mean = float(own.sum() / tokens.sum())
        print(f"{label:20} {mean:9.4f} {ratio.value:8.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", flush=True)
        rows.append({"text": name, "level": label, "kl": mean, "ratio": ratio.value, "low": ratio.low,
                     "high": ratio.high, "per_document": own.tolist()})  # fmt: skip
    return rows


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--against", default="W4A16-g64,NVFP4A16")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--fit-tokens", type=int, default=6144)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--keep", type=Path, default=Path("mixed-checkpoint"), help="folder for the levels made")
    options = parsed(parser)
    with GgufFile.open(options.model) as source:
        with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=1)) as server:
            fitting = fitting_windows(server, source, options.calibrate, options.fit_tokens)
            texts = {
                "in domain": first_windows(server, source, articles(options.text, options.documents)),
                "other domain": first_windows(server, source, shipped_texts()),
            }
        candidates = written(source, levels_of(source, fitting, options), fitting, options)
        rows = [row for name, own in texts.items() for row in compare(source, candidates, own, name, options.threads)]
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "mixed_checkpoint", "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
