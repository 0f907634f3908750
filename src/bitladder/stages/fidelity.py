"""Fidelity of a whole ladder in one pass over the model's layers (``walk/ladder.py``).

KL divergence, perplexity and top-1 agreement of every level against its source, on the same tokens, without a
logits file. ``docs/measure.md`` defines each figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from bitladder.describe.depths import DepthWindows, by_depth
from bitladder.describe.windows import Window, check_tokens
from bitladder.errors import BadInput
from bitladder.files.gguf import GgufFile
from bitladder.files.kept_array import KeptArray
from bitladder.formats.recipes import assign
from bitladder.formats.roles import factored
from bitladder.kernels import Effort
from bitladder.levels.checkpoints import FolderFormat
from bitladder.progress import LevelNews, Progress, silent
from bitladder.records.fidelity import AtDepth, Fidelity, Way
from bitladder.stats.bootstrap import SEED, Interval, quantile_interval, ratio_interval
from bitladder.units import GiB
from bitladder.walk.checkpoint_weights import CheckpointWeights
from bitladder.walk.fidelity import Ladder
from bitladder.walk.head import TokenScores
from bitladder.walk.opened import layered
from bitladder.walk.weights import FileWeights, LevelWeights, MadeWeights, Quantizer


@dataclass(frozen=True)
class Candidate:
    """A level to compare with the source: its name, and where its weights come from."""

    level: str
    weights: LevelWeights


def made_candidates(
    source: GgufFile,
    levels: Sequence[str],
    *,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    effort: Effort = "good",
    threads: int = 1,
    device: str = "cpu",
) -> list[Candidate]:
    """Levels made on the fly by llama.cpp's recipes; what several of them quantize alike is quantized once.

    Args:
        source: the model they are made from.
        levels: recipe names.
        importance: f32[columns] per tensor, or f32[experts, columns] for stacked experts; None for none.
        effort: how long to search for scales.
        threads: for quantizing and dequantizing.
        device: where scales are searched for, as torch names it.

    Raises:
        UnknownLevel: no recipe has that name.
    """
    exact = FileWeights(source, threads=threads)
    quantizer = Quantizer(exact, importance=importance, effort=effort, threads=threads, device=device)
    model = source.model
    return [
        Candidate(
            level,
            MadeWeights(quantizer, assign(level, model.tensors, model.dims, has_importance=bool(importance))),
        )
        for level in levels
    ]


def file_candidate(source: GgufFile, file: GgufFile, *, level: str = "", threads: int = 1) -> Candidate:
    """An existing file as a level of the source, whoever wrote it. ``level``: its name here (default: the
    file's).

    Raises:
        BadInput: the file holds another model.
    """
    shapes = {tensor.name: tensor.shape for tensor in source.model.tensors if not factored(tensor.name)}
    others = {tensor.name: tensor.shape for tensor in file.model.tensors if not factored(tensor.name)}
    different = [name for name in sorted(shapes | others) if shapes.get(name) != others.get(name)]
    if different:
        name = different[0]
        raise BadInput(
            f"{file.path} is not a level of {source.path}: {len(different)} tensors differ in shape, "
            f"the first is '{name}' ({shapes.get(name, 'absent')} there, {others.get(name, 'absent')} here).",
            means="The two files hold different models, or one of them has its output matrix apart.",
            do="Compare a file with the model that it was made from.",
        )
    return Candidate(level or file.path.stem, FileWeights(file, threads=threads))


def folder_candidate(
    source: GgufFile, folder: Path, form: FolderFormat, *, level: str = "", threads: int = 1
) -> Candidate:
    """A checkpoint folder of these weights as a level of the source, in the format ``form``; ``level``: its name here
    (default: the folder's). Embedding and head are the source's.

    Raises:
        BadInput, BadFile: the folder holds another model, or is no sound checkpoint.
        UnknownArchitecture: nothing is known of how the family's tensors are called there.
    """
    return Candidate(level or folder.name, CheckpointWeights(FileWeights(source, threads=threads), folder, form))


class WalkOptions(TypedDict, total=False):
    """How a walk is run; what is left out has the default named here."""

    reference: Candidate
    """Whose predictions the others are compared with; the source itself by default."""
    progress: Progress
    """Told after each layer."""
    device: str
    """Where arithmetic happens, as torch names it; ``cpu``."""
    threads: int
    """For dequantizing the source; torch's own threads are torch's setting. 1."""
    state_bytes: int
    """Hidden states beyond this go to a file in ``spill``; 1 GiB."""
    spill: Path | None
    """The system's folder for temporary files by default."""
    keep: Path | None
    """A folder in which a killed walk leaves its hidden states; a walk of the same levels over the same text
    goes on from there, and removes them at its end. None keeps nothing."""
    remember: KeptArray | None
    """Where what the reference has at the head is left: a walk of other levels over the same text finds it, and takes
    the levels alone. None leaves nothing."""
    engine_rounding: bool
    """Round every matrix's inputs as llama.cpp does on the CPU (``walk/rounding.py``), so that figures are
    the engine's; by default they are what the weights alone cost."""
    half: bool
    """Multiply in bfloat16 (``walk/products.py``): adds a thousandth of a nat or so to every level's divergence, so
    it is for figures that nobody is shown."""


def walk(
    source: GgufFile, candidates: Sequence[Candidate], windows: Sequence[Window], **options: Unpack[WalkOptions]
) -> list[Fidelity]:
    """Compare levels with their reference on the same tokens, in one pass.

    Args:
        source: the model whose levels they are.
        candidates: the levels, each with its weights.
        windows: token windows of the text (``describe.windows.text_windows``).
        options: ``WalkOptions``.

    Returns:
        One record per candidate, in order.

    Raises:
        BadInput: no windows, or token ids that the model does not have.
        BadFile, BadWeights, UnknownArchitecture: the model cannot be walked.
        OutputError: no room for hidden states.
    """
    scores = token_scores(source, candidates, windows, **options)
    return [
        fidelity(candidate.level, own, scores[0], windows)
        for candidate, own in zip(candidates, scores[1:], strict=True)
    ]


def token_scores(
    source: GgufFile, candidates: Sequence[Candidate], windows: Sequence[Window], **options: Unpack[WalkOptions]
) -> list[TokenScores]:
    """Scores of every scored token, windows in the caller's order, of the reference and then of each
    candidate.

    Arguments and errors as ``walk``.
    """
    check_tokens(windows, source.model.dims.n_vocab)
    own = FileWeights(source, threads=options.get("threads", 1))
    reference = options["reference"].weights if "reference" in options else own
    ladder = Ladder(
        layered(source, own, device=options.get("device", "cpu")),
        [reference, *(candidate.weights for candidate in candidates)],
        windows,
        state_bytes=options.get("state_bytes", GiB),
        spill=options.get("spill"),
        keep=options.get("keep"),
        remember=options.get("remember"),
        engine_rounding=options.get("engine_rounding", False),
        half=options.get("half", False),
    )
    progress = options.get("progress", silent)

    def so_far(member: int, mean: float) -> None:
        if member:
            progress.on_level(LevelNews(candidates[member - 1].level, kl_mean=mean))

    return ladder.run(progress, so_far)


def _clusters(windows: Sequence[Window]) -> tuple[str, NDArray[np.int64]]:
    """The unit that intervals resample, and which unit each scored token belongs to.

    Documents; in a single document its windows, which are further from independent than documents are.
    """
    names = list(dict.fromkeys(window.document for window in windows))
    if len(names) > 1:
        return "document", np.concatenate([np.full(w.scored, names.index(w.document)) for w in windows])
    return "window", np.concatenate([np.full(w.scored, at) for at, w in enumerate(windows)])


def fidelity(
    level: str, own: TokenScores, reference: TokenScores, windows: Sequence[Window], *, coverage: float = 0.95
) -> Fidelity:
    """A level's figures and their intervals from the scores of every token (``docs/measure.md``); ``coverage`` is the
    intervals', higher where they are looked at several times."""
    unit, cluster = _clusters(windows)
    units = int(cluster.max()) + 1
    rng = np.random.default_rng(SEED)

    def sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(cluster, weights=values, minlength=units).astype(np.float64)

    tokens = sums(np.ones(len(cluster)))
    unit_kl = sums(own.kl) / tokens
    kl = ratio_interval(sums(own.kl), tokens, rng, scale="log", worse="more", level=coverage)
    lost = ratio_interval(sums(own.nll - reference.nll), tokens, rng, worse="more", level=coverage)
    same = (own.top1 == reference.top1).astype(np.float64)
    top1 = ratio_interval(sums(same), tokens, rng, worse="less", level=coverage)
    median = quantile_interval(own.kl, cluster, 0.5, rng, level=coverage)
    p99 = quantile_interval(own.kl, cluster, 0.99, rng, level=coverage)
    return Fidelity(
        level=level, tokens=len(cluster), units=units, unit=unit,
        kl_mean=kl.value, kl_low=kl.low, kl_high=kl.high,
        kl_median=median.value, kl_median_low=median.low, kl_median_high=median.high,
        kl_p99=p99.value, kl_p99_low=p99.low, kl_p99_high=p99.high, kl_max=float(own.kl.max()),
        ppl=float(np.exp(own.nll.mean())), ppl_reference=float(np.exp(reference.nll.mean())),
        ppl_ratio=float(np.exp(lost.value)),
        ppl_ratio_low=float(np.exp(lost.low)), ppl_ratio_high=float(np.exp(lost.high)),
        top1=top1.value, top1_low=float(np.maximum(0, top1.low)), top1_high=float(np.minimum(1, top1.high)),
        unit_kl=tuple(unit_kl.tolist()), unit_tokens=tuple(tokens.astype(int).tolist()),
    )  # fmt: skip


def fidelity_by_depth(
    level: str, own: TokenScores, reference: TokenScores, windows: Sequence[DepthWindows]
) -> Fidelity:
    """The same over all depths, whose windows stand one after the other, and with the figures of each. What the loss
    rises by is paired: a document's tokens are the same at every depth."""
    places = by_depth(windows)
    every = [window for one in windows for window in one.windows]
    ends = np.cumsum([window.scored for window in every])
    parts = list(zip(own.split(ends), reference.split(ends), strict=True))
    found = []
    for one in windows:
        mine, theirs = (TokenScores.joined(list(side)) for side in zip(*parts[places[one.depth]], strict=True))
        found.append(fidelity(level, mine, theirs, one.windows))
    depths = tuple(_at_depth(one.depth, figures, found[0]) for one, figures in zip(windows, found, strict=True))
    return replace(fidelity(level, own, reference, every), way=Way.DEPLOYED, depths=depths)


def _at_depth(depth: int, own: Fidelity, shallow: Fidelity) -> AtDepth:
    rise = _rise(own, shallow)
    return AtDepth(depth=depth, rise=rise.value, rise_low=rise.low, rise_high=rise.high, **own.losses)


def _rise(deep: Fidelity, shallow: Fidelity) -> Interval:
    """By which the loss of the same tokens is larger behind a longer context; NaN where nothing is lost at all."""
    none = Interval(math.nan, math.nan, math.nan)
    if deep is shallow or not shallow.kl_mean > 0:
        return none
    weights = np.asarray(deep.unit_tokens, np.float64)
    x, w = (np.asarray(one.unit_kl) * weights for one in (deep, shallow))
    if not (w > 0).all():
        return none
    return ratio_interval(x, w, np.random.default_rng(SEED), scale="log")
