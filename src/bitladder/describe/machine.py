"""A machine: its memory pools and what bounds speed on it."""

from __future__ import annotations

from dataclasses import dataclass

from bitladder.units import human_bytes

UNIFIED_SHARE = ((36 << 30, 2 / 3), (1 << 62, 3 / 4))
"""Up to so many bytes of memory, the part that macOS lets its GPU have unless it is told otherwise."""


def unified_share(total: int) -> float:
    """The part of a shared memory of ``total`` bytes that macOS lets its GPU have."""
    return next(share for most, share in UNIFIED_SHARE if total <= most)


@dataclass(frozen=True)
class Gpu:
    """A GPU and its memory, bytes. ``bandwidth`` and ``flops`` are 0 when nobody knows them."""

    name: str
    vram_total: int
    vram_free: int
    bandwidth: float = 0.0
    """Bytes per second its memory delivers."""
    flops: float = 0.0
    """Dense FP16 matrix throughput, operations per second."""


@dataclass(frozen=True)
class Machine:
    """What is here. Sizes in bytes."""

    cpu: str
    cores: int
    features: tuple[str, ...]
    ram_total: int
    ram_available: int
    disk_free: int
    gpus: tuple[Gpu, ...] = ()
    unified: bool = False
    """CPU and GPU share one memory: ``gpus`` then describes a view of the RAM, not more memory."""

    @property
    def vram_total(self) -> int:
        """Memory of all GPUs, bytes; 0 when there is none or when it is the RAM itself."""
        return 0 if self.unified else sum(gpu.vram_total for gpu in self.gpus)

    @property
    def summary(self) -> str:
        """One line: what decides whether a model fits."""
        parts = [f"{self.cores} cores", f"{human_bytes(self.ram_total)} RAM"]
        parts += [
            f"{gpu.name} in the same memory" if self.unified else f"{gpu.name} {human_bytes(gpu.vram_total)}"
            for gpu in self.gpus
        ]
        return ", ".join(parts)
