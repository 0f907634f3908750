"""Write a GGUF level whose codes are chosen with error feedback, fitted layer by layer to a calibration text.

The types come from a recipe, llama.cpp's or one of our own; the bytes are ordinary blocks. Layers go to their places in
the file as they are finished, and a killed run goes on at the layer whose states it kept. The output matrix is fitted
to what the last norm gives, the embedding to what gradients say of its errors, and a matrix that is both to both.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitladder.describe.windows import Window, tokens_hash
from bitladder.errors import BadInput, BitladderError
from bitladder.executors import Executor
from bitladder.files.gguf import GgufFile, row_pieces
from bitladder.files.gguf_header import row_bytes
from bitladder.files.gguf_writer import GgufWriter
from bitladder.files.level_files import LevelDraft, draft_level, free_name, possible_places, refuse_overwriting
from bitladder.formats.gguf import PROVENANCE
from bitladder.formats.recipes import nearest_level
from bitladder.formats.roles import EMBEDDING, factor_name
from bitladder.formats.tensors import TensorInfo
from bitladder.kernels import REVISION, quantize
from bitladder.kernels.feedback import REVISION as FEEDBACK_REVISION
from bitladder.kernels.feedback import takes_feedback
from bitladder.levels.held import require_held
from bitladder.plan.calibration_text import LEAST_TOKENS
from bitladder.progress import Part, Progress, silent
from bitladder.records.calibration import LinearLoss
from bitladder.records.level_file import LevelFile
from bitladder.records.recipe import FittedLevel, Recipe, Tuning
from bitladder.stages.curvature import kept_curvatures
from bitladder.stages.tuning import Tuner
from bitladder.units import GiB
from bitladder.walk.driver import Member, Spread, Stream, forward
from bitladder.walk.ends import head_inputs
from bitladder.walk.feedback import (
    FedLevel,
    FeedbackSettings,
    FittedTensor,
    factor_of,
    fit_matrix,
)
from bitladder.walk.inputs import InputStatistics, statistics_of
from bitladder.walk.keep import Keep
from bitladder.walk.layers import LayeredModel
from bitladder.walk.opened import layered
from bitladder.walk.sensitivity import HEADS, Curvatures
from bitladder.walk.spread import spread_over
from bitladder.walk.states import Batch, States, batches_of, shard_count
from bitladder.walk.tuning import TuneSettings
from bitladder.walk.weights import FileWeights

_LEVEL = 1
"""The level's number in the stream; the source is the other."""
_PIECE_WEIGHTS = 1 << 22
_PIECE_BYTES = 1 << 28


@dataclass(frozen=True)
class _Job:
    """What the parts of one run share."""

    source: GgufFile
    weights: FileWeights
    model: LayeredModel
    recipe: Recipe
    settings: FeedbackSettings
    windows: Sequence[Window]
    batches: Sequence[Batch]
    tuning: Sequence[Window]
    progress: Progress


def write_with_feedback(
    source: GgufFile,
    recipe: Recipe,
    out_dir: Path,
    windows: Sequence[Window],
    *,
    settings: FeedbackSettings | None = None,
    tuning: Sequence[Window] = (),
    state_bytes: int = GiB,
    force: bool | None = None,
    folders: Sequence[Path] = (),
    is_kept: Callable[[Path], bool] = lambda _: False,
    progress: Progress = silent,
    executor: Executor | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> FittedLevel:
    """Write ``out_dir/<name>-<label>.gguf`` by a recipe, with error feedback.

    Args:
        source: the open model.
        recipe: a type for every tensor; those it does not name keep the source's.
        out_dir: made if it is not there.
        windows: the calibration text.
        settings: damping, effort, threads, and where arithmetic happens.
        tuning: a text that no code is fitted to: with it the numbers beside codes are tuned (``stages.tuning``).
        state_bytes: hidden states beyond this go to a file in ``out_dir``.
        force: as ``quantize_levels`` takes it.
        folders: where else the file may lie already, under any name.
        is_kept: whether a file must not be replaced, see ``stages.write_levels.quantize_levels``.
        progress: told after each layer.
        executor: computes units of the walk; they are computed here by default. The bytes do not depend on it.
        warn: told where workers cannot read the source.

    A file that is already there with the same header (source, recipe, text, settings, version; what was expected of it
    apart) is kept.

    Raises:
        BadInput: too little text.
        BadFile, BadWeights, UnknownArchitecture: the model cannot be walked.
        OutputError: no space or no permission; what was begun is removed.
    """
    started = time.monotonic()
    settings = settings or FeedbackSettings()
    refuse_factors(source, recipe)
    tokens = sum(len(window.tokens) for window in windows)
    if tokens < LEAST_TOKENS:
        raise BadInput(
            f"The calibration text has {tokens} tokens; error feedback needs at least {LEAST_TOKENS}.",
            means="Codes fitted to so few inputs fit the text and not the model's work.",
            do="Give a longer text, 30,000 tokens of several kinds say, or leave it out to use the one that ships.",
        )
    method = method_name(windows, settings, tuning)
    expected = "" if recipe.expected_kl is None else f"{recipe.expected_kl:.3g}"
    fresh = _drafted(source, recipe, out_dir, method, expected)
    places = (place.parts[0].path for place in possible_places(fresh, folders))
    likely = (_drafted(source, recipe, out_dir, method, _expected_in(path) or expected).at(path) for path in places)
    there = next((draft for draft in likely if draft.is_written(lambda: source.sha256)), None)
    draft = there or free_name(fresh, is_kept)
    if there is None:
        refuse_overwriting([header.path for header in source.headers], [draft], lambda: source.sha256, force=force)
    losses: list[LinearLoss] = []
    tuned: Tuning | None = None
    reused = there is not None
    if not reused:
        weights = FileWeights(source, threads=settings.threads)
        model = layered(source, weights, device=settings.device)
        job = _Job(source, weights, model, recipe, settings, windows, batches_of(windows), tuning, progress)
        with spread_over(executor, source, warn=warn) as spread:
            losses, tuned = _write(job, draft, state_bytes, spread)
    seconds = time.monotonic() - started
    file = LevelFile(recipe.label, draft.parts[0].path, draft.file_bytes, recipe.bpw, seconds, reused)
    return FittedLevel(file, recipe, tuple(losses), tokens, method, tuned)


def refuse_factors(source: GgufFile, recipe: Recipe) -> None:
    """Codes are chosen for what a matrix does, and its factor would count twice; raises BadInput."""
    types = {info.name: info.qtype for info in source.model.tensors}
    for name, qtype in types.items():
        if factor_name(name) in types and recipe.qtypes.get(name, qtype) != qtype:
            raise BadInput(
                f"{source.path}: {name} has a factor beside it, and error feedback is not made for such matrices.",
                means="It was requantized from NVFP4.",
                do="Give the file as it was before, whose NVFP4 weights stay, or ask for the level without feedback.",
            )


def _drafted(source: GgufFile, recipe: Recipe, out_dir: Path, method: str, expected: str) -> LevelDraft:
    return draft_level(
        source.model,
        nearest_level(recipe.qtypes, source.model.tensors),
        out_dir,
        label=recipe.label,
        method=method,
        qtypes=recipe.qtypes,
        notes={"expected_kl": expected} if expected else {},
    )


def _expected_in(path: Path) -> str:
    """What a file says that was expected of it. Expectations improve as files are measured; a file that is the same in
    all else is not made again for that."""
    if not path.is_file():
        return ""
    try:
        with GgufFile.open(path) as there:
            return str(there.model.metadata.get(PROVENANCE + "expected_kl", ""))
    except BitladderError:  # whatever it is, it is not ours, and is_written will say so
        return ""


def method_name(windows: Sequence[Window], settings: FeedbackSettings, tuning: Sequence[Window] = ()) -> str:
    """How codes are chosen, and numbers tuned, in words that change whenever the bytes may."""
    revision = f"{REVISION}-{FEEDBACK_REVISION}"
    passes = "bfloat16" if settings.half_products else "f32"
    text = tokens_hash(windows)[:16]
    how = TuneSettings.for_windows(len(tuning)).key
    end = f", tuned in {how} on {tokens_hash(tuning)[:16]}" if tuning else ""
    return f"feedback {settings.effort}, kernels {revision}, damp {settings.damp:g}, passes {passes}, text {text}{end}"


def _write(
    job: _Job, draft: LevelDraft, state_bytes: int, spread: Spread | None
) -> tuple[list[LinearLoss], Tuning | None]:
    """Make the file; on an error of ours remove it, on anything else leave it to a later run."""
    part = draft.parts[0]
    fingerprint = hashlib.sha256(part.header(job.source.sha256)).hexdigest()
    out = _Out(GgufWriter(part.path, part.plan, fingerprint))
    folder = part.path.with_name(part.path.name + ".partial.states")
    n_layer = job.model.n_layer
    try:
        curvatures = _curvatures(job, state_bytes, part.path.parent)
        stream = _stream(job, out, part.path.parent, Keep(folder, fingerprint), state_bytes, spread, curvatures)
        forward([stream], Part(job.progress, 0, n_layer, n_layer + 1.0), "fitting ")
        for name in out.unfinished():
            seen = _seen(job, name, stream.states_of(_LEVEL), curvatures)
            job.progress("fitting what is outside the layers", n_layer + 0.5, n_layer + 1.0)
            out.put(name, _other(job, name, seen))
        tuning = _tuned(job, out, state_bytes, folder, fingerprint) if job.tuning else None
        out.writer.finish(part.header(job.source.sha256))
        shutil.rmtree(folder, ignore_errors=True)
    except BitladderError:
        out.writer.discard()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        out.writer.close()
    job.progress("fitted", n_layer + 1.0, n_layer + 1.0)
    return out.losses, tuning


def _tuned(job: _Job, out: _Out, state_bytes: int, folder: Path, fingerprint: str) -> Tuning:
    """The level's free numbers tuned, all of its tensors being there."""
    tuner = Tuner(
        job.model, job.weights, job.tuning, job.settings.half_products, state_bytes,
        spill=folder.parent, notes=folder, key=fingerprint, progress=job.progress,
        settings=TuneSettings.for_windows(len(job.tuning)),
    )  # fmt: skip
    return tuner.level(out, threads=job.settings.threads)


def _curvatures(job: _Job, state_bytes: int, spill: Path) -> Curvatures | None:
    """What gradients say of errors, where something is fitted under it."""
    if not takes_curvature(job.source, job.recipe):
        return None
    return kept_curvatures(
        job.source, job.model, job.weights, job.windows, half=job.settings.half_products, state_bytes=state_bytes,
        spill=spill, progress=Part(job.progress, 0.0, 0.5, job.model.n_layer + 1.0),
    )  # fmt: skip


def _stream(
    job: _Job, out: _Out, folder: Path, keep: Keep, state_bytes: int, spread: Spread | None,
    curvatures: Curvatures | None,
) -> Stream:  # fmt: skip
    """The source, and the level behind it; of what either reads in a layer half of ``state_bytes`` stays in memory."""
    level = FedLevel(
        job.model, job.weights, job.recipe.qtypes, job.settings, job.batches, out.take, out.has,
        budget_bytes=state_bytes // 2, spill=folder, heads=curvatures.heads if curvatures else None,
    )  # fmt: skip
    return Stream(
        job.model, [Member(job.weights, [level.source_inputs]), level], job.batches,
        state_bytes=state_bytes, spill=folder, keep=keep, half=job.settings.half_products,
        shards=shard_count(job.batches), spread=spread,
    )  # fmt: skip


class _Out:
    """Tensors on their way into the file, each by its name."""

    def __init__(self, writer: GgufWriter) -> None:
        self.writer = writer
        self._numbers = {tensor.name: number for number, tensor in enumerate(writer.plan.tensors)}
        self._done: set[str] = set()
        self.losses: list[LinearLoss] = []

    def take(self, tensor: FittedTensor) -> None:
        """Write a fitted tensor."""
        self.put(tensor.name, [tensor.data])
        self.losses.append(LinearLoss(tensor.name, tensor.loss, tensor.tokens, tensor.damp, tensor.note))

    def put(self, name: str, pieces: Iterable[NDArray[np.uint8]]) -> None:
        """Write a tensor, given as consecutive rows."""
        number, at, digest = self._numbers[name], 0, hashlib.sha256()
        for piece in pieces:
            data = np.ascontiguousarray(piece).reshape(-1).data
            self.writer.write(number, at, data)
            digest.update(data)
            at += len(data)
        self.writer.done(number, digest.hexdigest())
        self._done.add(name)

    def qtype(self, name: str) -> str:
        """As ``tuning.LevelBytes``."""
        return self._info(name).qtype

    def shape(self, name: str) -> tuple[int, ...]:
        """As ``tuning.LevelBytes``."""
        return self._info(name).shape

    def raw(self, name: str, rows: slice | NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """As ``tuning.LevelBytes``, of a tensor that is finished."""
        count, width = row_bytes(self._info(name))
        number = self._numbers[name]
        if rows is None or isinstance(rows, slice):
            first, last, _ = (rows or slice(None)).indices(count)
            return self._read(number, first * width, (last - first) * width).reshape(-1, width)
        whole = np.empty((len(rows), width), np.uint8)
        for at, row in enumerate(rows.tolist()):
            whole[at] = self._read(number, row * width, width)
        return whole

    def _info(self, name: str) -> TensorInfo:
        return self.writer.plan.tensors[self._numbers[name]]

    def _read(self, number: int, at: int, count: int) -> NDArray[np.uint8]:
        pieces = (self.writer.read(number, at + k, size) for k, size in _pieces(count))
        return np.frombuffer(b"".join(pieces), np.uint8)

    def has(self, name: str) -> bool:
        """Whether a tensor is in the file, by this run or an earlier one."""
        number = self._numbers[name]
        size = self.writer.plan.tensors[number].nbytes

        def digest(read: Callable[[int, int], bytes]) -> str:
            whole = hashlib.sha256()
            for at, count in _pieces(size):
                whole.update(read(at, count))
            return whole.hexdigest()

        return name in self._done or self.writer.finished(number, digest)

    def unfinished(self) -> list[str]:
        """What is still to be made."""
        return [name for name in self._numbers if not self.has(name)]


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    """Where pieces of so many bytes begin, and their sizes: systems read at most 2 GiB at a time."""
    return ((at, min(_PIECE_BYTES, count - at)) for at in range(0, count, _PIECE_BYTES))


def _other(job: _Job, name: str, seen: InputStatistics | None) -> Iterator[NDArray[np.uint8]]:
    """A tensor outside the layers' linear ones, a few rows at a time: kept, or fitted to what it reads, or rounded."""
    info = job.source.info(name)
    qtype = job.recipe.qtypes.get(name, info.qtype)
    factored = factor_of(name, seen, job.settings) if seen else None
    for rows in row_pieces(info, _PIECE_WEIGHTS):
        if qtype == info.qtype:
            yield job.source.raw(name, rows)
            continue
        weights = job.weights(name, rows)
        require_held(weights, [qtype], name, rows.start)
        if seen and factored:
            yield fit_matrix(qtype, weights, seen, factored, job.settings).data
        else:
            yield quantize(weights, qtype, effort=job.settings.effort, threads=job.settings.threads)


def _seen(job: _Job, name: str, states: States, curvatures: Curvatures | None) -> InputStatistics | None:
    """Statistics that the codes of the output matrix or the embedding are fitted to; None of other tensors and of types
    without feedback."""
    model = job.model
    if name not in (model.output, EMBEDDING) or not _is_fitted(job.source, job.recipe, name):
        return None
    read = head_inputs(model, job.weights, states, job.batches) if name == model.output else None
    if name != EMBEDDING or curvatures is None or not curvatures.embedding.any():
        return read
    tokens = sum(len(window.tokens) for window in job.windows)
    cost = tokens * curvatures.embedding
    return statistics_of(cost if read is None else cost + read.gram, tokens)


def takes_curvature(source: GgufFile, recipe: Recipe) -> bool:
    """Whether codes will be fitted under what gradients say: of the embedding, or of heads of attention."""
    return any(
        (info.name == EMBEDDING or info.name.endswith(HEADS)) and _is_fitted(source, recipe, info.name)
        for info in source.model.tensors
    )


def _is_fitted(source: GgufFile, recipe: Recipe, name: str) -> bool:
    stored = source.info(name).qtype
    qtype = recipe.qtypes.get(name, stored)
    return qtype != stored and takes_feedback(qtype)
