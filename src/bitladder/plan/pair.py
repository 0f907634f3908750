"""Two levels of one model at once: both tiers with both caches, or the swap and what it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitladder.describe.machine import Gpu, Machine
from bitladder.describe.model import Model
from bitladder.plan.cost import LevelBytes
from bitladder.plan.placement import Placement, Usage, place
from bitladder.records.plan import Place
from bitladder.units import human_bytes

WARM_LOAD = 1.5e9
"""Bytes per second at which an engine takes in a file that the system still has in memory; a start adds
``START_S``.
"""
START_S = 1.0


@dataclass(frozen=True)
class PairPlan:
    """How a quality and a speed tier share a machine."""

    resident: bool
    """Both stay loaded."""
    quality: Placement
    speed: Placement
    swap_s: float
    """Seconds from one tier to the other when only one is loaded; 0 when both are."""
    reason: str


def plan_pair(
    model: Model, quality: LevelBytes, speed: LevelBytes, machine: Machine, wish: Usage, *, disk_read: float = 5e8
) -> PairPlan:
    """Place both tiers together; the speed tier gets the GPU first, since that is what it is for.

    ``disk_read`` is bytes per second, for a swap to a level that the system's file cache no longer holds.
    """
    fast = place(model, speed, machine, wish)
    left = remaining(machine, fast)
    both = place(model, quality, left, wish)
    if Place.NONE not in (fast.kind, both.kind):
        total = fast.total_bytes + both.total_bytes
        return PairPlan(True, both, fast, 0.0, f"both stay loaded: {human_bytes(total)} together, a cache each")
    alone = place(model, quality, machine, wish)
    if Place.NONE in (alone.kind, fast.kind):
        which = quality.level if alone.kind == Place.NONE else speed.level
        lacking = alone.missing_bytes if alone.kind == Place.NONE else fast.missing_bytes
        reason = f"{which} does not even fit alone: {human_bytes(lacking)} are missing"
        return PairPlan(False, alone, fast, 0.0, reason)
    held = quality.total + speed.total <= machine.ram_available
    larger = max(quality.total, speed.total)
    seconds = START_S + larger / (WARM_LOAD if held else disk_read)
    where = "the files stay in the system's cache" if held else "from disk"
    reason = (
        f"one at a time: together {human_bytes(both.missing_bytes)} are missing; "
        f"a swap takes about {seconds:.0f} s ({where})"
    )
    return PairPlan(False, alone, fast, seconds, reason)


def remaining(machine: Machine, used: Placement) -> Machine:
    """The machine with what a placement takes taken away, GPUs filled in order."""
    left, gpus = used.vram_bytes, list[Gpu]()
    for gpu in machine.gpus:
        taken = min(left, gpu.vram_free)
        left -= taken
        gpus.append(replace(gpu, vram_free=gpu.vram_free - taken))
    return replace(machine, ram_available=max(0, machine.ram_available - used.ram_bytes), gpus=tuple(gpus))
