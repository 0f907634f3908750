"""A machine: its memory pools and what bounds speed on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU and its memory, bytes."""

    name: str
    vram_total: int
    vram_free: int


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
