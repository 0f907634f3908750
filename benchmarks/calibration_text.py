"""Claim: what to calibrate on: the text that ships, text that the model wrote itself, or both, by what files of equal
bytes lose on text of other kinds.

    scripts/bench calibration_text --model reference-f16.gguf --text wikitext2-test.txt [--level Q3_K_M]
        [--mixes shipped,self,half,both] [--layers N] [--documents 12] [--threads 2] [--keep DIR] [--json FILE]

Each file has llama.cpp's types of the level (with ``--layers N`` in N layers, spread evenly, and 16 bits elsewhere: a
fifth of the time), codes chosen with error feedback on the text named: ``half`` is every
second document of both, about as many tokens as either, ``both`` all of both. KL against the 16-bit source on the first
window of each of several articles of WikiText-2 and of the texts that ship to measure on; no calibration text is of
either. Ratios of mean KL to that of ``shipped``, paired 95% intervals over documents. A killed run goes on from what
``--keep`` holds.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from level_texts import Side, articles, compare, first_windows, part_of

from bitladder.describe.text import Document
from bitladder.describe.windows import WINDOW
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile
from bitladder.files.texts import shipped_texts
from bitladder.stages.calibration import calibration_texts
from bitladder.stages.feedback import write_with_feedback
from bitladder.stages.fidelity import file_candidate
from bitladder.stages.job import SELF, SHIPPED, Job, Work, opened
from bitladder.stages.recipe import named_recipe
from bitladder.walk.feedback import FeedbackSettings

MIXES = "shipped,self,half,both"


def texts_of(job: Job, mix: str) -> list[Document]:
    """What a mix is calibrated on."""
    parts = [SHIPPED, SELF] if mix in ("half", "both") else [mix]
    found = calibration_texts(job, parts)
    return found[::2] if mix == "half" else found


def candidates(job: Job, options: argparse.Namespace, opened_files: list[GgufFile]) -> list[Side]:
    """Files of each mix, made in ``--keep``; losses are told as shares of the first one's."""
    recipe, found = named_recipe(job.source, options.level), []
    if options.layers:
        kept = {one.name: one.qtype for one in job.source.model.tensors}
        own = {one.name: recipe.qtypes[one.name] for one in part_of(job.source.model, options.layers).tensors}
        recipe = dataclasses.replace(recipe, qtypes={**kept, **own})
    for mix in options.mixes.split(","):
        started, windows = time.perf_counter(), job.windows(texts_of(job, mix))
        settings = FeedbackSettings(threads=options.threads)
        fitted = write_with_feedback(job.source, recipe, options.keep / mix, windows, settings=settings)
        took = f"{time.perf_counter() - started:.0f} s" + (", was there" if fitted.file.reused else "")
        print(f"{mix}: {fitted.tokens} tokens in {len(windows)} windows, {took}", flush=True)
        opened_files.append(GgufFile.open(fitted.file.path))
        file = file_candidate(job.source, opened_files[-1], threads=options.threads)
        found.append(Side({"mix": mix, "tokens": fitted.tokens}, file, 0))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--model", "--text"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--level", default="Q3_K_M")
    parser.add_argument("--mixes", default=MIXES)
    parser.add_argument("--layers", type=int, default=0, help="quantize only so many; 0: all, and the embedding")
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("calibration-text"), help="folder for the files made")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for path in (options.model, options.text):
        if not path.exists():
            print(f"{path} is absent; nothing was measured")
            return 1
    torch.set_num_threads(options.threads)
    files: list[GgufFile] = []
    with opened(str(options.model), Work(threads=options.threads)) as job:
        with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=1)) as server:
            texts = {
                "WikiText-2": first_windows(server, job.source, articles(options.text, options.documents)),
                "other texts": first_windows(server, job.source, shipped_texts()),
            }
        all_of = candidates(job, options, files)
        how: dict[str, Any] = {
            "of": all_of[0].columns["mix"],
            "threads": options.threads,
            "keep": options.keep / "walks",
        }
        rows = [row for name, own in texts.items() for row in compare(job.source, all_of, own, name, (8, 7), **how)]
    for file in files:
        file.close()
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "calibration_text", "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
