"""Rival files of a model, whoever made them, measured on the same texts in the same way.

What is measured is kept as evidence by the files' hashes, so a killed call goes on where it was, and a rival that is
added to the list is the only one that is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder import __version__
from bitladder.describe.text import text_hash
from bitladder.errors import BadInput, BitladderError
from bitladder.records.bench import BenchFigure, BenchRecord, BenchText, Rival
from bitladder.stages.bench_file import Bench
from bitladder.stages.job import Job, Work, opened
from bitladder.stages.known_files import model_sha256
from bitladder.stages.measure import Measuring, documents, measure_model

if TYPE_CHECKING:
    from bitladder.files.gguf import GgufFile
    from bitladder.progress import Progress
    from bitladder.records.fidelity import Fidelity

SHIPPED_NAME = "texts that ship"


def run_bench(bench: Bench, work: Work) -> BenchRecord:
    """Fetch what lies elsewhere, measure everyone, and compare with the first rival.

    A rival that cannot be fetched, read or compared is left out, with a warning that says why.

    Raises:
        BadInput: no rival can be compared, or a text cannot be read.
        BitladderError: the model cannot be fetched or measured.
    """
    texts = dict(bench.texts) or {SHIPPED_NAME: ()}
    read = {name: documents(paths) for name, paths in texts.items()}
    left_out: dict[str, str] = {}
    with opened(bench.model, work) as job:
        label, sha256 = job.found.label, job.source.sha256
        rivals = _rivals(job, bench.rivals, left_out)
    for name, reason in left_out.items():
        work.journal.warn(f"{name} is left out: {reason}")
    if not rivals:
        raise BadInput(
            "No rival can be compared with the model.",
            means="; ".join(f"{name}: {reason}" for name, reason in left_out.items()),
            do="Give files of the same model: the same tensors, and the same vocabulary.",
        )
    against, ordered = rivals[0].name, sorted(rivals, key=lambda one: one.bytes)
    figures = []
    for name, paths in texts.items():
        work.journal.say(f"On {name}: {len(read[name])} documents.")
        wanted = Measuring(files=[Path(one.path) for one in ordered], texts=paths)
        found = dict(zip((one.name for one in ordered), measure_model(bench.model, wanted, work), strict=True))
        figures.append(BenchText(name, text_hash(read[name]), compared(found, against)))
    return BenchRecord(label, sha256, tuple(ordered), tuple(figures), against, left_out, __version__)


def compared(found: Mapping[str, Fidelity], against: str) -> tuple[BenchFigure, ...]:
    """Each rival's figures with its KL as a share of that of ``against``, paired by document."""
    import numpy as np

    from bitladder.stats.bootstrap import SEED, ratio_interval

    def sums(one: Fidelity) -> np.ndarray:
        return np.asarray(one.unit_kl, np.float64) * np.asarray(one.unit_tokens, np.float64)

    base, figures = sums(found[against]), []
    for name, own in found.items():
        figure = BenchFigure(name, own)
        if name == against:
            figure = dataclasses.replace(figure, ratio=1.0)
        elif len(base) == len(own.unit_kl) and (base > 0).all():
            ratio = ratio_interval(sums(own), base, np.random.default_rng(SEED), scale="log")
            figure = dataclasses.replace(figure, ratio=ratio.value, ratio_low=ratio.low, ratio_high=ratio.high)
        figures.append(figure)
    return tuple(figures)


def _rivals(job: Job, named: Mapping[str, str], left_out: dict[str, str]) -> list[Rival]:
    """Those that can be compared, in the order in which they are named; the others are noted with the reason."""
    found: list[Rival] = []
    for name, given in named.items():
        try:
            rival = _rival(job, name, given)
        except BitladderError as error:
            left_out[name] = " ".join(f"{error.found} {error.means}".split())
            continue
        same = next((one for one in found if one.sha256 == rival.sha256), None)
        if same is None:
            found.append(rival)
        else:
            left_out[name] = f"It is the same file as {same.name}."
    return found


def _rival(job: Job, name: str, given: str) -> Rival:
    """A rival at hand and looked at: it holds the same model, with the same vocabulary."""
    from bitladder.files.checkpoint_check import format_of_folder
    from bitladder.files.gguf import GgufFile
    from bitladder.stages.fidelity import file_candidate, folder_candidate

    path = _at_hand(given, job.progress)
    if path.is_dir():
        folder_candidate(job.source, path, format_of_folder(path))
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return Rival(name, given, str(path), size, model_sha256(path, job.progress))
    with GgufFile.open(path) as file:
        file_candidate(job.source, file)
        _require_same_tokens(job.source, file)
        weights = sum(tensor.elements for tensor in file.model.tensors)
        bpw = 8 * sum(tensor.nbytes for tensor in file.model.tensors) / weights
        size = sum(header.path.stat().st_size for header in file.headers)
        return Rival(name, given, str(path), size, file.sha256, bpw)


def _at_hand(given: str, progress: Progress) -> Path:
    """A GGUF file or a checkpoint folder as it lies, fetched from the hub if need be; nothing is converted."""
    from bitladder.files.sources import gguf_in_folder, resolve
    from bitladder.stages.hub import pull

    path = Path(pull([given], progress)[0].path if given.startswith("hf:") else given).expanduser()
    if path.is_dir():
        return gguf_in_folder(path) or path
    return path if path.is_file() else resolve(given, progress).path


def _require_same_tokens(source: GgufFile, file: GgufFile) -> None:
    """KL is per token, so both must mean the same by each; raises BadInput."""
    own, other = (one.model.metadata.get("tokenizer.ggml.tokens") for one in (source, file))
    if not isinstance(own, list | tuple) or not isinstance(other, list | tuple) or list(own) == list(other):
        return
    differ = sum(mine != theirs for mine, theirs in zip(own, other, strict=False)) + abs(len(own) - len(other))
    raise BadInput(
        f"{file.path} has another vocabulary: {differ:,} of {len(own):,} tokens differ.",
        means="Its predictions are about other pieces of text, so nothing compares them token by token.",
        do="Compare files that were made from the same model.",
    )
