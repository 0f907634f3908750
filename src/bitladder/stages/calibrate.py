"""Everything that is made from a calibration text, from one walk: GPTQ, AWQ and INT8 checkpoints, the scales of
AWQ's K-quants, importance matrices.

The text is checked, what it will take is said, statistics are gathered as states pass through the layers
(``walk/checkpoint_walk.py``) and finished layers go to disk at once; a killed run goes on at the last layer that was
finished. Before a folder is reported it is opened again, decoded and compared with what the walk computed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder import __version__, system
from bitladder.describe.text import Document, text_hash
from bitladder.describe.windows import Window, tokens_hash
from bitladder.executors import Executor
from bitladder.files.checkpoint import Checkpoint, read_checkpoint
from bitladder.files.checkpoint_folder import CheckpointFolder, fingerprint_of
from bitladder.files.companions import Companions, companions_of_folder, companions_of_gguf
from bitladder.files.decoded import FloatView
from bitladder.files.gguf import GgufFile
from bitladder.files.hashing import file_sha256
from bitladder.files.imatrix import ImportanceMatrix
from bitladder.files.layer_store import LayerStore
from bitladder.files.staging import data_files
from bitladder.files.vector_file import VectorFile, folds_of, importance_of_vectors
from bitladder.kernels.awq import Fold
from bitladder.levels import CheckpointLevel, FoldedLevel
from bitladder.levels.products import Product, statistics_of
from bitladder.plan.calibration import CalibrationWork, predict
from bitladder.plan.calibration_text import check_text
from bitladder.plan.preflight import LOOKED_AT, JobNeed
from bitladder.progress import Progress, silent
from bitladder.records.calibration import (
    CalibrationReport,
    CalibrationText,
    CheckpointReport,
    FoldedScales,
    LayerCoverage,
    LinearLoss,
    Preflight,
)
from bitladder.records.coverage import coverage, coverage_of_counts
from bitladder.records.reading import from_json
from bitladder.records.recipe import Tuning
from bitladder.report.recipe import tuning_line
from bitladder.stages.curvature import curvature_seconds, kept_curvatures
from bitladder.stages.forecast import largest_layer, with_tuning
from bitladder.stages.model_route import route_of
from bitladder.stages.tuning import Tuner
from bitladder.units import Basis
from bitladder.walk.checkpoint_result import finish_folder, losses_of, proved
from bitladder.walk.checkpoint_walk import FLOAT_TYPES, CalibrationWalk, Settings
from bitladder.walk.ends import REVISION as ENDS_REVISION
from bitladder.walk.layers import LayeredModel
from bitladder.walk.opened import layered
from bitladder.walk.spread import spread_over
from bitladder.walk.states import SHARD_TOKENS
from bitladder.walk.tuned_checkpoint import StoredLevel
from bitladder.walk.tuning import TuneSettings
from bitladder.walk.weights import FileWeights
from bitladder.walk.whole import WholeModel


@dataclass(frozen=True)
class Reading:
    """The text that a walk reads, and what must hold for it."""

    windows: Sequence[Window]
    """May be empty where only INT8 without smoothing is asked for."""
    documents: Sequence[Document] = ()
    """What ``windows`` were cut from, to say what it is."""
    measuring: Sequence[Window] = ()
    """What levels will be measured on, to prove that calibration never saw it."""
    allow_overlap: bool = False
    """Go on although calibration and measuring text overlap."""
    prompts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Texts and their ids by the source's tokenizer, which a written folder's must give too."""
    tuning: Sequence[Window] = ()
    """A text that no code is fitted to: with it scales of checkpoint levels are tuned (``stages.tuning``)."""
    text_key: str = ""
    """What tells the tokens of ``documents`` from others'; by default the documents' hash."""

    @property
    def hash(self) -> str:
        """What tells this text from others."""
        return self.text_key or text_hash(self.documents) if self.documents else tokens_hash(self.windows)


@dataclass(frozen=True)
class Calibrated:
    """What came of a walk."""

    report: CalibrationReport
    checkpoints: list[CheckpointReport] = field(default_factory=list)
    folds: dict[str, dict[str, Fold]] = field(default_factory=dict)
    """Folds by level and tensor."""
    importance: ImportanceMatrix | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    """By checkpoint level: a hash over everything that its bytes depend on."""
    kept: frozenset[str] = frozenset()
    """Names of what was there already."""
    tuned: dict[str, Tuning] = field(default_factory=dict)
    """What came of tuning, by checkpoint level that was made."""


class Calibration:
    """A walk that is planned but not begun: ``need`` says what it will take, ``run`` does it.

    It writes ``out_dir/<name>-<LEVEL>/`` for every checkpoint level and gathers vectors for everything else. What is
    already there, made of the same source, text and settings, is checked and kept.
    """

    def __init__(
        self,
        source: GgufFile,
        wanted: Sequence[Product],
        reading: Reading,
        *,
        out_dir: Path,
        name: str,
        checkpoint: Path | None = None,
        settings: Settings | None = None,
        force: bool | None = None,
        folders: Sequence[Path] = (),
        is_kept: Callable[[Path], bool] = lambda _: False,
        executor: Executor | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Check everything that can be checked before the work.

        Args:
            source: The model; a checkpoint's GGUF twin, or a GGUF file of its own.
            wanted: Checkpoint levels, folded levels, importance vectors.
            reading: The calibration text.
            out_dir: Made if it is not there.
            name: The model's name in the folders' names.
            checkpoint: The original checkpoint folder, whose configuration and tokenizer are copied.
            settings: Damping, order, memory, device.
            force: Replace folders that Bitladder made of other sources; None where the user has no say.
            folders: Where else checkpoint levels may lie already, under any name.
            is_kept: Whether a checkpoint folder must not be replaced; a level whose name it has is written beside it,
                as ``<name>-<LEVEL>.<tag>``.
            executor: Computes the walk's units; they are computed here by default. The bytes do not depend on it.
            warn: Told where workers cannot read the source.

        Raises:
            UsageError: a level does not fit the model's shapes, or a folder is there that is not ours or of another
                source.
            BadInput: too little or overlapping text, token ids that the model does not have, a missing tokenizer.
            BadFile, UnknownArchitecture: the model cannot be walked.
        """
        self.source, self.reading, self._checkpoint = source, reading, checkpoint
        self._executor, self._warn = executor, warn
        self._settings = settings or Settings()
        levels = list(dict.fromkeys(wanted))
        self._text = _checked_text(source, levels, reading)
        weights = FileWeights(source, threads=self._settings.threads)
        model = layered(source, weights, device=self._settings.device, checkpoint=checkpoint)
        model.check_disk_names(
            form for level in levels if isinstance(level, CheckpointLevel) for form in level.format.forms
        )
        view = FloatView(read_checkpoint(checkpoint)) if checkpoint else None
        held = view.main_dtype if view is not None else "F16"
        dtype = FLOAT_TYPES.get(held, torch.float16)
        self._stores: dict[Product, LayerStore] = {}
        inputs = [header.path for header in source.headers] + ([checkpoint] if checkpoint else [])
        for level in levels:
            if isinstance(level, CheckpointLevel):
                identity = source.sha256
                fingerprint = _fingerprint(source, level, reading, self._settings, dtype)
                if (
                    view is not None and not _needs_text(level) and not tunes(level, reading)
                ):  # it may be made of the folder alone (``straight``)
                    identity = identity_of_files(view.checkpoint)
                    fingerprint = fingerprint_of_files(identity, level, dtype)
                target = place_of_level(out_dir / f"{name}-{level.name}", fingerprint, folders, is_kept)
                self._stores[level] = CheckpointFolder(target, fingerprint, identity, inputs=inputs, force=force)
            else:
                self._stores[level] = vector_file(source, level, reading.hash, self._settings)
        self._missing = {level: store for level, store in self._stores.items() if not store.is_complete()}
        self._walk = CalibrationWalk(model, weights, self._missing, dtype, self._settings, curvature=self._curvature)
        self._shapes = self._walk.shapes()
        for level in levels:
            if isinstance(level, CheckpointLevel):
                ends = self._walk.ends() if level.format.everywhere else {}
                level.format.check_shapes(level.name, self._shapes | ends)
        self._tuned: dict[str, Tuning] = {}
        self._companions: Companions | None = None
        if any(isinstance(level, CheckpointLevel) for level in self._missing):
            self._companions = _companions(source, model, checkpoint)
        self._walking = self._predict() if self._missing else None

    @property
    def need(self) -> JobNeed | None:
        """What the walk will take; None where everything is there already."""
        if self._walking is None:
            return None
        names = ", ".join(level.name for level in self._missing)
        seen = self._walking
        what = f"calibrate {names} on {self._tokens} tokens"
        need = JobNeed(what, seen.ram_bytes, 0, seen.disk_bytes, seen.seconds, Basis.MEASURED, "calibrate")
        if self._everywhere():
            half = self._settings.half_products
            found = curvature_seconds(self.source, self.reading.windows, half=half)
            need = replace(need, seconds=need.seconds + found)
        for level in self._missing:
            if isinstance(level, CheckpointLevel) and tunes(level, self.reading):
                need = with_tuning(need, self.source, self._numbers(level), self.reading.tuning)
        return need

    @property
    def _predicted(self) -> Preflight | None:
        """What walk and tuning will take."""
        need = self.need
        return None if need is None else Preflight(need.seconds, need.ram_bytes, need.disk_bytes)

    def run(self, progress: Progress = silent) -> Calibrated:
        """Do what is not done yet, and read everything back.

        Raises:
            BadWeights: weights or activations are not finite.
            OutputError: no room, or a written file that does not decode to what was computed.
        """
        measured = None
        predicted = self._predicted
        if predicted is not None:
            started = time.monotonic()
            try:
                with spread_over(self._executor, self.source, self._checkpoint, self._warn) as spread:
                    self._walk.run(self.reading.windows, progress, spread)
                self._tune(progress)
                measured = self._finished(predicted, started)
            finally:
                for store in self._missing.values():
                    store.close()
        return self._collected(predicted, measured, progress)

    def _everywhere(self) -> list[LayerStore]:
        """Where levels are made whose embedding and head are quantized, too."""
        return [
            store
            for level, store in self._missing.items()
            if isinstance(level, CheckpointLevel) and level.format.everywhere
        ]

    def _curvature(self, progress: Progress) -> NDArray[np.float64]:
        """What codes of the embedding are fitted under."""
        walk, settings = self._walk, self._settings
        return kept_curvatures(
            self.source, walk.model, walk.weights, self.reading.windows, half=settings.half_products,
            state_bytes=settings.state_bytes, spill=self._everywhere()[0].partial, progress=progress,
        ).embedding  # fmt: skip

    def _numbers(self, level: CheckpointLevel) -> int:
        """How many numbers of a level can move, at most."""
        weights = sum(one.elements for one in self.source.model.tensors if one.name.startswith("blk."))
        return max(weights * len(form.tunable) // (form.group_size or 1024) for form in level.format.forms)

    def _tune(self, progress: Progress) -> None:
        """Tune the scales of levels that are made but not finished."""
        walk, settings = self._walk, self._settings
        for level, store in self._missing.items():
            if isinstance(level, CheckpointLevel) and tunes(level, self.reading):
                stored = StoredLevel(walk.model, walk.weights, level.format, store)
                tuner = Tuner(
                    walk.model, walk.weights, self.reading.tuning, settings.half_products, settings.state_bytes,
                    spill=store.partial, notes=store.partial, key=store.fingerprint, progress=progress,
                    settings=TuneSettings.for_windows(len(self.reading.tuning)),
                )  # fmt: skip
                self._tuned[level.name] = tuner.stored(stored)

    @property
    def _tokens(self) -> int:
        return sum(len(window.tokens) for window in self.reading.windows)

    def _predict(self) -> Preflight:
        """Time, memory and disk; a product of matrices is timed to know the machine."""
        model = self.source.model
        work = CalibrationWork(
            self._shapes,
            n_layer=model.dims.n_layer,
            n_embd=model.dims.n_embd,
            other_weights=sum(one.elements for one in model.tensors if not one.name.startswith("blk.")),
            tokens=self._tokens,
            reference_tokens=self._settings.reference_tokens,
            cores=self._settings.threads,
            counts=self._walk.counts(),
            routed=model.dims.n_expert_used / model.dims.n_expert if model.dims.n_expert else 1.0,
            layer_weights=largest_layer(model),
            looks=LOOKED_AT if isinstance(self._walk.model, WholeModel) else 0.0,
            shards=self._tokens // SHARD_TOKENS,
        )
        settings = self._settings
        own = torch.bfloat16 if settings.half_products else torch.float32
        return predict(
            list(self._missing),
            work,
            flops_per_s=_product_rate(settings.device, torch.float32),
            pass_flops_per_s=_product_rate(settings.device, own),
            state_bytes=settings.state_bytes,
        )

    def _finished(self, predicted: Preflight, started: float) -> Preflight:
        """Put the walk's results in place; returns what it took."""
        partial = sum(_size(store.partial) for store in self._missing.values())
        largest = 0
        for level, store in self._missing.items():
            if isinstance(store, VectorFile):
                store.finish({"linears": [asdict(loss) for loss in losses_of(store)]})
            elif isinstance(store, CheckpointFolder) and isinstance(level, CheckpointLevel) and self._companions:
                finish_folder(
                    store, level, self._walk, self._companions,
                    text=self._text if _needs_text(level) else None,
                    predicted=predicted,
                    measured=Preflight(time.monotonic() - started, system.peak_memory(), partial),
                    from_gguf=self._checkpoint is None,
                    notes=[tuning_line(self._tuned[level.name])] if level.name in self._tuned else [],
                )  # fmt: skip
                largest = max(largest, _size(store.target))
        return Preflight(time.monotonic() - started, system.peak_memory(), partial + largest)

    def _collected(self, predicted: Preflight | None, measured: Preflight | None, progress: Progress) -> Calibrated:
        """Everything that was asked for, read back from where it lies."""
        checkpoints, folded = [], []
        folds: dict[str, dict[str, Fold]] = {}
        importance = None
        reached: tuple[LayerCoverage, ...] = ()
        template = self.source.metadata.get("tokenizer.chat_template")
        prompts = self.reading.prompts
        for level, store in self._stores.items():
            if isinstance(store, CheckpointFolder) and isinstance(level, CheckpointLevel):
                progress(f"{level.name}: reading back what was written", 0, 1)
                report = proved(store, level, checkpoint=self._checkpoint, template=template, prompts=prompts)
                checkpoints.append(report)
                progress(f"{level.name}: reading back what was written", 1, 1)
                reached = reached or (report.coverage if _needs_text(level) else ())
            elif isinstance(store, VectorFile) and isinstance(level, FoldedLevel):
                folds[level.name] = folds_of(store.vectors())
                folded.append(_scales(level, store, folds[level.name]))
                reached = reached or coverage(folded[-1].linears)
            elif isinstance(store, VectorFile):
                importance = importance_of_vectors(store.vectors(), dataset="calibration text")
                reached = coverage_of_counts(importance.counts)
        whole = CalibrationReport(self._text, reached, predicted, measured, tuple(folded))
        fingerprints = {
            level.name: store.fingerprint for level, store in self._stores.items() if isinstance(level, CheckpointLevel)
        }
        kept = frozenset(level.name for level in self._stores if level not in self._missing)
        return Calibrated(whole, checkpoints, folds, importance, fingerprints, kept, self._tuned)


def place_of_level(usual: Path, fingerprint: str, folders: Sequence[Path], is_kept: Callable[[Path], bool]) -> Path:
    """Where a checkpoint level lies, or is to be written: under its name, beside a folder of that name that must stay,
    or under any name in ``folders``."""
    beside = usual.with_name(f"{usual.name}.{fingerprint[:8]}")
    known = (path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_dir())
    there = next((place for place in (usual, beside, *known) if fingerprint_of(place) == fingerprint), None)
    if there is not None:
        return there
    return beside if fingerprint_of(usual) and is_kept(usual) else usual


def vector_file(source: GgufFile, level: Product, texts: str, settings: Settings | None = None) -> VectorFile:
    """Where the vectors of a level and a text (by its hash) are kept."""
    tokens = (settings or Settings()).reference_tokens
    return VectorFile(level.name, source.sha256, texts, f"{tokens} {route_of(source)}")


def _needs_text(level: Product) -> bool:
    return statistics_of(level).needs_text


def _checked_text(source: GgufFile, levels: Sequence[Product], reading: Reading) -> CalibrationText | None:
    """The text's description; None where no level needs any."""
    if not any(_needs_text(level) for level in levels):
        return None
    return check_text(
        reading.windows,
        n_vocab=source.model.dims.n_vocab,
        documents=reading.documents,
        measuring=reading.measuring,
        allow_overlap=reading.allow_overlap,
    )


def _scales(level: FoldedLevel, store: VectorFile, folds: Mapping[str, Fold]) -> FoldedScales:
    """What is reported of a folded level's scales."""
    linears = from_json(tuple[LinearLoss, ...], store.manifest().get("linears"))
    return FoldedScales(level.name, linears, sum(fold.columns is not None for fold in folds.values()))


def _product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second in a product of matrices."""
    n = 512
    matrix = torch.ones(n, n, device=device, dtype=dtype)
    torch.mm(matrix, matrix)
    started = time.perf_counter()
    for _ in range(4):
        float(torch.mm(matrix, matrix)[0, 0])
    return 4 * 2 * n**3 / (time.perf_counter() - started)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def identity_of_files(checkpoint: Checkpoint, progress: Progress = silent) -> str:
    """What tells a checkpoint from others: names and hashes of its weights and of what is copied beside them."""
    files = sorted({*data_files(checkpoint.folder), *checkpoint.shards})
    parts = (part for path in files for part in (path.name, file_sha256(path, progress)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def fingerprint_of_files(identity: str, level: CheckpointLevel, dtype: torch.dtype) -> str:
    """Everything that the bytes of a level depend on that needs no text, of a checkpoint with this identity."""
    return _hashed([__version__, identity, level.name, str(dtype), level.method.revision, *_signature(level)])


def tunes(level: CheckpointLevel, reading: Reading) -> bool:
    """Whether a level's scales are tuned: there is a text for it, and they are floats."""
    return bool(reading.tuning) and any(form.tunable for form in level.format.forms)


def _fingerprint(
    source: GgufFile, level: CheckpointLevel, reading: Reading, settings: Settings, dtype: torch.dtype
) -> str:
    """Everything that a level's bytes depend on."""
    parts = [__version__, source.sha256, level.name, str(dtype), level.method.revision, *_signature(level)]
    if _needs_text(level):
        parts += [
            tokens_hash(reading.windows),
            str(settings.reference_tokens),
            str(settings.damp),
            str(settings.act_order),
        ]
        parts.append(str(settings.half_products))  # a run must not go on on another processor, half in bfloat16
    if level.format.everywhere:
        parts.append(ENDS_REVISION)
    if tunes(level, reading):
        tuning = TuneSettings.for_windows(len(reading.tuning))
        parts += [tokens_hash(reading.tuning), tuning.key, str(settings.half_products)]
    return _hashed(parts)


def _signature(level: CheckpointLevel) -> list[str]:
    return [level.format.signature] if level.format.signature else []


def _hashed(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _companions(source: GgufFile, model: LayeredModel, checkpoint: Path | None) -> Companions:
    if checkpoint is not None:
        return companions_of_folder(checkpoint)
    pre = str(source.metadata.get("tokenizer.ggml.pre", ""))
    return companions_of_gguf(source.path, pre=pre, tied=model.output == model.embedding)
