"""What fits on this machine, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from bitladder.records import Real
from bitladder.units import Basis

DEFAULT_CTX = 4096
"""Tokens of context where nobody names any."""


class Container(StrEnum):
    """What a level is on the disk."""

    FILE = "file"
    """A GGUF file, or its numbered parts."""
    FOLDER = "folder"
    """A checkpoint folder with safetensors, which llama.cpp does not run."""


class Place(StrEnum):
    """Where the parts of a running model lie."""

    GPU = "gpu"
    """Everything but the embedding on the GPU."""
    EXPERTS_IN_RAM = "experts in RAM"
    SPLIT = "split"
    """Some layers on the GPU."""
    CPU = "cpu"
    NONE = "none"
    """It does not fit."""
    ELSEWHERE = "elsewhere"
    """Behind an address, where no size is known."""


ELSEWHERE = Place.ELSEWHERE


@dataclass(frozen=True)
class Figure:
    """A predicted number with its range, where it comes from, and what limits it.

    ``label``: measured where it is anchored by the user's own runs, derived from this machine's measured rates, or
    assumed from data sheets.
    """

    value: Real
    low: Real
    high: Real
    label: Basis
    binds: str


@dataclass(frozen=True)
class PlanSpeed:
    """Tokens per second; time to first token in seconds."""

    decode: Figure
    prefill: Figure
    first_token: Figure


@dataclass(frozen=True)
class LevelPlan:
    """One level of the ladder on one machine at one context. All sizes in bytes."""

    level: str
    tensor_bytes: int
    file_bytes: int
    bpw: Real
    on_label_share: Real
    """Share of quantizable weights that really get the type in the name; the rest fell back or was promoted."""
    fallbacks: int
    """Tensors whose rows do not divide into the wanted block and got another type."""
    kv_bytes: int
    compute_bytes: int
    total_bytes: int
    fits: bool
    reason: str
    placement: Place = Place.CPU
    n_gpu_layers: int = 0
    n_cpu_experts: int = 0
    vram_bytes: int = 0
    ram_bytes: int = 0
    speed: PlanSpeed | None = None
    """None where no rates are known or nothing fits."""
    longest_ctx: int = 0
    """Tokens of context up to which it is placed no worse than this."""
    container: Container = Container.FILE


def runs_elsewhere(name: str) -> LevelPlan:
    """A model behind an address: it stands in the table, and no size or memory of it is known."""
    return LevelPlan(name, 0, 0, math.nan, math.nan, 0, 0, 0, 0, True, "runs elsewhere", placement=ELSEWHERE)


@dataclass(frozen=True)
class ContextBytes:
    """What a context takes beside the weights, the same for every level."""

    n_ctx: int
    kv_bytes: int
    compute_bytes: int


@dataclass(frozen=True)
class Plan:
    """The ladder of one model on one machine, largest level first."""

    model: str
    architecture: str
    machine: str
    n_ctx: int
    budget_bytes: int
    levels: tuple[LevelPlan, ...]
    contexts: tuple[ContextBytes, ...] = ()
    """What other contexts up to the trained one would take, shortest first; empty in older records."""
    beside_bytes: int = 0
    """Of what takes in pictures and sounds beside the decoder, in every level's memory."""
