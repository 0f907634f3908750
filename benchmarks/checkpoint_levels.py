"""Claim: GPTQ, AWQ and INT8 checkpoints from one walk lose no more than peers' on the same tokens, in less
time and memory.

    scripts/bench checkpoint_levels --model MODEL.gguf --calibrate wikitext2-valid.txt --prepare DIR
    scripts/bench checkpoint_levels --model MODEL.gguf --calibrate wikitext2-valid.txt --text wikitext2-test.txt
        --out DIR [--levels GPTQ-4bit-g64,AWQ-4bit-g64] [--calibration-windows 64] [--documents 40]
        [--peer NAME=LEVEL=FOLDER ...] [--against LEVEL=NAME ...] [--exact-inputs] [--threads 1]

``--prepare`` writes what peers need: the weights as a float checkpoint and the calibration windows, 512 tokens
each; ``benchmarks/checkpoint_peer.py`` makes peers' folders of them. Without it: builds the levels from the same
windows, then walks source, levels and peers' folders over the first window of each of the text's articles (second
halves scored), and over the texts that ship to measure on, which are of other kinds. Prints seconds, CPU seconds and
peak memory of the build, then mean KL and perplexity of each with intervals over articles, and for each ``--against``
ratio and difference of KL to the peer and the ratio of perplexities, paired by article. A peer's folder is any
checkpoint of the same weights in a format of levels/checkpoints without activation order in its groups; with
``--levels ''`` nothing is built, and levels made before are named as peers. Inputs of W8A8
layers are rounded to int8 per token as engines do, unless ``--exact-inputs``; all other inputs and the source's stay
f32. Model and texts are not shipped. ``--prepare`` wants accelerate beside transformers.
"""

import argparse
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from level_texts import first_windows
from numpy.typing import NDArray

from bitladder.describe.text import Document
from bitladder.describe.windows import WINDOW, Window, text_windows
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile
from bitladder.files.texts import shipped_texts
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.progress import StepsOnly
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.stages.fidelity import Candidate, fidelity, token_scores
from bitladder.stats.bootstrap import ratio_interval
from bitladder.walk.checkpoint_walk import Settings
from bitladder.walk.checkpoint_weights import CheckpointWeights
from bitladder.walk.head import TokenScores
from bitladder.walk.weights import FileWeights

_ARTICLE = re.compile(r"(?m)^ = [^=\n]+ = $")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibrate", type=Path, required=True)
    for name in ("--prepare", "--text", "--out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--levels", default="GPTQ-4bit-g64,GPTQ-3bit-g64,AWQ-4bit-g64,INT8-W8A8,INT8-W8A16")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=LEVEL=FOLDER")
    parser.add_argument("--against", action="append", default=[], metavar="LEVEL=NAME")
    parser.add_argument("--exact-inputs", action="store_true", help="round no inputs: what the weights alone cost")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def say(what: str, done: float, total: float) -> None:
    print(f"\r{what} ({done:.0f}/{total:.0f})".ljust(110), end="", file=sys.stderr, flush=True)


class Texts:
    """Windows of files, as the engine tokenizes them."""

    def __init__(self, source: GgufFile, server: LlamaServer) -> None:
        self._source, self._server = source, server

    def _cut(self, documents: Sequence[Document]) -> list[Window]:
        cut = text_windows(documents, lambda part: self._server.tokenize(part, add_special=True), self._source.model)
        return [window for window in cut if len(window.tokens) == WINDOW]

    def beginning(self, path: Path, count: int) -> list[Window]:
        """The first whole windows of a file."""
        text = path.read_text(encoding="utf-8")[: 8 * WINDOW * count]
        return self._cut([Document(path.stem, text)])[:count]

    def articles(self, path: Path, count: int) -> list[Window]:
        """The first window of each of the first articles that fill one; of a text without headings, of each run of so
        many characters."""
        text = path.read_text(encoding="utf-8")
        starts = [found.start() for found in _ARTICLE.finditer(text)] or list(range(0, len(text), 8 * WINDOW))
        parts = [text[at : at + 8 * WINDOW] for at in starts]
        firsts: dict[str, Window] = {}
        for window in self._cut([Document(f"article {n}", part) for n, part in enumerate(parts)]):
            firsts.setdefault(window.document, window)
        return list(firsts.values())[:count]


class UnroundedSource(FileWeights):
    """The source, its inputs left as they are while those of W8A8 levels are rounded."""

    def qtype(self, name: str) -> str:  # noqa: ARG002 - the same for all
        """No type that rounds."""
        return "F32"


def prepare(gguf: Path, windows: Sequence[Window], folder: Path) -> None:
    """What peers read: the GGUF's weights as a float checkpoint, and the calibration tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float16)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder / "float")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder / "float")
    np.save(folder / "tokens.npy", np.stack([window.tokens for window in windows]))


def build(
    source: GgufFile, options: argparse.Namespace, calibration: Sequence[Window], measuring: Sequence[Window]
) -> list[tuple[str, str, Path]]:
    """Our levels' folders, after saying what they took."""
    levels = options.levels.split(",")
    started, cpu = time.monotonic(), time.process_time()
    wanted = [parse_checkpoint(level) for level in levels]
    job = Calibration(
        source, wanted, Reading(calibration, measuring=measuring),
        out_dir=options.out, name=options.model.stem, settings=Settings(threads=options.threads),
    )  # fmt: skip
    reports = job.run(StepsOnly(say)).checkpoints
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\n{options.levels}, {len(calibration)} windows, {options.threads} threads:", end=" ")
    print(f"{seconds:.0f} s, {cpu:.0f} CPU s, peak {peak:.2f} GB", flush=True)
    return [(report.level, report.level, Path(report.path)) for report in reports]


def compare(own: TokenScores, peer: TokenScores, windows: Sequence[Window]) -> str:
    """KL of ours as a share of the peer's and less it, ratio of perplexities, each with its interval over articles."""
    cluster = np.concatenate([np.full(window.scored, at) for at, window in enumerate(windows)])

    def sums(values: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.bincount(cluster, weights=values).astype(np.float64)

    rng = np.random.default_rng(0)
    kl = ratio_interval(sums(own.kl - peer.kl), sums(np.ones(len(cluster))), rng)
    share = ratio_interval(sums(own.kl), sums(peer.kl), rng, scale="log")
    ppl = ratio_interval(sums(own.nll - peer.nll), sums(np.ones(len(cluster))), rng)
    low, value, high = np.exp([ppl.low, ppl.value, ppl.high])
    return (
        f"KL x {share.value:.3f} [{share.low:.3f}, {share.high:.3f}], {kl.value:+.4f} [{kl.low:+.4f}, {kl.high:+.4f}], "
        f"perplexity x {value:.4f} [{low:.4f}, {high:.4f}]"
    )


def judged(
    source: GgufFile, candidates: Sequence[Candidate], reference: Candidate, windows: Sequence[Window],
    text: str, options: argparse.Namespace,
) -> None:  # fmt: skip
    """Prints the figures of all candidates on one text, and each pair's."""
    scores = token_scores(
        source, list(candidates), windows, reference=reference, engine_rounding=not options.exact_inputs,
        threads=options.threads,
    )  # fmt: skip
    by_name = dict(zip([candidate.level for candidate in candidates], scores[1:], strict=True))
    print(f"\n{text}: {len(windows)} documents, {sum(window.scored for window in windows)} scored tokens")
    print(f"{'level':24} {'mean KL':>8} {'95% interval':>18} {'perplexity':>10} {'(source)':>9} {'top-1':>6}")
    for name, own in by_name.items():
        found = fidelity(name, own, scores[0], windows)
        print(
            f"{found.level:24} {found.kl_mean:8.4f} {found.kl_low:8.4f}..{found.kl_high:8.4f} {found.ppl:10.2f} "
            f"{found.ppl_reference:9.2f} {found.top1:6.1%}"
        )
    for ours, peer in (pair.split("=", 1) for pair in options.against):
        print(f"{ours} against {peer}: {compare(by_name[ours], by_name[peer], windows)}", flush=True)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    source = GgufFile.open(options.model)
    with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=options.threads)) as server:
        texts = Texts(source, server)
        calibration = texts.beginning(options.calibrate, options.calibration_windows)
        measuring = texts.articles(options.text, options.documents) if options.text else []
        other = first_windows(server, source, shipped_texts())
    if options.prepare:
        prepare(options.model, calibration, options.prepare)
        return
    folders = build(source, options, calibration, measuring) if options.levels else []
    folders += [(name, level, Path(path)) for name, level, path in (peer.split("=", 2) for peer in options.peer)]
    reference = UnroundedSource(source, threads=options.threads)
    candidates = [
        Candidate(name, CheckpointWeights(reference, path, parse_checkpoint(level).format))
        for name, level, path in folders
    ]
    for text, windows in (("in domain", measuring), ("other domain", other)):
        judged(source, candidates, Candidate("source", reference), windows, text, options)


if __name__ == "__main__":
    main()
