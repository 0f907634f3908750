"""Claim: a scheme for every linear layer loses less than one scheme for all of them, at the same bytes.

    scripts/bench mixed_checkpoint --model MODEL.gguf --calibrate wikitext2-valid.txt --text wikitext2-test.txt
        [--bpw 4.5,4.6] [--against W4A16-g32,NVFP4A16] [--peer NAME=LEVEL=FOLDER ...] [--schemes S1,S2]
        [--fit-tokens 8192] [--weighed 8] [--documents 12] [--threads 2] [--keep DIR] [--json FILE]

Both sides are Bitladder's, fitted with error feedback to the same calibration tokens: each uniform level of
``--against``, and for each of ``--bpw`` a mix of at most so many bits per weight of the linear layers, whose schemes
are chosen by sensitivities over ``--weighed`` windows of the same tokens. ``--peer``: folders of other tools
(``checkpoint_peer.py`` makes them) that mixes are compared with as well. Weights are compared as they are read back
from the folders. KL against the source on the first window of each of several articles of the test text, and of texts
of another kind (the ones that ship to measure on); ratios of mean KL with paired intervals over documents. What was
made in ``--keep`` is not made again: the sensitivities, and every finished folder.
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
from level_texts import fitting_windows, measuring_texts, parsed, parser_of, per_document

from bitladder.describe.windows import WINDOW, Window, tokens_hash
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.checkpoint_check import format_of_folder
from bitladder.files.folders import cache_key
from bitladder.files.gguf import GgufFile
from bitladder.levels import CheckpointLevel
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.levels.checkpoints.mixed import SCHEMES
from bitladder.plan.recipe import Limits
from bitladder.plan.schemes import choose_schemes
from bitladder.records.recipe import SensitivityTable
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.stages.fidelity import Candidate, folder_candidate, token_scores
from bitladder.stages.schemes import SchemeStorage
from bitladder.stages.sensitivity import MADE_BY, weigh
from bitladder.stages.weighing import keep_table, read_table
from bitladder.stats.bootstrap import ratio_interval
from bitladder.walk.checkpoint_walk import Settings


def table_of(
    source: GgufFile, storage: SchemeStorage, windows: Sequence[Window], options: argparse.Namespace
) -> SensitivityTable:
    """Predicted losses, kept beside the levels."""
    some = windows[:: max(1, len(windows) // options.weighed)]
    key = cache_key(*MADE_BY, source.sha256, tokens_hash(some), storage.choices.key)
    kept = options.keep / f"table-{key[:16]}.json"
    if (table := read_table(kept)) is None:
        started = time.perf_counter()
        table = weigh(
            source, some, threads=options.threads, choices=storage.choices, keep=options.keep / "weighing"
        ).table
        keep_table(kept, table)
        print(f"sensitivities: {time.perf_counter() - started:.0f} s", flush=True)
    return table


def levels_of(source: GgufFile, windows: Sequence[Window], options: argparse.Namespace) -> dict[str, CheckpointLevel]:
    """Every mix, then every uniform level, by what they are called in the table."""
    storage = SchemeStorage(source, options.schemes.split(","), threads=options.threads)
    table = table_of(source, storage, windows, options)
    tensors = {tensor.name: tensor for tensor in source.model.tensors}
    names = [name for group in storage.linears.groups for name in group]
    whole = sum(tensors[name].elements for name in names)
    found = {}
    for asked in options.bpw.split(","):
        recipe = choose_schemes(table, storage.linears.groups, source.model, Limits(bpw=float(asked)))
        counts = Counter(recipe.qtypes[name] for name in names)
        print(f"mix {asked}: {recipe.bpw:.3f} bits, predicted {recipe.expected_kl:.4f}, {dict(counts)}", flush=True)
        found[f"mix {asked}"] = storage.level(recipe, round(recipe.bpw, 4))
    for uniform in options.against.split(","):
        level = parse_checkpoint(uniform)
        bits = 8 * sum(level.format.stored_bytes(*tensors[name].shape[-2:]) for name in names) / whole
        lost = {name: {one.qtype: one.fed for one in table.losses[name]} for name in names}
        known = sum(lost[name].get(uniform, float("nan")) for name in names)
        print(f"{uniform}: {bits:.3f} bits, predicted {known:.4f}", flush=True)
        found[uniform] = level
    return found


def written(
    source: GgufFile, levels: dict[str, CheckpointLevel], windows: Sequence[Window], options: argparse.Namespace
) -> dict[str, Candidate]:
    """Their folders, made and read back."""
    found = {}
    for label, level in levels.items():
        started = time.perf_counter()
        settings = Settings(threads=options.threads)
        walk = Calibration(source, [level], Reading(windows), out_dir=options.keep, name="mixed", settings=settings)
        (report,) = walk.run().checkpoints
        folder = Path(report.path)
        found[label] = folder_candidate(source, folder, format_of_folder(folder), level=label)
        print(f"{label}: {time.perf_counter() - started:.0f} s", flush=True)
    return found


def compare(
    source: GgufFile, candidates: dict[str, Candidate], windows: Sequence[Window], name: str, threads: int
) -> list[dict[str, Any]]:
    """KL of each, and of each mix as a share of every other level's."""
    scores = token_scores(source, list(candidates.values()), windows, threads=threads)[1:]
    kl = {label: per_document(one.kl, windows) for label, one in zip(candidates, scores, strict=True)}
    tokens = per_document(np.ones(len(scores[0].kl)), windows)
    print(f"\n{name}: {len(windows)} documents, {int(tokens.sum())} scored tokens")
    rows = []
    for label, own in kl.items():
        print(f"{label:24} {float(own.sum() / tokens.sum()):9.4f}", flush=True)
        rows.append({"text": name, "level": label, "kl": float(own.sum() / tokens.sum()), "per_document": own.tolist()})
    for mix in (label for label in kl if label.startswith("mix ")):
        for other in (label for label in kl if not label.startswith("mix ")):
            share = ratio_interval(kl[mix], kl[other], np.random.default_rng(0), scale="log")
            print(f"{mix} / {other:24} {share.value:8.3f} [{share.low:.3f}, {share.high:.3f}]", flush=True)
            rows.append({"text": name, "level": mix, "against": other, "ratio": share.value, "low": share.low,
                         "high": share.high})  # fmt: skip
    return rows


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--against", default="W4A16-g32,NVFP4A16")
    parser.add_argument("--bpw", default="4.5,4.6")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=LEVEL=FOLDER")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--fit-tokens", type=int, default=8192)
    parser.add_argument("--weighed", type=int, default=8, help="windows that sensitivities are taken of")
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--keep", type=Path, default=Path("mixed-checkpoint"), help="folder for the levels made")
    options = parsed(parser)
    with GgufFile.open(options.model) as source:
        with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=1)) as server:
            fitting = fitting_windows(server, source, options.calibrate, options.fit_tokens)
            texts = measuring_texts(server, source, options)
        candidates = written(source, levels_of(source, fitting, options), fitting, options)
        for name, level, folder in (peer.split("=", 2) for peer in options.peer):
            form = parse_checkpoint(level).format
            candidates[name] = folder_candidate(source, Path(folder), form, level=name)
        rows = [row for name, own in texts.items() for row in compare(source, candidates, own, name, options.threads)]
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "mixed_checkpoint", "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
