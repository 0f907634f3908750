"""Checkpoint levels that owe nothing to a text, written straight from a checkpoint's own files.

FP8, MXFP8 and INT8 without smoothing round every matrix by itself, and most of them every row. So neither a GGUF file
nor a walk over the layers is needed: each shard is read once, a few rows of a matrix at a time, and written as a shard
of the new folder. Memory does not depend on the model's size; reading and writing go on while the next rows are
rounded. Every tensor has the bytes that a walk would give it.

What goes this way are checkpoints in floats whose decoder layers hold linear layers and vectors under the names that
transformers' modules have. Stacks of experts, convolutions, narrow matrices, towers: their tensors are chosen and named
by looking at the layers, which the walk does.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder import __version__, system
from bitladder.describe.contradiction import check_config
from bitladder.describe.quantized import quantization_of
from bitladder.errors import BadFile, BadWeights, OutputError, UnknownArchitecture
from bitladder.files.checkpoint import (
    DTYPE_BYTES,
    Checkpoint,
    CheckpointTensor,
    read_checkpoint,
    read_safetensors_header,
)
from bitladder.files.checkpoint_folder import CheckpointFolder
from bitladder.files.companions import Companions, companions_of_folder
from bitladder.files.convert import unused_head
from bitladder.files.following import FollowingHash
from bitladder.files.layer_store import writing
from bitladder.files.regular import open_regular
from bitladder.files.safetensors_writer import PlacedTensors, placed_safetensors, tensor_hashes
from bitladder.files.sources import unused_note
from bitladder.levels import CheckpointLevel
from bitladder.levels.checkpoints import CheckpointFormat
from bitladder.levels.methods import Statistics
from bitladder.plan.preflight import BASE_BYTES, WALK_START_S, JobNeed
from bitladder.progress import Progress
from bitladder.records.calibration import CheckpointReport, LinearLoss, Preflight
from bitladder.stages.calibrate import fingerprint_of_files, identity_of_files, place_of_level
from bitladder.stages.forecast import forecast
from bitladder.stages.job import CPU, Build, Work
from bitladder.stages.known_files import kept_by_evidence
from bitladder.units import Basis, MiB
from bitladder.walk.allocator import keep_freed_memory
from bitladder.walk.checkpoint_layers import CheckpointLayers
from bitladder.walk.checkpoint_result import manifest_of, proved, same_reading, with_quantization
from bitladder.walk.checkpoint_walk import FLOAT_TYPES
from bitladder.walk.discovered import NARROW
from bitladder.walk.made import SCALE_DTYPES, naming, stored_array
from bitladder.walk.whole import skeleton_of, text_config

F32 = NDArray[np.float32]
_T = TypeVar("_T")
_PIECE = 1 << 20
"""Weights that are rounded at a time."""
_RATE = 6e7
"""Weights a second and core, of each level."""
_LIBRARIES = 500 * MiB
"""What torch and transformers take beside the process."""
_STORED = {"uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "float32": "F32"}
_TORCH = {"float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0"}


def goes_straight(levels: Sequence[CheckpointLevel], work: Work) -> bool:
    """Whether all of these levels can be written so, of a checkpoint that can."""
    return (
        work.device == CPU
        and work.executor is None
        and all(
            isinstance(level.format, CheckpointFormat)
            and level.method.statistics is Statistics.NONE
            and level.format.outputs_together
            and not level.format.everywhere
            for level in levels
        )
    )


@dataclass(frozen=True)
class PlainCheckpoint:
    """A checkpoint that can go straight."""

    checkpoint: Checkpoint
    dtype: str
    """Of most of its weights: ``BF16``. All that stays float becomes that."""
    linears: Mapping[str, tuple[int, int]]
    """What is quantized, by the names of its weights: ``(outputs, inputs)``."""
    places: Mapping[str, tuple[int, int]]
    """The same of the first layer, by place in it."""
    left_out: frozenset[str]
    """A stored head that nobody reads."""

    def tensors(self, shard: Path) -> list[CheckpointTensor]:
        """Those of a shard that are carried over, in their order in the file."""
        return [tensor for tensor in read_safetensors_header(shard) if tensor.name not in self.left_out]


def plain_checkpoint(folder: Path, label: str) -> PlainCheckpoint | None:
    """The checkpoint in a folder, where it can go straight; else None.

    Raises:
        BadInput, BadFile: it is no sound checkpoint, or config.json contradicts its weights.
    """
    checkpoint = read_checkpoint(folder)
    check_config(label, checkpoint.config, checkpoint.tensors)
    if quantization_of(checkpoint.config) or any(one.dtype not in FLOAT_TYPES for one in checkpoint.tensors):
        return None
    try:
        skeleton = skeleton_of(text_config(folder))
        layers = CheckpointLayers(folder, skeleton)
    except UnknownArchitecture:
        return None
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    linears: dict[str, tuple[int, int]] = {}
    places: dict[str, tuple[int, int]] = {}
    inside: set[str] = set()
    for layer, block in enumerate(skeleton.blocks):
        matrices = {f"{path}.weight" for path, module in block.named_modules() if type(module) is nn.Linear}
        for path, value in skeleton.layer_parameters(layer).items():
            name = f"{layers.prefix}{layer}.{path}"
            inside.add(name)
            if shapes.get(name) != tuple(value.shape):
                return None
            if value.ndim < 2:
                continue
            outputs, inputs = shapes[name] if value.ndim == 2 else (0, 0)
            if path not in matrices or min(outputs, inputs) < NARROW:
                return None
            linears[name] = outputs, inputs
            places.setdefault(path.removesuffix(".weight"), (outputs, inputs))
    tables = {layers.top_name(f"{skeleton.path_of(one)}.weight") for one in (skeleton.embedding, skeleton.head)}
    others = [name for name, shape in shapes.items() if name not in inside and len(shape) > 1 and name not in tables]
    strange = [name for name in shapes if name not in inside and name.startswith(layers.prefix)]
    if others or strange:
        return None
    unused = frozenset(unused_head(checkpoint.config, checkpoint.tensors))
    return PlainCheckpoint(checkpoint, checkpoint.main_dtype, linears, places, unused)


def write_straight(
    plain: PlainCheckpoint, label: str, levels: Sequence[CheckpointLevel], build: Build, work: Work
) -> list[CheckpointReport]:
    """Write ``build.out/<label>-<LEVEL>/`` for every level; what is already there, made of the same files, is checked
    and kept.

    Raises:
        UsageError: a level does not fit the model's shapes, or a folder is there that is not ours.
        NothingFits: too little memory or disk.
        BadWeights: a weight is not finite, or too large for the format.
        BadInput: the source changed meanwhile.
        OutputError: no room, or a written file that does not hold what was computed.
    """
    for level in levels:
        level.format.check_shapes(level.name, plain.places)
    work.journal.warn(*map(unused_note, sorted(plain.left_out)))
    job = _Straight(plain, label, levels, build, work)
    if job.missing:
        try:
            with forecast(job.need, work.journal, build.out):
                job.run(work.progress)
        finally:
            for folder in job.missing.values():
                folder.close()
    return [job.report(level, work.progress) for level in levels]


@dataclass
class _Target:
    """A level that is being written."""

    level: CheckpointLevel
    form: CheckpointFormat
    folder: CheckpointFolder
    places: PlacedTensors | None = None
    hashes: dict[str, Any] = field(default_factory=dict)
    """Of what was written, by tensor."""


class _Straight:
    """The job, planned but not begun."""

    def __init__(
        self, plain: PlainCheckpoint, label: str, levels: Sequence[CheckpointLevel], build: Build, work: Work
    ) -> None:
        self._plain, self._threads = plain, work.threads
        # Pieces side by side, each in one thread, which none of the others waits for.
        self._rounding = ThreadPoolExecutor(max(1, work.threads), initializer=numba.set_num_threads, initargs=(1,))
        self._source = plain.checkpoint.folder
        self._companions: Companions = companions_of_folder(self._source)
        usual = {level: build.out / f"{label}-{level.name}" for level in levels}
        is_there = any(path.exists() for path in usual.values()) or bool(build.folders)
        self._identity = identity_of_files(plain.checkpoint, work.progress) if is_there else ""
        self._folders: dict[CheckpointLevel, CheckpointFolder] = {}
        for level in levels:
            fingerprint = self._fingerprint(level) if self._identity else self._provisional(level)
            kept = kept_by_evidence(work.journal)
            target = place_of_level(usual[level], fingerprint, build.folders, kept) if is_there else usual[level]
            self._folders[level] = CheckpointFolder(
                target, fingerprint, self._identity, inputs=[self._source], force=build.force
            )
        self.missing = {level: one for level, one in self._folders.items() if not one.is_complete()}
        count = sum(math.prod(shape) for shape in plain.linears.values())
        size = sum(self._planned(level) for level in self.missing)
        cores = max(1, work.threads)
        seconds = WALK_START_S + plain.checkpoint.nbytes / 1e9 + len(self.missing) * count / (_RATE * cores)
        self.predicted = Preflight(seconds, BASE_BYTES + _LIBRARIES, size)
        names = ", ".join(level.name for level in self.missing)
        self.need = JobNeed(f"write {names}", self.predicted.ram_bytes, 0, size, seconds, Basis.ASSUMED, "straight")

    def _fingerprint(self, level: CheckpointLevel) -> str:
        return fingerprint_of_files(self._identity, level, FLOAT_TYPES[self._plain.dtype])

    def _provisional(self, level: CheckpointLevel) -> str:
        """What partial work is known by before the source's bytes are: their files' sizes and times."""
        states = [
            (path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            for path in self._plain.checkpoint.shards
            for stat in [path.stat()]
        ]
        return hashlib.sha256(repr((__version__, level.name, self._plain.dtype, states)).encode()).hexdigest()

    def _planned(self, level: CheckpointLevel) -> int:
        form = level.format
        floats = sum(one.nbytes for one in self._plain.checkpoint.tensors if one.name not in self._plain.linears)
        return floats + sum(form.stored_bytes(*shape) for shape in self._plain.linears.values())

    def run(self, progress: Progress) -> None:
        """Write what is missing."""
        keep_freed_memory()
        started, checkpoint = time.monotonic(), self._plain.checkpoint
        targets = []
        for level, folder in self.missing.items():
            assert isinstance(level.format, CheckpointFormat)
            folder.begin()
            targets.append(_Target(level, level.format, folder))
        done = self._done(targets)
        hashing = FollowingHash(checkpoint.shards)
        total, passed = checkpoint.nbytes, 0
        names: dict[CheckpointLevel, list[list[str]]] = {target.level: [] for target in targets}
        checked = _Background(1)
        try:
            for number, shard in enumerate(checkpoint.shards):
                if number < done:
                    for target in targets:
                        held = read_safetensors_header(target.folder.layer_file(number))
                        names[target.level].append([one.name for one in held])
                else:
                    what = f"{', '.join(level.name for level in self.missing)}: shard {number + 1}"
                    began, at = time.monotonic(), passed
                    for size in self._shard(number, shard, targets, hashing):
                        progress(what, at + size, total)
                    for target in targets:
                        names[target.level].append(list(target.hashes))
                        checked.do(self._check, number, shard, target, target.hashes, began)
                passed += sum(tensor.nbytes for tensor in read_safetensors_header(shard))
                hashing.advance(number + 1, 0)
            checked.wait()
            hashing.result()
        finally:
            self._rounding.shutdown(cancel_futures=True)
            checked.close()
            hashing.abandon()
        self._identity = self._identity or identity_of_files(checkpoint, progress)
        for target in targets:
            measured = Preflight(time.monotonic() - started, system.peak_memory(), self.predicted.disk_bytes)
            self._finish(target, names[target.level], measured)

    def _done(self, targets: Sequence[_Target]) -> int:
        """Shards that an earlier run finished, of all levels."""
        done = min(
            sum(1 for one in target.folder.finished() if target.folder.layer_file(one.layer).exists())
            for target in targets
        )
        for target in targets:
            target.folder.truncate(done)
        return done

    def _shard(self, number: int, shard: Path, targets: Sequence[_Target], hashing: FollowingHash) -> Iterator[int]:
        """Write what a shard becomes in every level; gives the bytes of its tensors that are done."""
        done = 0
        with ExitStack() as stack:
            for target in targets:
                stack.enter_context(writing(target.folder.partial))
                outputs = list(self._outputs(shard, target))
                target.hashes = {one.name: hashlib.sha256() for one in outputs}
                target.places = stack.enter_context(placed_safetensors(target.folder.layer_file(number), outputs))
            writer = _Background(self._threads + 2)
            stack.callback(writer.close)
            for tensor, start, place, raw in _ahead(_pieces(shard, self._plain)):
                hashing.feed(number, place, raw.data)
                if tensor.name not in self._plain.linears:
                    for target in targets:
                        writer.do(self._keep, target, tensor, start, raw)
                else:
                    weights = _f32(raw, tensor)
                    for target in targets:
                        rounded = self._rounding.submit(self._rounded, target, tensor.name, weights)
                        writer.do(self._put_rows, target, tensor.name, start, len(weights), rounded)
                done += raw.nbytes
                yield done
            writer.wait()

    def _linears_of(self, shard: Path) -> list[str]:
        names = (tensor.name for tensor in self._plain.tensors(shard))
        return [name.removesuffix(".weight") for name in names if name in self._plain.linears]

    def _outputs(self, shard: Path, target: _Target) -> Iterator[CheckpointTensor]:
        """The tensors of a level's shard, from the shapes alone: a few rows of zeros show how arrays look."""
        together = target.form.outputs_together
        looks: dict[int, list[tuple[str, str, tuple[int, ...]]]] = {}
        for tensor in self._plain.tensors(shard):
            if tensor.name not in self._plain.linears:
                size = math.prod(tensor.shape) * DTYPE_BYTES[self._plain.dtype]
                yield CheckpointTensor(tensor.name, self._plain.dtype, tensor.shape, size)
                continue
            outputs, inputs = self._plain.linears[tensor.name]
            if inputs not in looks:
                arrays = self._arrays(target, np.zeros((together, inputs), np.float32))
                looks[inputs] = [(suffix, _type_of(one), tuple(one.shape)) for suffix, one in arrays.items()]
            for suffix, kind, (rows, *rest) in looks[inputs]:
                shape = (rows * outputs // together, *rest)
                name = f"{tensor.name.removesuffix('.weight')}.{suffix}"
                yield CheckpointTensor(name, kind, shape, math.prod(shape) * DTYPE_BYTES[kind])

    def _arrays(self, target: _Target, weights: F32) -> dict[str, torch.Tensor]:
        """Some rows as they are stored: codes to nearest on searched scales, as ``levels.methods.ROUNDING`` has it."""
        dtype = FLOAT_TYPES[self._plain.dtype]
        found = target.form.search(weights, None, scale_dtype=SCALE_DTYPES[dtype])
        arrays = target.form.encode(found.nearest(weights), found)
        return {suffix: stored_array(target.form, suffix, one, dtype) for suffix, one in arrays.items()}

    def _rounded(self, target: _Target, weight: str, weights: F32) -> dict[str, torch.Tensor]:
        with naming(None, weight.removesuffix(".weight")):
            return self._arrays(target, weights)

    def _put_rows(
        self, target: _Target, weight: str, start: int, count: int, rounded: Future[dict[str, torch.Tensor]]
    ) -> None:
        for suffix, one in rounded.result().items():
            data = one.contiguous().view(torch.uint8).numpy().reshape(-1)
            self._put(target, f"{weight.removesuffix('.weight')}.{suffix}", start * data.nbytes // count, data)

    def _keep(self, target: _Target, tensor: CheckpointTensor, start: int, raw: NDArray[np.uint8]) -> None:
        """What stays float, in the float type of the level."""
        at = start * DTYPE_BYTES[tensor.dtype]
        if tensor.dtype != self._plain.dtype:
            held = torch.from_numpy(raw).view(FLOAT_TYPES[tensor.dtype]).to(FLOAT_TYPES[self._plain.dtype])
            raw, at = held.view(torch.uint8).numpy(), start * DTYPE_BYTES[self._plain.dtype]
        self._put(target, tensor.name, at, raw)

    @staticmethod
    def _put(target: _Target, name: str, at: int, data: NDArray[np.uint8]) -> None:
        assert target.places is not None
        target.places.write(name, at, data.data)
        target.hashes[name].update(data.data)

    def _check(self, number: int, shard: Path, target: _Target, hashes: Mapping[str, Any], began: float) -> None:
        """Read a shard back and note that it is done; raises OutputError where it is not what was written."""
        path, made = target.folder.layer_file(number), {name: one.hexdigest() for name, one in hashes.items()}
        wrong = next((name for name, found in tensor_hashes(path) if made[name] != found), None)
        if wrong is not None:
            raise OutputError(
                f"{path}: {wrong} does not hold what was computed.",
                means="The disk or the memory of this machine made an error, or the file was changed meanwhile.",
                do="Run again; if it happens twice, check the disk.",
            )
        notes = []
        for name in self._linears_of(shard):
            prefix = f"{name}."
            stored = {key.removeprefix(prefix): found for key, found in made.items() if key.startswith(prefix)}
            notes.append({"tensor": name, "loss": None, "tokens": 0, "damp": 0.0, "note": "", "stored": stored})
        with writing(target.folder.partial):
            target.folder.note_layer(number, notes, seconds=time.monotonic() - began)

    def _finish(self, target: _Target, names: Sequence[Sequence[str]], measured: Preflight) -> None:
        folder, level = target.folder, target.level
        dtype = FLOAT_TYPES[self._plain.dtype]
        entries = folder.finished()
        linears = tuple(LinearLoss(note["tensor"], float("nan"), 0) for one in entries for note in one.tensors)
        manifest = manifest_of(
            folder, level, linears, entries, text=None, predicted=self.predicted, measured=measured, notes=(),
        )  # fmt: skip
        config = with_quantization(self._companions, level, dtype, ignored=("lm_head",))
        beside = self._companions.files | level.format.files(config["quantization_config"])
        total = sum(
            tensor.nbytes
            for number in range(len(names))
            for tensor in read_safetensors_header(folder.layer_file(number))
        )
        folder.source_sha256 = self._identity
        fingerprint = self._fingerprint(level)
        folder.finish_shards(names, total, config, beside, {**manifest, "fingerprint": fingerprint})
        folder.fingerprint = fingerprint

    def report(self, level: CheckpointLevel, progress: Progress) -> CheckpointReport:
        """Of a folder that is in its place; one that was there before is read back."""
        folder = self._folders[level]
        prompts: dict[str, list[int]] = {text: [] for text in _PROMPTS}
        if level not in self.missing:
            progress(f"{level.name}: reading back what was written", 0, 1)
            return proved(folder, level, checkpoint=self._source, template=None, prompts=prompts)
        return same_reading(folder, checkpoint=self._source, template=None, prompts=prompts)


_PROMPTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "def add(a, b):\n    return a + b  # ∑ π ≈ 3.14",
    "Grüße, 世界! ¿Qué tal? 🙂",
)
"""Texts that a copied tokenizer must read as the source's does."""


def _pieces(shard: Path, plain: PlainCheckpoint) -> Iterator[tuple[CheckpointTensor, int, int, NDArray[np.uint8]]]:
    """The bytes of a shard's tensors, some whole rows of a matrix at a time: the number of the first row, of other
    tensors of the first value, and where in the file they begin. The system need not keep them: a source that fills the
    memory makes it look for room for every page, which took a third of the processor's time."""
    headers = read_safetensors_header(shard)
    at = shard.stat().st_size - sum(tensor.nbytes for tensor in headers)
    with open_regular(shard) as file:
        for tensor in headers:
            if tensor.name not in plain.left_out:
                columns = tensor.shape[-1] if tensor.name in plain.linears else 1
                rows = tensor.shape[0] if tensor.name in plain.linears else math.prod(tensor.shape)
                step = max(128, _PIECE // columns // 128 * 128)
                for start in range(0, rows, step):
                    size = min(step, rows - start) * columns * DTYPE_BYTES[tensor.dtype]
                    place = at + start * columns * DTYPE_BYTES[tensor.dtype]
                    file.seek(place)
                    raw = np.empty(size, np.uint8)
                    if file.readinto(raw.data) != size:  # type: ignore[attr-defined]
                        raise BadFile(f"{shard} ends within '{tensor.name}'.", do="Fetch the file again.")
                    system.drop_cached(file.fileno(), place, size)
                    yield tensor, start, place, raw
            at += tensor.nbytes


def _f32(raw: NDArray[np.uint8], tensor: CheckpointTensor) -> F32:
    values = torch.from_numpy(raw).view(FLOAT_TYPES[tensor.dtype]).float().numpy().reshape(-1, tensor.shape[-1])
    if not np.isfinite(values.sum()) and not np.isfinite(values).all():
        raise BadWeights(
            f"{tensor.name} holds NaN or infinity.",
            means="The checkpoint is damaged, or was saved while training diverged.",
            do="Fetch it again, or give another one.",
        )
    return np.asarray(values, np.float32)


def _type_of(tensor: torch.Tensor) -> str:
    """As safetensors calls it."""
    name = str(tensor.dtype).removeprefix("torch.")
    floats = {str(dtype).removeprefix("torch."): own for own, dtype in FLOAT_TYPES.items()}
    return ({**_STORED, **_TORCH} | floats)[name]


def _ahead(items: Iterable[_T]) -> Iterator[_T]:
    """The same items, each fetched while the one before is in use."""
    each = iter(items)
    end = object()
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[Any] = pool.submit(next, each, end)
        while (found := waiting.result()) is not end:
            waiting = pool.submit(next, each, end)
            yield found


class _Background:
    """Calls made one after another in a thread, a few at most waiting."""

    def __init__(self, most: int = 12) -> None:
        self._pool, self._most = ThreadPoolExecutor(1), most
        self._waiting: deque[Future[Any]] = deque()

    def close(self) -> None:
        """What has not begun is left out."""
        self._pool.shutdown(cancel_futures=True)

    def do(self, call: Any, *arguments: Any) -> None:
        """Call it later; what an earlier call raised is raised here."""
        self._waiting.append(self._pool.submit(call, *arguments))
        while len(self._waiting) > self._most:
            self._waiting.popleft().result()

    def wait(self) -> None:
        """Until all is done."""
        while self._waiting:
            self._waiting.popleft().result()
