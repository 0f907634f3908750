"""The other way round: what hardware a level needs, and what it saves against 16 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitladder.describe.cache import cache_bytes, layer_caches
from bitladder.describe.model import Model
from bitladder.plan.cost import LevelBytes
from bitladder.plan.memory import ENGINE_BYTES, compute_buffers
from bitladder.plan.placement import RAM_MARGIN, VRAM_MARGIN, Usage
from bitladder.units import GiB


@dataclass(frozen=True)
class GpuKind:
    """A GPU one could use; prices None where nobody filled them in."""

    name: str
    memory: int
    purchase: float | None = None
    hourly: float | None = None


@dataclass(frozen=True)
class GpuNeed:
    """How many GPUs of one kind a level needs, everything on them."""

    name: str
    count: int
    purchase: float | None
    hourly: float | None


@dataclass(frozen=True)
class Saving:
    """A level against the 16-bit level on GPUs of one kind; money None where a price is missing."""

    gpu: str
    gpus: int
    gpus_f16: int
    purchase: float | None
    hourly: float | None


@dataclass(frozen=True)
class HardwareNeed:
    """What one level needs."""

    level: str
    total_bytes: int
    """Weights, cache, buffers: on GPUs with the margin of each not counted."""
    ram_gib: int
    """The smallest usual RAM that runs it on the CPU beside the system."""
    gpus: tuple[GpuNeed, ...]
    """Per kind of GPU, fewest and smallest first."""
    savings: tuple[Saving, ...]
    """Against F16, one row per kind of GPU."""


RAM_SIZES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Sizes RAM is sold in, GiB."""
SYSTEM_BYTES = 2 * GiB
"""What the system and its programs use of a machine bought to run a model."""


def hardware_needed(
    model: Model, level: LevelBytes, reference: LevelBytes, wish: Usage, kinds: Sequence[GpuKind]
) -> HardwareNeed:
    """What ``level`` needs at a context, and what it saves against ``reference`` (the 16-bit level)."""
    cache = cache_bytes(layer_caches(model), wish.n_ctx, n_seq=wish.n_seq, type_k=wish.type_k, type_v=wish.type_v).total
    compute = compute_buffers(model, wish.n_ctx, n_seq=wish.n_seq).total
    total = level.total + cache + compute
    on_ram = total + ENGINE_BYTES + RAM_MARGIN + SYSTEM_BYTES
    needs, savings = [], []
    for kind in kinds:
        count = gpus_needed(total - _off_gpu(level), compute, kind)
        count_f16 = gpus_needed(reference.total - _off_gpu(reference) + cache + compute, compute, kind)
        needs.append(GpuNeed(kind.name, count, _times(kind.purchase, count), _times(kind.hourly, count)))
        fewer = count_f16 - count
        savings.append(Saving(kind.name, count, count_f16, _times(kind.purchase, fewer), _times(kind.hourly, fewer)))
    memory = {kind.name: kind.memory for kind in kinds}
    return HardwareNeed(
        level.level,
        total,
        next((size for size in RAM_SIZES if size * GiB >= on_ram), math.ceil(on_ram / GiB)),
        tuple(sorted(needs, key=lambda need: (need.count, memory[need.name]))),
        tuple(savings),
    )


def _off_gpu(level: LevelBytes) -> int:
    """The embedding table stays in RAM unless it is the output matrix too."""
    return 0 if level.tied else level.of("embedding")


def gpus_needed(total: int, compute: int, kind: GpuKind) -> int:
    """GPUs of a kind that hold ``total`` bytes, of which each needs its own ``compute`` buffer and margin."""
    each = kind.memory - VRAM_MARGIN - compute
    return math.ceil((total - compute) / each) if each > 0 else 0


def _times(price: float | None, count: int) -> float | None:
    return None if price is None else price * count


def price_kinds(gpus: Mapping[str, Mapping[str, float]], prices: Mapping[str, Mapping[str, float]]) -> list[GpuKind]:
    """Known GPUs with the user's prices where there are any."""
    return [
        GpuKind(
            name,
            int(row["memory"] * GiB),
            prices.get(name, {}).get("purchase"),
            prices.get(name, {}).get("hourly"),
        )
        for name, row in gpus.items()
    ]
