"""Claim: in the real engine, our files keep more of the 16-bit answers than llama.cpp's of the same bytes.

    scripts/bench answers_per_byte --model reference-f16.gguf --calibrate wikitext2-valid.txt [--levels Q3_K_M,Q2_K]
        [--ours DIR] [--threads 2] [--json FILE]

Theirs: the file that llama-quantize makes with an importance matrix of the same tokens (llama.cpp's mix of types, bytes
of ggml's own quantizers). Ours: a recipe of as many bytes with error feedback, of types as ``bitladder recipe`` chooses
them (``--ours``: the folder that quality_per_byte kept). All answer the starter workload greedily in the real engine.
Printed: inputs passed, answers equal to the 16-bit model's, how many tokens agree before an answer parts from it, chrF
to it; and for the last two the p-value of the paired permutation test between both sides.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from level_texts import fitting_windows
from quality_per_byte import F32, GgmlQuantizer

from bitladder.describe.similarity import chrf
from bitladder.describe.windows import WINDOW
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile
from bitladder.files.workloads import STARTER, load_workload
from bitladder.formats.recipes import assign
from bitladder.plan.recipe import Limits, choose, recipe_bytes, wants_low
from bitladder.records.evaluation import Answer
from bitladder.records.recipe import SensitivityTable
from bitladder.stages.evaluate import answer_workload, judge_answers
from bitladder.stages.feedback import write_with_feedback
from bitladder.stages.imatrix import importance_matrix
from bitladder.stages.sensitivity import BlockTypes, weigh
from bitladder.stages.write_levels import quantize_levels
from bitladder.stats.paired import sign_flip
from bitladder.walk.feedback import FeedbackSettings
from bitladder.walk.weights import FileWeights, MadeWeights


def their_file(
    source: GgufFile, level: str, theirs: GgmlQuantizer, importance: Mapping[str, F32], folder: Path, threads: int
) -> Path:
    """A level's file with every quantized tensor's bytes replaced by ggml's."""
    made = quantize_levels(source, [level], folder, importance=importance, effort="fast", threads=threads)[0].path
    mix = assign(level, source.model.tensors, source.model.dims, has_importance=True)
    weights = FileWeights(source, threads=threads)
    changed = MadeWeights(theirs, mix)
    with GgufFile.open(made) as file:
        places = {info.name: file.place(info.name).offset for info in file.model.tensors}
    with made.open("r+b") as out:
        for name in changed._qtypes:
            out.seek(places[name])
            out.write(theirs._pack(name, weights(name), mix[name], None).tobytes())
    return made


def answers(path: Path, threads: int) -> tuple[Answer, ...]:
    workload = load_workload(STARTER)
    with LlamaServer(Launch(path, n_ctx=2048, threads=threads)) as server:
        return judge_answers(workload, answer_workload(server, workload))


def tokens_before_parting(one: Answer, reference: Answer) -> int:
    pairs = zip(one.tokens, reference.tokens, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a.token_id != b.token_id), len(reference.tokens))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--levels", default="Q3_K_M,Q2_K")
    parser.add_argument("--ours", type=Path, default=Path("quality-per-byte"))
    parser.add_argument("--fit-tokens", type=int, default=12288)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    absent = [path for path in (options.model, options.calibrate) if not path.exists()]
    if absent:
        print(f"{absent[0]} is absent; nothing was measured")
        return 1
    with GgufFile.open(options.model) as source:
        with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=1)) as server:
            windows = fitting_windows(server, source, options.calibrate, options.fit_tokens)
        importance = importance_matrix(source, windows, threads=options.threads).vectors()
        theirs = GgmlQuantizer(FileWeights(source), importance, options.ours / "ggml")
        tables: dict[bool, SensitivityTable] = {}
        reference = answers(options.model, options.threads)
        passed = sum(one.passed for one in reference)
        print(f"{'level':8} {'side':10} {'passed':>7} {'equal':>6} {'agreeing tokens':>16} {'chrF':>6}")
        print(f"{'F16':8} {'':10} {passed:4} of {len(reference)}")
        rows = []
        for level in options.levels.split(","):
            files = {
                "llama.cpp": their_file(source, level, theirs, importance, options.ours / "theirs", options.threads)
            }
            there = sorted((options.ours / level).glob("*.gguf"))
            if not there:
                size, _ = recipe_bytes(
                    source.model, assign(level, source.model.tensors, source.model.dims, has_importance=True)
                )
                limits = Limits(bytes=size)
                if (low := wants_low(source.model, limits)) not in tables:
                    choices = BlockTypes(low=low)
                    tables[low] = weigh(source, windows[::3], threads=options.threads, choices=choices).table
                recipe = replace(choose(tables[low], source.model, limits), expected_kl=None)
                settings = FeedbackSettings(threads=options.threads)
                written = write_with_feedback(source, recipe, options.ours / level, windows, settings=settings)
                there = [written.file.path]
            files["ours"] = there[0]
            found = {}
            for side, path in files.items():
                own = answers(path, options.threads)
                pairs = list(zip(own, reference, strict=True))
                kept = np.array([tokens_before_parting(a, b) for a, b in pairs], float)
                alike = np.array([chrf(a.text, b.text) for a, b in pairs])
                found[side] = kept, alike
                equal = sum(a.text == b.text for a, b in pairs)
                print(
                    f"{level:8} {side:10} {sum(a.passed for a in own):4} of {len(own)} {equal:6} {kept.mean():16.1f} "
                    f"{alike.mean():6.3f}",
                    flush=True,
                )
                rows.append({"level": level, "side": side, "passed": sum(a.passed for a in own), "equal": equal,
                             "tokens": kept.mean(), "chrf": alike.mean()})  # fmt: skip
            rng = np.random.default_rng(0)
            p = [sign_flip(found["ours"][at] - found["llama.cpp"][at], rng) for at in (0, 1)]
            print(f"{level:8} ours against llama.cpp: tokens p = {p[0]:.3f}, chrF p = {p[1]:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "answers_per_byte", "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
