"""Write a model at one or several levels in a single pass over its weights.

Tensors are taken in the order in which they lie in the source and cut into pieces of whole rows. A piece is
decoded once, checked for NaN and infinity once, and quantized once per qtype, however many levels want that
qtype; each result is written straight to its place in every file that needs it. All threads work on pieces,
so some are written while others are computed. A piece depends on nothing but its own rows and its place is
known beforehand: the bytes do not depend on the number of threads, and memory does not depend on the model's
size.

With an executor that computes elsewhere, workers read a piece where they are (or are sent its bytes, where they cannot
read the file), and send its blocks; threads here write them.

The source's SHA-256, which every file records, comes from a thread that reads a little ahead, so the disk is
asked once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import BadInput, BitladderError
from bitladder.executors import Executor
from bitladder.executors.base import Lane, weights_travel
from bitladder.files.following import AHEAD, FollowingHash
from bitladder.files.gguf import GgufFile, joined_sha256
from bitladder.files.gguf_writer import Flusher, GgufWriter, allow_files, piece_digest
from bitladder.files.level_files import (
    NO_IMPORTANCE,
    LevelDraft,
    check_space,
    draft_level,
    free_name,
    possible_places,
    refuse_overwriting,
)
from bitladder.formats.blocks import QTYPES
from bitladder.formats.recipes import level_named
from bitladder.formats.tensors import TensorInfo
from bitladder.kernels import REVISION, Effort, dequantize, quantize
from bitladder.levels import FoldedLevel
from bitladder.levels.held import require_held, vanishes
from bitladder.progress import Progress, silent
from bitladder.records.level_file import LevelFile

if TYPE_CHECKING:
    from bitladder.kernels.awq import Fold  # importing it sets up numba, which takes as long as a small model

PIECE_WEIGHTS = 1 << 20
"""Weights a thread works on at a time: 4 MiB as f32, near what a core's own caches hold."""

F32Array = NDArray[np.float32]
Importance = Mapping[str, F32Array]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class _Piece:
    """Rows ``start`` to ``stop`` of one tensor, counted over all its matrices, all in matrix number
    ``matrix``.
    """

    info: TensorInfo
    matrix: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.start, self.stop)

    @property
    def columns(self) -> int:
        """Of its tensor."""
        return self.info.shape[-1] if self.info.shape else 1


@dataclass
class _Work:
    """A tensor to be made: which files want it in which qtype, and its finished pieces."""

    info: TensorInfo
    targets: dict[str, list[tuple[GgufWriter, int]]] = field(default_factory=dict)
    made: dict[str, list[_Made]] = field(default_factory=dict)

    def vanished(self, qtype: str) -> bool:
        """Whether nothing but zeros is left of it."""
        fates = {piece.lives for piece in self.made[qtype]}
        return False in fates and True not in fates


class _Made(NamedTuple):
    """A piece in one qtype."""

    digest: bytes
    """SHA-256."""
    lives: bool | None
    """Whether any weight is left; None of zeros that were zeros before."""


def pieces_of(info: TensorInfo) -> Iterator[_Piece]:
    """Cut a tensor into pieces. The cuts depend on its shape alone: hashes in journals count on them."""
    if not info.elements:
        return
    columns = info.shape[-1] if info.shape else 1
    rows = info.shape[-2] if len(info.shape) > 1 else 1
    step = max(1, PIECE_WEIGHTS // columns)
    for matrix in range(info.elements // (rows * columns)):
        for start in range(0, rows, step):
            first = matrix * rows
            yield _Piece(info, matrix, first + start, first + min(start + step, rows))


class Placing(TypedDict, total=False):
    """Where levels go, and what they may take the place of; what is left out has the default named here."""

    split_max_bytes: int | None
    """Cut every level into parts of at most this many bytes of weights; None: a file each."""
    force: bool | None
    """Replace files of other kinds and sources, too; None where the user has no say."""
    folders: Sequence[Path]
    """Where else a level may lie already, under any name; nowhere."""
    is_kept: Callable[[Path], bool]
    """Whether a file must not be replaced; a level whose name it has is written beside it, as
    ``<name>-<LEVEL>.<tag>.gguf``. No file is kept."""


def quantize_levels(
    source: GgufFile,
    levels: Sequence[str],
    out_dir: Path,
    *,
    importance: Importance | None = None,
    folds: Mapping[str, Fold] | None = None,
    effort: Effort = "good",
    threads: int = 1,
    device: str = "cpu",
    executor: Executor | None = None,
    warn: Callable[[str], None] = lambda _: None,
    requantize: bool = False,
    progress: Progress = silent,
    **placing: Unpack[Placing],
) -> list[LevelFile]:
    """Write ``out_dir/<name>-<LEVEL>.gguf`` for every level, in the order asked for.

    Args:
        source: the open model; tensors that are already quantized are decoded first, equal types are copied.
        importance: per tensor f32[columns], or f32[matrices, columns] (also flattened) for stacked experts.
        folds: per tensor the scales that AWQ multiplies into it or divides out of it; the levels are then called
            ``AWQ-<LEVEL>``.
        device: where scales are searched for, as ``kernels.quantize`` takes it. The bytes do not depend on it.
        executor: where pieces are computed; here by default. The bytes do not depend on it either.
        warn: is called where workers cannot read the source, whose weights then travel, and with what is to be known of
            tensors of which nothing is left.
        requantize: weights in a type that models are trained in (MXFP4, NVFP4, ternary) get the level's types, too.
        placing: ``Placing``.

    A file that is already there with the same header (source hash, recipe, method, version) is kept. What a
    killed run left is checked and gone on from.

    Raises:
        UnknownLevel: no level has this name.
        UsageError: a level would overwrite the source, or a file that is not the same level of the same source.
        BadInput: an importance vector does not fit its tensor.
        BadWeights: a tensor holds NaN or infinity, or a weight beyond what a type holds.
        OutputError: no space or no permission; what was begun is removed.
    """
    started = time.monotonic()
    method = method_name(effort, importance, folds)
    drafts = [
        draft_level(
            source.model,
            level,
            out_dir,
            label="" if folds is None else FoldedLevel(level_named(level)).name,
            method=method,
            has_importance=bool(importance),
            split_max_bytes=placing.get("split_max_bytes"),
            requantize=requantize,
        )
        for level in dict.fromkeys(levels)
    ]
    fitted = fitted_importance(source, importance or {})
    if folds:
        fitted = {name: folds[name].importance(rows) if name in folds else rows for name, rows in fitted.items()}
    refuse = partial(refuse_overwriting, [header.path for header in source.headers], force=placing.get("force"))
    refuse(drafts, lambda: source.sha256)
    drafts = [_placed(draft, source, placing) for draft in drafts]
    missing = [draft for draft in drafts if not draft.is_written(lambda: source.sha256)]
    if missing:
        refuse(missing, lambda: source.sha256)
        check_space(missing, out_dir)
        search = _Search(fitted, folds or {}, effort, device)
        _write(source, missing, _Pieces(search, threads, executor, warn), progress=progress)
    seconds = time.monotonic() - started
    return [_record(draft, seconds, reused=draft not in missing) for draft in drafts]


def _placed(draft: LevelDraft, source: GgufFile, placing: Placing) -> LevelDraft:
    """A level where its file lies, or where it is to be written."""
    places = possible_places(draft, placing.get("folders", ()))
    there = (place for place in places if place.is_written(lambda: source.sha256))
    return next(there, None) or free_name(draft, placing.get("is_kept", lambda _: False))


def _record(draft: LevelDraft, seconds: float, *, reused: bool) -> LevelFile:
    elements = sum(tensor.elements for tensor in draft.tensors)
    bpw = 8 * sum(tensor.nbytes for tensor in draft.tensors) / elements if elements else math.nan
    return LevelFile(draft.label, draft.parts[0].path, draft.file_bytes, bpw, seconds, reused)


def method_name(effort: Effort, importance: Importance | None, folds: Mapping[str, Fold] | None = None) -> str:
    """How block scales are chosen, in words that change whenever the bytes may: effort, the kernels' revision, the
    importance matrix's hash, and that of the scales that were folded in.
    """
    scales = {f"{name}.{kind}": one for name, fold in (folds or {}).items() for kind, one in fold.vectors().items()}
    folded = f", AWQ {_hash_of(scales)}" if scales else ""
    weighed = importance_hash(importance) or NO_IMPORTANCE
    return f"search {effort}, kernels {REVISION}, importance {weighed}{folded}"


def importance_hash(importance: Importance | None) -> str:
    """An importance matrix by its vectors, whatever file they came in; empty for none."""
    return _hash_of(importance) if importance else ""


def _hash_of(vectors: Importance) -> str:
    digest = hashlib.sha256()
    for name in sorted(vectors):
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(vectors[name], np.float32).tobytes())
    return digest.hexdigest()[:16]


def fitted_importance(source: GgufFile, importance: Importance) -> dict[str, F32Array]:
    """Importance as f32[matrices, columns] per tensor; a single row serves every matrix of a stack.

    Raises:
        BadInput: it was computed for another model.
    """
    fitted = {}
    for info in source.model.tensors:
        vector = importance.get(info.name)
        if vector is None or len(info.shape) < 2:
            continue
        matrices, columns = math.prod(info.shape[:-2]), info.shape[-1]
        if vector.size in (columns, matrices * columns):
            fitted[info.name] = np.ascontiguousarray(vector, np.float32).reshape(-1, columns)
        elif info.name != "token_embd.weight":  # read by row number, so published files hold nonsense for it
            raise BadInput(
                f"The importance of {info.name} has {vector.size} values, the tensor has shape {info.shape}.",
                means="The importance matrix was computed for another model.",
                do="Compute one for this model, or leave it away.",
            )
    return fitted


def _write(
    source: GgufFile,
    drafts: Sequence[LevelDraft],
    pieces: _Pieces,
    *,
    progress: Progress,
) -> None:
    """Make all parts of all drafts; on an error of ours remove them, on anything else leave them to a later
    run.
    """
    following = source.hash_ahead()
    writers: list[tuple[GgufWriter, Callable[[str], bytes]]] = []
    try:
        allow_files(sum(len(draft.parts) for draft in drafts))
        for part in (part for draft in drafts for part in draft.parts):
            fingerprint = hashlib.sha256(
                part.plan.header + repr((following.states, PIECE_WEIGHTS)).encode()
            ).hexdigest()
            writers.append((GgufWriter(part.path, part.plan, fingerprint), part.header))
        _Pass(source, pieces.begun(source), following, progress, pieces.warn).run([writer for writer, _ in writers])
        sha256 = joined_sha256(following.result())
        for writer, header in reversed(writers):  # a split model appears with its first part, last
            writer.finish(header(sha256))
    except BitladderError:
        for writer, _ in writers:
            writer.discard()
        raise
    finally:
        for writer, _ in writers:
            writer.close()


class _Blocks(NamedTuple):
    """A piece in one qtype: uint8[rows, row_bytes]; ``lives`` as in ``_Made``."""

    qtype: str
    data: NDArray[np.uint8]
    lives: bool | None


Blocks = Iterator[_Blocks]


@dataclass(frozen=True)
class _Search:
    """How weights become blocks."""

    importance: Importance
    folds: Mapping[str, Fold]
    effort: Effort
    device: str

    def encoded(
        self, piece: _Piece, qtypes: Sequence[str], raw: NDArray[np.uint8], rooms: _Rooms, device: str
    ) -> Blocks:
        """A piece, given as it is stored uint8[rows, row_bytes], in each qtype; what comes is overwritten by what comes
        next.

        Raises:
            BadWeights: a weight is NaN, infinite or beyond what a type holds.
        """
        info, columns = piece.info, piece.columns
        weights, largest = None, math.inf
        if not _holds_integers(info):
            weights = dequantize(raw, info.qtype, out=rooms.take((len(raw), columns), np.float32))
            weights = self.folded(weights, info, piece.rows)
            changed = [qtype for qtype in qtypes if qtype != info.qtype or info.name in self.folds]
            largest = require_held(weights, changed, info.name, piece.start)
        for qtype in qtypes:
            if weights is None or (qtype == info.qtype and info.name not in self.folds):
                yield _Blocks(qtype, raw, True)
            else:
                room = rooms.take((len(raw), QTYPES[qtype].row_bytes(columns)), np.uint8)
                importance = self._importance_of(piece)
                data = quantize(weights, qtype, importance=importance, effort=self.effort, device=device, out=room)
                yield _Blocks(qtype, data, not vanishes(data, qtype, largest) if largest else None)

    def _importance_of(self, piece: _Piece) -> F32Array | None:
        rows = self.importance.get(piece.info.name)
        return None if rows is None else rows[piece.matrix if len(rows) > 1 else 0]

    def folded(self, weights: F32Array, info: TensorInfo, rows: slice) -> F32Array:
        """Rows of a tensor with the scales of its fold; a vector is a single row of them."""
        fold = self.folds.get(info.name)
        if fold is None:
            return weights
        return fold.apply(weights, rows) if len(info.shape) > 1 else fold.apply(weights[0])[None]


class _Rooms(threading.local):
    """A thread's arrays to work in, one per type of number, kept from piece to piece: fresh pages cost time."""

    def __init__(self) -> None:
        self._arrays: dict[type[np.generic], NDArray[Any]] = {}

    def take(self, shape: tuple[int, int], kind: type[Scalar]) -> NDArray[Scalar]:
        """An array of this shape; what it held before is lost."""
        size = math.prod(shape)
        room = self._arrays.get(kind)
        if room is None or room.size < size:
            room = self._arrays[kind] = np.empty(size, kind)
        return room[:size].reshape(shape)


@dataclass(frozen=True)
class _Pieces:
    """How pieces are computed, and by whom."""

    search: _Search
    threads: int
    executor: Executor | None
    warn: Callable[[str], None]

    def begun(self, source: GgufFile) -> _Making:
        """On the pieces of a source; asks places elsewhere whether they can read it."""
        executor = self.executor
        if executor is None or executor.here:
            devices = executor.here if executor else (self.search.device,)
            return _MadeHere(source, self.search, max(self.threads, len(devices)), devices)
        lacking = executor.lacking([header.path for header in source.headers])
        if lacking:
            self.warn(weights_travel(lacking))
        task = _Encoding(str(source.path) if not lacking else "", self.search)
        return _MadeElsewhere(source, executor, task)


class _Making(Protocol):
    """Computes pieces."""

    threads: int
    """How many it is asked for at a time."""

    def blocks(self, piece: _Piece, qtypes: Sequence[str]) -> Blocks:
        """A piece in each qtype; what comes is overwritten by what comes next."""


class _MadeHere:
    """By the threads that ask, on devices in turn."""

    def __init__(self, source: GgufFile, search: _Search, threads: int, devices: Sequence[str]) -> None:
        self.threads = threads
        self._source, self._search, self._devices = source, search, itertools.cycle(devices)
        self._rooms = _Rooms()

    def blocks(self, piece: _Piece, qtypes: Sequence[str]) -> Blocks:
        """As ``_Making``."""
        raw = self._source.raw(piece.info.name, piece.rows)
        yield from self._search.encoded(piece, qtypes, raw, self._rooms, next(self._devices))


class _MadeElsewhere:
    """By an executor's workers; the threads that ask wait for them, and write."""

    def __init__(self, source: GgufFile, executor: Executor, task: _Encoding) -> None:
        self.threads = 2 * executor.at_once(task)  # one computed, one on its way
        self._source, self._executor, self._task = source, executor, task

    def blocks(self, piece: _Piece, qtypes: Sequence[str]) -> Blocks:
        """As ``_Making``."""
        raw = None if self._task.path else self._source.raw(piece.info.name, piece.rows)
        done: Sequence[_Blocks]
        done = self._executor.start(self._task, _Unit(piece, tuple(qtypes), raw)).result()
        yield from done


@dataclass(frozen=True)
class _Unit:
    """A piece to be encoded; ``raw`` as it is stored, where workers cannot read the file."""

    piece: _Piece
    qtypes: tuple[str, ...]
    raw: NDArray[np.uint8] | None


@dataclass(frozen=True)
class _Encoding:
    """Pieces of one source, for an executor."""

    path: str
    """Of the source, where workers can read it; else empty."""
    search: _Search
    threads: int = 1

    def compute(self, lane: Lane, unit: _Unit, *held: object) -> tuple[Sequence[_Blocks], None]:  # noqa: ARG002
        """As ``executors.Task``."""
        raw, piece = unit.raw, unit.piece
        if raw is None:
            raw = _opened(self.path, Path(self.path).stat().st_mtime_ns).raw(piece.info.name, piece.rows)
        made = self.search.encoded(piece, unit.qtypes, raw, _HERE, lane.device)
        return [one._replace(data=one.data.copy()) for one in made], None


_HERE = _Rooms()


@lru_cache(1)
def _opened(path: str, changed: int) -> GgufFile:  # noqa: ARG001
    """A file that a worker reads for as long as it is asked for pieces of it, and it is not ``changed``."""
    return GgufFile.open(Path(path))


@dataclass
class _Pass:
    """One pass over the source."""

    source: GgufFile
    making: _Making
    following: FollowingHash
    progress: Progress
    warn: Callable[[str], None]

    def run(self, writers: Sequence[GgufWriter]) -> None:
        """Make every tensor that the writers lack."""
        works, threads = self._unfinished(writers), self.making.threads
        total = sum(work.info.nbytes for work in works)
        done = 0
        pending: deque[tuple[_Work, bool, Future[dict[str, _Made]]]] = deque()

        def collect() -> None:
            work, is_last, future = pending.popleft()
            for qtype, piece in future.result().items():
                work.made[qtype].append(piece)
            if is_last:
                for qtype, targets in work.targets.items():
                    if work.vanished(qtype):
                        self.warn(_dead(work.info.name, qtype))
                    for writer, number in targets:
                        writer.done(number, piece_digest([piece.digest for piece in work.made[qtype]]))
                        flusher.wrote(writer, writer.plan.tensors[number].nbytes)

        with ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool, Flusher() as flusher:
            try:
                for work in works:
                    place = self.source.place(work.info.name)
                    self.following.advance(place.shard, place.offset + work.info.nbytes + AHEAD)
                    pieces = list(pieces_of(work.info))
                    for piece in pieces:
                        if len(pending) >= 2 * threads:
                            collect()
                        pending.append((work, piece is pieces[-1], pool.submit(self._make, work, piece)))
                    done += work.info.nbytes
                    self.progress("quantizing", done, total)
                while pending:
                    collect()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _unfinished(self, writers: Sequence[GgufWriter]) -> list[_Work]:
        """What is to be made, in the order in which it lies in the source."""
        works = {info.name: _Work(info) for info in self.source.model.tensors}
        for writer in writers:
            for number, tensor in enumerate(writer.plan.tensors):
                if not _is_finished(writer, number):
                    work = works[tensor.name]
                    work.targets.setdefault(tensor.qtype, []).append((writer, number))
                    work.made[tensor.qtype] = []
        wanted = [work for work in works.values() if work.targets]
        places = {work.info.name: self.source.place(work.info.name) for work in wanted}
        return sorted(wanted, key=lambda work: (places[work.info.name].shard, places[work.info.name].offset))

    def _make(self, work: _Work, piece: _Piece) -> dict[str, _Made]:
        """Make one piece in every wanted qtype and write it."""
        made = {}
        for qtype, data, lives in self.making.blocks(piece, list(work.targets)):
            view = np.ascontiguousarray(data).reshape(-1).data
            at = piece.start * QTYPES[qtype].row_bytes(piece.columns)
            for writer, number in work.targets[qtype]:
                writer.write(number, at, view)
            made[qtype] = _Made(hashlib.sha256(view).digest(), lives)
        return made


def _dead(name: str, qtype: str) -> str:
    return (
        f"{name} becomes zeros in {qtype}: its weights are smaller than what that type's scales hold. The model was "
        "trained with another type, or this tensor is one that it does without."
    )


def _holds_integers(info: TensorInfo) -> bool:
    return info.qtype.startswith("I") and not QTYPES[info.qtype].is_quantized


def _is_finished(writer: GgufWriter, number: int) -> bool:
    """Whether an earlier run left a tensor whole; empty tensors always are."""
    tensor = writer.plan.tensors[number]
    width = QTYPES[tensor.qtype].row_bytes(tensor.shape[-1] if tensor.shape else 1)

    def digest(read: Callable[[int, int], bytes]) -> str:
        parts = (read(piece.start * width, (piece.stop - piece.start) * width) for piece in pieces_of(tensor))
        return piece_digest([hashlib.sha256(part).digest() for part in parts])

    return tensor.elements == 0 or writer.finished(number, digest)
