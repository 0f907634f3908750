"""A checkpoint folder from a finished walk: what goes beside the weights, the report, and the proof that the folder
holds what was computed and reads text as the source does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bitladder import __version__
from bitladder.errors import OutputError
from bitladder.files.checkpoint_check import verify_folder, verify_stored
from bitladder.files.checkpoint_folder import CheckpointFolder
from bitladder.files.companions import Companions, tokenizer_differences
from bitladder.files.layer_store import FinishedLayer, LayerStore
from bitladder.levels import CheckpointLevel
from bitladder.records.calibration import CalibrationText, CheckpointReport, LinearLoss, Preflight
from bitladder.records.coverage import coverage
from bitladder.records.reading import from_json
from bitladder.walk.checkpoint_walk import CalibrationWalk


def losses_of(store: LayerStore) -> tuple[LinearLoss, ...]:
    """The losses that a store's log has, layer by layer."""
    return tuple(
        from_json(LinearLoss, {**note, "name": note["tensor"]}) for entry in store.finished() for note in entry.tensors
    )


def finish_folder(
    folder: CheckpointFolder,
    level: CheckpointLevel,
    walk: CalibrationWalk,
    companions: Companions,
    *,
    text: CalibrationText | None,
    predicted: Preflight,
    measured: Preflight,
    from_gguf: bool,
    notes: Sequence[str] = (),
) -> None:
    """Put the folder in place, with its configuration, companions, log and report.

    Raises:
        OutputError: no room.
    """
    own = ["Tokenizer and configuration were made from the GGUF's header; compare them with the original's."]
    manifest = manifest_of(
        folder, level, losses_of(folder), folder.finished(), text=text, predicted=predicted, measured=measured,
        notes=[*notes, *(own if from_gguf else [])],
    )  # fmt: skip
    copied = [one.name.removesuffix(".weight") for one in walk.model.copied() if len(one.shape) > 1]
    ignored = ("lm_head", *walk.model.family.routers, *copied)
    config = with_quantization(companions, level, walk.dtype, ignored=ignored)
    beside = companions.files | level.format.files(config["quantization_config"])
    folder.finish(walk.top(quantized=level.format.everywhere), config, beside, manifest)


def manifest_of(
    folder: CheckpointFolder,
    level: CheckpointLevel,
    linears: tuple[LinearLoss, ...],
    layers: Sequence[FinishedLayer],
    *,
    text: CalibrationText | None,
    predicted: Preflight,
    measured: Preflight,
    notes: Sequence[str],
) -> dict[str, Any]:
    """What a folder says of itself whose ``layers`` are made, the report in it."""
    told = [*level.format.notes(), *notes]
    if special := [loss for loss in linears if loss.note]:
        told.append(
            f"{len(special)} of {len(linears)} linear layers were done differently: "
            f"{special[0].name}, {special[0].note}."
        )
    report = CheckpointReport(
        level.name, str(folder.target), 0, level.bpw, measured.seconds, text, linears, tuple(told),
        coverage(linears), predicted, measured,
    )  # fmt: skip
    own = [note for entry in layers for note in entry.tensors]
    digests = {note["tensor"]: note["digest"] for note in own if "digest" in note}
    stored = {f"{note['tensor']}.{suffix}": found for note in own for suffix, found in note.get("stored", {}).items()}
    return {"version": __version__, "report": asdict(report), "digests": digests, "stored": stored}


def with_quantization(
    companions: Companions, level: CheckpointLevel, dtype: torch.dtype, *, ignored: tuple[str, ...]
) -> dict[str, Any]:
    """The model's configuration with what engines need to know of its quantization."""
    quantization = level.format.configuration(ignored=ignored)
    key = "torch_dtype" if "torch_dtype" in companions.config else "dtype"
    return {
        **companions.config,
        key: str(dtype).removeprefix("torch."),
        **level.format.entries(quantization, companions.config),
    }


def proved(
    folder: CheckpointFolder,
    level: CheckpointLevel,
    *,
    checkpoint: Path | None,
    template: str | None,
    prompts: Mapping[str, Sequence[int]],
) -> CheckpointReport:
    """The report of a finished folder, after reading the folder back.

    Args:
        folder: It.
        level: What it holds.
        checkpoint: The source's folder, whose tokenizer the written one is compared with on ``prompts``.
        template: Without ``checkpoint``: the chat template that the source's header has.
        prompts: Texts, and their ids by the source's own tokenizer.

    Raises:
        OutputError: weights, tokenizer or chat template are not what they should be.
    """
    _, digests, stored = _stored(folder)
    verify_folder(folder.target, level, digests)
    verify_stored(folder.target, stored)
    return same_reading(folder, checkpoint=checkpoint, template=template, prompts=prompts)


def same_reading(
    folder: CheckpointFolder, *, checkpoint: Path | None, template: str | None, prompts: Mapping[str, Sequence[int]]
) -> CheckpointReport:
    """The report of a finished folder, after its tokenizer was compared with the source's; arguments as ``proved``.

    Raises:
        OutputError: tokenizer or chat template are not what they should be.
    """
    stored, *_ = _stored(folder)
    notes = list(stored.notes)
    wrong = tokenizer_differences(folder.target, prompts, checkpoint=checkpoint, template=template)
    if wrong and checkpoint is not None:
        raise OutputError(
            f"{folder.target} reads text differently from {checkpoint}: {wrong[0]}.",
            means="Tokenizer files were changed while they were copied, or only some of them are there.",
            do="Delete the folder and run again; check the source's own tokenizer files.",
        )
    if wrong:
        notes.append(
            f"The tokenizer that was made from the GGUF's header is not llama.cpp's ({len(wrong)} differences): "
            f"{wrong[0]}. Put the original's tokenizer files into the folder before serving it."
        )
    size = sum(path.stat().st_size for path in folder.target.iterdir())
    return replace(stored, bytes=size, path=str(folder.target), notes=tuple(notes))


def _stored(folder: CheckpointFolder) -> tuple[CheckpointReport, dict[str, str], dict[str, str]]:
    """The report that lies in a folder, hashes of its matrices as they decode, and of arrays as they are stored."""
    manifest = folder.manifest()
    try:
        digests = from_json(dict[str, str], manifest.get("digests"))
        stored = from_json(dict[str, str], manifest.get("stored", {}))
        return from_json(CheckpointReport, manifest.get("report")), digests, stored
    except ValueError as error:
        raise OutputError(
            f"{folder.target} says of itself what Bitladder does not write: {error}.",
            means="Its bitladder.json was changed, or another version wrote it.",
            do="Delete the folder and run again.",
        ) from error
