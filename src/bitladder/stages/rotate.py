"""Rotate a model's residual stream and write it at 16 bits: it predicts what it did, and its weights take codes better.

Whether a model is wired as its tensors' names say is not believed: the rotated weights are compared with the source on
some text before anything is written.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitladder.describe.windows import Window
from bitladder.errors import BadInput, BitladderError
from bitladder.files.gguf import GgufFile, row_pieces
from bitladder.files.gguf_header import row_bytes
from bitladder.files.gguf_writer import GgufWriter
from bitladder.files.level_files import LevelDraft, check_space, draft_level, refuse_overwriting
from bitladder.formats.blocks import TRAINED
from bitladder.formats.residual import ROTATED, Meets, residual_parts
from bitladder.formats.roles import factored
from bitladder.formats.tensors import TensorInfo
from bitladder.kernels import quantize
from bitladder.kernels.rotation import MOST_ODD, odd_part, rotation
from bitladder.plan.abilities import walk_gap
from bitladder.records.rotated import RotatedFile
from bitladder.stages.calibration import calibration_texts
from bitladder.stages.fidelity import Candidate, token_scores
from bitladder.stages.forecast import forecast, walking_need
from bitladder.stages.job import SHIPPED, Job, Work, opened
from bitladder.stages.projector import projector_of
from bitladder.walk.rotated import RotatedWeights
from bitladder.walk.weights import FileWeights

REVISION = "1"
"""Raised whenever the bytes change."""
_SEED = 0
_WINDOWS = 2
MOST_KL = 1e-3
"""Divergence up to which a rotated model predicts what it did: rounding to 16 bits costs a hundredth of it, a wrong
fold thousands of times as much."""
_PIECE_WEIGHTS = 1 << 22


def rotate_model(model: str, out: Path, work: Work, *, force: bool | None = None) -> RotatedFile:
    """Write ``out/<name>-rotated-F16.gguf``.

    Raises:
        BadInput: the model's stream cannot be rotated, or is not what its tensors' names say.
        BadWeights, UnknownArchitecture: the model cannot be walked, or its weights outgrow 16 bits.
        UsageError, OutputError: the file cannot be written there.
    """
    started = time.monotonic()
    with opened(model, work) as job:
        weights = _rotated(job)
        source, tensors = job.source, job.source.model.tensors
        types = {one.name: weights.qtype(one.name) for one in tensors}
        method = f"residual stream rotated, revision {REVISION}"
        draft = draft_level(source.model, "F16", out, label=ROTATED, method=method, qtypes=types)
        reused = draft.is_written(lambda: source.sha256)
        if not reused:
            refuse_overwriting(
                [header.path for header in source.headers], [draft], lambda: source.sha256, force=force
            )  # fmt: skip
            check_space([draft], out)
        kl, tokens = _compared(job, weights)
        if not reused:
            _write(job, weights, draft)
    return RotatedFile(draft.parts[0].path, draft.file_bytes, time.monotonic() - started, kl, tokens, reused)


def _rotated(job: Job) -> RotatedWeights:
    """The source's weights, rotated; raises BadInput where that cannot be."""
    source = job.source
    as_it_is = "Make a recipe of the model as it is."
    if gap := walk_gap(source.model):
        raise BadInput(
            f"A rotated file of this model could not be weighed: {gap}.",
            means="Such layers are found by comparing a file with its checkpoint, and a rotated one no longer has the "
            "checkpoint's weights.",
            do=as_it_is,
        )
    width, tensors = source.model.dims.n_embd, source.model.tensors
    parts = residual_parts(tensors, width)
    trained = [one for one in tensors if one.qtype in TRAINED or factored(one.name)]
    if trained:
        raise BadInput(
            f"{source.path}: '{trained[0].name}' is {trained[0].qtype}, in which the model was trained.",
            means="Rotated weights would no longer lie on the values of that type.",
            do=as_it_is,
        )
    if odd_part(width) > MOST_ODD:
        raise BadInput(f"No rotation of {width} channels is cheap to make.", do=as_it_is)
    projector = projector_of(job.found, job.journal, job.progress)
    if projector is not None:
        raise BadInput(
            f"The model takes in pictures or sounds ({projector.name}).",
            means="What they are turned into enters the residual stream, and would not be rotated.",
            do=as_it_is,
        )
    return RotatedWeights(FileWeights(source, threads=job.threads), parts, rotation(width, seed=_SEED))


def _compared(job: Job, weights: RotatedWeights) -> tuple[float, int]:
    """The mean divergence of the rotated weights' predictions on some text, and of how many tokens; raises
    BadInput where they are others."""
    windows: list[Window] = job.windows(calibration_texts(job, (SHIPPED,)))[:_WINDOWS]
    need = walking_need(job.source, windows, (ROTATED,))
    with forecast(need, job.journal):
        scores = token_scores(
            job.source, [Candidate(ROTATED, weights)], windows,
            progress=job.progress, threads=job.threads, device=job.device,
        )[1]  # fmt: skip
    kl = float(scores.kl.mean())
    if not kl <= MOST_KL:
        raise BadInput(
            f"Rotated, the model predicts something else: mean KL {kl:.3g} on {len(scores.kl)} tokens.",
            means="Its layers are wired in another way than its tensors' names say, with norms that take the mean off, "
            "say. Nothing was written.",
            do="Make a recipe of the model as it is.",
        )
    return kl, len(scores.kl)


def _write(job: Job, weights: RotatedWeights, draft: LevelDraft) -> None:
    (part,) = draft.parts
    fingerprint = hashlib.sha256(part.header(job.source.sha256)).hexdigest()
    writer = GgufWriter(part.path, part.plan, fingerprint)
    try:
        for number, info in enumerate(part.plan.tensors):
            job.progress(f"rotating {info.name}", number, len(part.plan.tensors))
            if not writer.finished(number, lambda read, info=info: hashlib.sha256(read(0, info.nbytes)).hexdigest()):  # type: ignore[misc]
                writer.put(number, (one.reshape(-1).data for one in _pieces(job.source, weights, info.name)))
        job.progress("rotated", len(part.plan.tensors), len(part.plan.tensors))
        writer.finish(part.header(job.source.sha256))
    except BitladderError:
        writer.discard()
        raise
    finally:
        writer.close()


def _pieces(source: GgufFile, weights: RotatedWeights, name: str) -> Iterator[NDArray[np.uint8]]:
    """A tensor's bytes, consecutive rows at a time; of what writes to the stream a matrix at a time."""
    info, part, qtype = source.info(name), weights.parts[name], weights.qtype(name)
    whole = part.meets is Meets.WRITES and not name.endswith(".bias")
    for rows in _matrices(info) if whole else row_pieces(info, _PIECE_WEIGHTS):
        if part.meets is Meets.NEITHER:
            yield source.raw(name, rows)
        else:
            values = weights(name, rows)
            yield quantize(values.reshape(-1, values.shape[-1]), qtype)


def _matrices(info: TensorInfo) -> Iterator[slice]:
    count, _ = row_bytes(info)
    for start in range(0, count, info.shape[-2]):
        yield slice(start, start + info.shape[-2])
