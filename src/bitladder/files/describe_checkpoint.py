"""A checkpoint as planning takes it, from config.json and the headers of its weights: whatever the class.

The first that knows wins:

    a row of ours                  shapes follow from config.json at once; taken where the headers agree
    the converter, on headers      llama.cpp's own mapping (``files/header_conversion.py``), seconds, kept in the cache
    the converter, on shapes       the same with the parameters of transformers' class, where there are no headers
    the headers' bytes             an estimate, by rules that hold across families (``describe/estimate.py``)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from bitladder.describe.config_keys import Config
from bitladder.describe.contradiction import check_shapes
from bitladder.describe.estimate import elements_of, estimated, language_tensors
from bitladder.describe.hf_config import shape_of
from bitladder.describe.model import Model
from bitladder.describe.shapes import model_of
from bitladder.errors import BadInput, UnknownArchitecture
from bitladder.files.beside import FURTHER, beside_note, parts_beside, towers
from bitladder.files.checkpoint import CheckpointTensor
from bitladder.files.converter import converter_at_hand
from bitladder.files.header_conversion import header_of
from bitladder.files.remote import Offer
from bitladder.formats.parts import nextn_blocks
from bitladder.progress import Progress, silent


class SizeBasis(StrEnum):
    """What sizes follow from, the surest first."""

    FILE = "the file's header"
    CONVERTER = "llama.cpp's converter on the tensors' headers"
    ROW = "the family's row"
    SHAPES = "llama.cpp's converter on the shapes of transformers' class"
    ESTIMATE = "the tensors' headers, by rules that hold across families"


@dataclass(frozen=True)
class Described:
    """A model for planning."""

    model: Model
    label: str
    licence: str = ""
    basis: SizeBasis = SizeBasis.FILE
    offers: tuple[Offer, ...] = ()
    """Levels that its repository has ready."""
    notes: tuple[str, ...] = ()
    model_class: str = ""
    """transformers' class of a checkpoint, "none" where it names none; "" of anything else."""
    model_type: str = ""
    """transformers' word for its family."""
    converts: bool | None = None
    """Whether llama.cpp's converter reads it; None where it was not asked."""
    tokenizer_gap: str = ""
    """Why the converter does not read its tokenizer; "" where it does."""
    beside_bytes: int = 0
    """Of what takes in pictures and sounds beside the decoder."""

    @property
    def exact(self) -> bool:
        """File sizes are exact to the byte; else the header's bytes, or more, are an estimate (see ``basis``)."""
        return self.basis is SizeBasis.FILE or (self.basis is SizeBasis.CONVERTER and bool(self.model.raw_metadata))


def of_checkpoint(
    label: str,
    config: Mapping[str, Any],
    tensors: Sequence[CheckpointTensor],
    folder: Path | None = None,
    progress: Progress = silent,
) -> Described:
    """The GGUF file that a checkpoint would become.

    Args:
        label: How to call it.
        config: config.json.
        tensors: What its headers name; none where there are no headers.
        folder: Where its tokenizer lies; None for one that is not here.
        progress: What it says when it asks the converter.

    Raises:
        BadFile: config.json contradicts the tensors, or a figure is absurd.
        UnknownArchitecture: there are no headers, and nobody knows the class.
    """
    numbers = Config(label, config)
    numbers.check_context()
    row = _of_row(label, config, tensors, numbers)
    if row is not None and (not tensors or numbers.packed or _agree(row, tensors, numbers)):
        found = Described(row, label, basis=SizeBasis.ROW)
    else:
        found = _of_converter(label, config, tensors, folder, progress)
    found = replace(found, model_class=class_name(config) or "none", model_type=numbers.model_type)
    return with_beside(found, tensors, config)


def class_name(config: Mapping[str, Any]) -> str:
    """The class that config.json names; "" where it names none."""
    listed = config.get("architectures")
    first = listed[0] if isinstance(listed, list) and listed else ""
    return first[:80] if isinstance(first, str) else ""


def _of_row(
    label: str, config: Mapping[str, Any], tensors: Sequence[CheckpointTensor], numbers: Config
) -> Model | None:
    """The model that a row of ours derives from config.json; None where there is no row."""
    try:
        model = model_of(shape_of(label, config))
    except UnknownArchitecture:
        return None
    if not numbers.packed:
        check_shapes(label, model.tensors, tensors)
    return model


def _agree(model: Model, tensors: Sequence[CheckpointTensor], numbers: Config) -> bool:
    """The headers hold the weights that the row expects, but for a table or two."""
    there = sum(
        elements_of(tensor, numbers.bits)
        for tensor in language_tensors(tensors)
        if not (numbers.tied and tensor.name.endswith("lm_head.weight"))
    )
    return abs(there - model.elements) <= 1e-4 * model.elements


def _of_converter(
    label: str, config: Mapping[str, Any], tensors: Sequence[CheckpointTensor], folder: Path | None, progress: Progress
) -> Described:
    """The converter's answer, else an estimate from the headers with the reason."""
    converter = converter_at_hand()
    if converter is None:
        why = "llama.cpp's converter is not here yet (`bitladder quantize` fetches it when it first converts)"
        return _estimate(label, config, tensors, why, converts=None)
    try:
        made = header_of(label, config, tensors, converter, folder=folder, progress=progress)
    except BadInput as error:
        return _estimate(label, config, tensors, _in_short(error), converts=False)
    unread = f"The converter does not read its tokenizer ({made.tokenizer})."
    return Described(
        made.model,
        label,
        basis=SizeBasis.CONVERTER if tensors else SizeBasis.SHAPES,
        notes=(unread,) if made.tokenizer else (),
        converts=True,
        tokenizer_gap=made.tokenizer,
    )


def _estimate(
    label: str, config: Mapping[str, Any], tensors: Sequence[CheckpointTensor], why: str, *, converts: bool | None
) -> Described:
    if not tensors:
        raise UnknownArchitecture(
            f"{label} is a {class_name(config) or 'model of no class'}, whose shapes are not known here, and there are "
            "no weights.",
            means=f"{why[0].upper()}{why[1:]}.",
            do="Fetch the safetensors files (their headers are enough), or plan a GGUF file of it.",
        )
    return Described(
        estimated(label, config, tensors),
        label,
        basis=SizeBasis.ESTIMATE,
        notes=(f"Sizes are an estimate: {why.rstrip('.')}.",),
        converts=converts,
    )


def _in_short(error: BadInput) -> str:
    """An error's first line and its last word."""
    lines = [line.strip() for line in error.found.splitlines() if line.strip()]
    return lines[0] if len(lines) < 2 else f"{lines[0].removesuffix(':')} {lines[-1][:160]}"


def with_beside(found: Described, tensors: Sequence[CheckpointTensor], config: Mapping[str, Any]) -> Described:
    """What is known of a checkpoint, with what it holds beside the decoder."""
    parts = parts_beside(tensors, config)
    if nextn_blocks(tensor.name for tensor in found.model.tensors):
        parts.pop(FURTHER, None)
    note = beside_note(parts)
    return replace(found, notes=(*([note] if note else []), *found.notes), beside_bytes=towers(parts).nbytes)
