"""GPTQ, AWQ and INT8 checkpoints of a model: the text is checked, one walk builds all levels, each folder is
proved.

Statistics are gathered as states pass through the layers (``engines/streams.py``) and finished layers go to
disk at once; a killed run goes on at the last layer that was finished. Before a folder is reported it is
opened again, decoded and compared with what the walk computed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bitladder import __version__
from bitladder.describe.windows import Window, window_hashes
from bitladder.engines.checkpoint_walk import CheckpointWalk, Settings
from bitladder.engines.layers import LayeredModel
from bitladder.engines.weights import FileWeights
from bitladder.errors import BadInput, OutputError
from bitladder.files.checkpoint import read_checkpoint
from bitladder.files.checkpoint_check import verify_folder
from bitladder.files.checkpoint_folder import CheckpointFolder
from bitladder.files.companions import Companions, companions_of_folder, companions_of_gguf
from bitladder.files.gguf import GgufFile
from bitladder.formats import disk_names
from bitladder.formats.checkpoint import (
    LAYOUTS,
    CheckpointLevel,
    check_shapes,
    parse_level,
    quantization_config,
    serving_notes,
)
from bitladder.plan.calibration import predict
from bitladder.progress import Progress, silent
from bitladder.records.calibration import CalibrationText, CheckpointReport, LinearLoss, Preflight
from bitladder.units import human_bytes

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_LEAST_TOKENS = 1024
_WORDS = 32
"""Tokens in a run that, found in both texts, betrays an overlap."""


def quantize_checkpoints(
    source: GgufFile,
    levels: Sequence[str],
    out_dir: Path,
    windows: Sequence[Window],
    *,
    name: str,
    checkpoint: Path | None = None,
    settings: Settings | None = None,
    measuring: Sequence[Window] = (),
    allow_overlap: bool = False,
    progress: Progress = silent,
) -> list[CheckpointReport]:
    """Write ``out_dir/<name>-<LEVEL>/`` for every level, in the order asked for. A folder that is already
    there, made of the same source, text and settings, is checked and kept.

    Args:
        source: The model; a checkpoint's GGUF twin, or a GGUF file of its own.
        levels: Names that ``formats.checkpoint.parse_level`` knows.
        out_dir: Made if it is not there.
        windows: The calibration text; may be empty where only INT8 without smoothing is asked for.
        name: The model's name in the folders' names.
        checkpoint: The original checkpoint folder, whose configuration and tokenizer are copied.
        settings: Damping, order, memory, device.
        measuring: The windows that levels will be measured on, to prove that calibration never saw them.
        allow_overlap: Go on although calibration and measuring text overlap.
        progress: Told after each layer.

    Raises:
        UnknownLevel, UsageError: a level does not exist or does not fit the model's shapes.
        BadInput: too little or overlapping text, token ids that the model does not have, a missing tokenizer.
        BadWeights, BadFile, UnknownArchitecture: the model cannot be walked.
        OutputError: no room, a folder that is not ours, or a written file that does not decode to what was
            computed.
    """
    started = time.monotonic()
    settings = settings or Settings()
    wanted = list(dict.fromkeys(parse_level(level) for level in levels))
    text = _check_text(source, wanted, windows, measuring, allow_overlap=allow_overlap)
    weights = FileWeights(source, threads=settings.threads)
    model = LayeredModel(source.model, weights, device=settings.device)
    dtype = _DTYPES.get(read_checkpoint(checkpoint).main_dtype if checkpoint else "F16", torch.float16)
    folders = {
        level: CheckpointFolder(out_dir / f"{name}-{level.name}", _fingerprint(source, level, windows, settings, dtype))
        for level in wanted
    }
    missing = {level: folder for level, folder in folders.items() if not folder.is_complete()}
    walk = CheckpointWalk(model, weights, missing, dtype, settings)
    for level in wanted:
        check_shapes(level, walk.shapes())
    if missing:
        _require_space(walk, list(missing), windows, settings, out_dir)
        companions = _companions(source, model, checkpoint)
        walk.run(windows, progress)
        for level, folder in missing.items():
            report = _report(level, folder, text, time.monotonic() - started, from_gguf=checkpoint is None)
            digests = {
                f"{disk_names.LAYERS}{entry.layer}.{linear}": digest
                for entry in folder.finished()
                for linear, digest in entry.record["digests"].items()
            }
            config = _config(companions, level, model, dtype)
            manifest = {"version": __version__, "report": asdict(report), "digests": digests}
            files = {**companions.files, **_method_files(level, config)}
            folder.finish(walk.top(), config, files, manifest)
    return [_proved(level, folder, progress) for level, folder in folders.items()]


def preflight(
    walk: CheckpointWalk, levels: Sequence[CheckpointLevel], windows: Sequence[Window], settings: Settings
) -> Preflight:
    """Time, memory and disk for building ``levels``; a product of matrices is timed to know the machine."""
    file = walk.weights.file
    top = sum(tensor.elements for tensor in file.model.tensors if not tensor.name.startswith("blk."))
    return predict(
        levels,
        walk.shapes(),
        n_layer=walk.model.n_layer,
        n_embd=file.model.dims.n_embd,
        other_weights=top,
        tokens=sum(len(window.tokens) for window in windows),
        reference_tokens=settings.reference_tokens,
        flops_per_s=_product_rate(settings.device),
        state_bytes=settings.state_bytes,
    )


def _product_rate(device: str) -> float:
    """Floating-point operations per second in a product of f32 matrices."""
    n = 512
    matrix = torch.ones(n, n, device=device)
    torch.mm(matrix, matrix)
    started = time.perf_counter()
    for _ in range(4):
        float(torch.mm(matrix, matrix)[0, 0])
    return 4 * 2 * n**3 / (time.perf_counter() - started)


def _require_space(
    walk: CheckpointWalk,
    levels: Sequence[CheckpointLevel],
    windows: Sequence[Window],
    settings: Settings,
    out_dir: Path,
) -> None:
    """Refuse before the work, not after an hour of it."""
    need = preflight(walk, levels, windows, settings).disk_bytes
    free = shutil.disk_usage(out_dir).free
    if free < need:
        raise OutputError(
            f"{', '.join(level.name for level in levels)} need {human_bytes(need)} in {out_dir} while they are made; "
            f"{human_bytes(free)} are free.",
            do="Free some space, choose another --out, or make fewer levels at once.",
        )


def _check_text(
    source: GgufFile,
    levels: Sequence[CheckpointLevel],
    windows: Sequence[Window],
    measuring: Sequence[Window],
    *,
    allow_overlap: bool,
) -> CalibrationText | None:
    """Refuse text that calibration cannot or must not use; None where no level needs any."""
    if not any(level.method != "INT8" or level.smooth for level in levels):
        return None
    lengths = [len(window.tokens) for window in windows]
    if sum(lengths) < _LEAST_TOKENS:
        raise BadInput(
            f"The calibration text has {sum(lengths)} tokens in {len(lengths)} windows; "
            f"at least {_LEAST_TOKENS} are needed.",
            means="Statistics of so few inputs fit the text and not the model's work.",
            do="Give a longer text, 30,000 tokens of several kinds say, or leave it out to use the one that ships.",
        )
    largest = max(int(window.tokens.max()) for window in windows)
    if largest >= source.model.dims.n_vocab:
        raise BadInput(
            f"The calibration text holds token {largest}; the model has {source.model.dims.n_vocab} tokens.",
            means="The tokenizer does not belong to these weights.",
            do="Check that tokenizer files and weights come from the same model.",
        )
    seen = window_hashes(windows, n=_WORDS, step=1) if measuring else set()
    asked = window_hashes(measuring, n=_WORDS)
    overlap = len(asked & seen) / len(asked) if asked else 0.0
    if overlap and not allow_overlap:
        raise BadInput(
            f"{overlap:.1%} of the measuring text also occurs in the calibration text ({_WORDS} tokens in a row).",
            means="A level calibrated on what it is measured on looks better than it is.",
            do="Use different texts, or force it if you know what the figures then mean.",
        )
    return CalibrationText(
        documents=len({window.document for window in windows}),
        windows=len(windows),
        tokens=sum(lengths),
        shortest=min(lengths),
        longest=max(lengths),
        hash=_text_hash(windows),
        overlap=overlap,
    )


def _text_hash(windows: Sequence[Window]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(len(window.tokens).to_bytes(4, "little") + window.tokens.tobytes())
    return digest.hexdigest()


def _fingerprint(
    source: GgufFile, level: CheckpointLevel, windows: Sequence[Window], settings: Settings, dtype: torch.dtype
) -> str:
    """Everything that a level's bytes depend on."""
    parts = [__version__, source.sha256, level.name, str(dtype)]
    if level.method != "INT8" or level.smooth:
        parts += [_text_hash(windows), str(settings.reference_tokens), str(settings.damp), str(settings.act_order)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _companions(source: GgufFile, model: LayeredModel, checkpoint: Path | None) -> Companions:
    if checkpoint is not None:
        return companions_of_folder(checkpoint)
    pre = str(source.metadata.get("tokenizer.ggml.pre", ""))
    return companions_of_gguf(source.path, pre=pre, tied=model.output == model.embedding)


def _config(companions: Companions, level: CheckpointLevel, model: LayeredModel, dtype: torch.dtype) -> dict[str, Any]:
    """The model's configuration with what engines need to know of its quantization."""
    routers: tuple[str, ...] = (
        ("mlp.gate", "mlp.shared_expert_gate", "block_sparse_moe.gate") if model.family.moe else ()
    )
    if LAYOUTS[level.layout].quant_method == "compressed-tensors":  # names are patterns there, elsewhere parts of names
        routers = tuple(f"re:.*{re.escape(name)}$" for name in routers)
    quantization = quantization_config(level, ignored=("lm_head", *routers))
    key = "torch_dtype" if "torch_dtype" in companions.config else "dtype"
    return {**companions.config, key: str(dtype).removeprefix("torch."), "quantization_config": quantization}


def _method_files(level: CheckpointLevel, config: dict[str, Any]) -> dict[str, bytes]:
    """GPTQ readers also look for the quantization in a file of its own."""
    if level.layout not in ("gptq", "gptq_v2"):
        return {}
    return {"quantize_config.json": (json.dumps(config["quantization_config"], indent=2) + "\n").encode()}


def _report(
    level: CheckpointLevel, folder: CheckpointFolder, text: CalibrationText | None, seconds: float, *, from_gguf: bool
) -> CheckpointReport:
    """What was made, before it is put in place."""
    losses = tuple(
        LinearLoss(**{**loss, "name": f"{disk_names.LAYERS}{entry.layer}.{loss['name']}"})
        for entry in folder.finished()
        for loss in entry.record["losses"]
    )
    notes = list(serving_notes(level))
    if from_gguf:
        notes.append("Tokenizer and configuration were made from the GGUF's header; compare them with the original's.")
    if special := [loss for loss in losses if loss.note]:
        notes.append(
            f"{len(special)} of {len(losses)} linear layers were done differently: "
            f"{special[0].name}, {special[0].note}."
        )
    own = text if level.method != "INT8" or level.smooth else None
    return CheckpointReport(level.name, str(folder.target), 0, level.bpw, seconds, own, losses, tuple(notes))


def _proved(level: CheckpointLevel, folder: CheckpointFolder, progress: Progress) -> CheckpointReport:
    """The report of a finished folder, after reading the folder back."""
    progress(f"{level.name}: reading back what was written", 0, 1)
    manifest = folder.manifest()
    verify_folder(folder.target, level, manifest["digests"])
    stored = dict(manifest["report"])
    size = sum(path.stat().st_size for path in folder.target.iterdir())
    text = CalibrationText(**stored["text"]) if stored["text"] else None
    linears = tuple(LinearLoss(**loss) for loss in stored["linears"])
    notes = tuple(stored["notes"])
    progress(f"{level.name}: reading back what was written", 1, 1)
    return CheckpointReport(
        **{**stored, "bytes": size, "path": str(folder.target), "text": text, "linears": linears, "notes": notes}
    )
