"""What a GGUF file, or a checkpoint folder, really holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitladder.formats.tensors import TensorInfo


@dataclass(frozen=True)
class Inspection:
    """A file's own account of itself beside what is in it. Shares are of weights, 0 to 1."""

    file: str
    name: str
    architecture: str
    parts: int
    file_bytes: int
    tensor_bytes: int
    header_bytes: int
    weights: int
    bpw: float
    """Bits per weight over all tensors, scales included."""
    type_share: dict[str, float]
    """Per qtype its share of all weights, largest first."""
    level_in_name: str | None
    level_in_header: str | None
    """The level that general.file_type names."""
    on_label_share: float | None
    """Share of quantizable weights stored in the qtype that the claimed level is named after; None without a
    claim.
    """
    promoted: int | None
    """Quantizable tensors that the claimed level's recipe stores in another type than its label, as it
    should.
    """
    fallbacks: int | None
    """Quantizable tensors whose rows do not divide into the label's blocks, so another type had to stand in.
    """
    off_recipe: tuple[str, ...] | None
    """Tensors whose type is not what llama.cpp's recipe of the claimed level gives them."""
    truthful: bool | None
    """Whether the name holds: name, header and recipe agree. None when nothing is claimed."""
    verdict: str
    made_from: str | None
    """Quantized levels that the weights went through before, where our own header records it."""
    quantized: str | None
    """What it means to take this file as a source, where its weights are quantized; None for floats."""
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, Any]
    """Every key; long lists as their length, long texts cut."""


@dataclass(frozen=True)
class FolderInspection:
    """A quantized checkpoint folder: what its configuration says, and what its tensors are."""

    folder: str
    architecture: str
    format: str
    """As readers call the layout: ``gptq``, ``awq``, ``pack-quantized``."""
    bits: int | None
    """Of a code; None of formats that have no integer codes."""
    group_size: int | None
    """Inputs that share a scale; -1: a whole row; None where layers differ."""
    symmetric: bool | None
    """Whether zero lies in the middle of the codes."""
    file_bytes: int
    weights: int
    """All, those that stay float among them."""
    linears: int
    """Quantized linear layers."""
    quantized_share: float
    """Share of all weights that is quantized."""
    bpw: float
    """Bits per weight over all tensors."""
    stays_float: tuple[str, ...]
    """Tensors with two dimensions that are not quantized."""
    faults: tuple[str, ...]
    """Where configuration and tensors contradict each other."""
    truthful: bool
    """They agree: every quantized layer decodes, and none is left over."""
    verdict: str
    notes: tuple[str, ...]
    """Which engines refuse the format, and what Bitladder noted when it wrote the folder."""
    schemes: Mapping[str, int] = field(default_factory=dict)
    """Linear layers by how they are stored, most first: ``W4A16-g128``, ``NVFP4A16``."""
