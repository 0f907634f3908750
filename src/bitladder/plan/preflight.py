"""What a job will take before it starts: memory, disk and time, with a refusal that says what is missing.

The prediction is kept with the job's result, so that it can be compared with what happened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitladder.describe.machine import Machine
from bitladder.errors import NothingFits
from bitladder.units import MiB, human_bytes

QUANTIZE_RATE = {"Q8_0": 2e8, "F16": 3e8, "BF16": 3e8, "F32": 3e8}
"""Weights per second per core, where nothing was measured; every other type ``SEARCHED_RATE``."""
SEARCHED_RATE = 4e7
PIECES_BYTES = 24 * MiB
"""Memory of a thread that quantizes: a piece as 32-bit floats, its search, its result."""
BASE_BYTES = 250 * MiB
"""The process itself."""


@dataclass(frozen=True)
class JobNeed:
    """A prediction for a job."""

    what: str
    ram_bytes: int
    vram_bytes: int
    disk_bytes: int
    seconds: float
    label: str
    """``measured`` when this machine's own earlier jobs gave the rate, else ``assumed``."""


def quantize_need(
    weights: Mapping[str, int],
    file_bytes: Sequence[int],
    machine: Machine,
    *,
    threads: int,
    measured: Mapping[str, float] | None = None,
) -> JobNeed:
    """Building levels in one pass. ``weights``: qtype -> weights to convert, over all levels, each (tensor,
    qtype) once.

    ``measured``: qtype -> weights per second per core, from earlier jobs here.
    """
    rates = {**QUANTIZE_RATE, **(measured or {})}
    cores = max(1, min(threads, machine.cores))
    seconds = sum(count / (rates.get(qtype, SEARCHED_RATE) * cores) for qtype, count in weights.items())
    label = "measured" if measured and set(weights) <= set(measured) else "assumed"
    ram = BASE_BYTES + cores * PIECES_BYTES
    return JobNeed("quantize", ram, 0, sum(file_bytes), seconds, label)


def walk_need(
    layer_bytes: int, head_bytes: int, tokens: int, n_embd: int, levels: int, operations: float, machine: Machine,
    *, flops: float = 0.0,
) -> JobNeed:  # fmt: skip
    """Walking the ladder: one layer as 32-bit floats, hidden states of every level, and the widest matrix of
    the head.

    ``operations`` are of one pass of the reference over the text (2 * weights * tokens); every level passes
    once more.
    ``flops``: measured operations per second, all cores.
    """
    states = 4 * tokens * n_embd * (levels + 1)
    ram = 600 * MiB + 2 * layer_bytes + max(states, 0) + head_bytes
    rate = flops or 2.5e10 * machine.cores
    return JobNeed("walk", ram, 0, 0, operations * (levels + 1) / rate, "measured" if flops else "assumed")


def require(need: JobNeed, machine: Machine) -> None:
    """Refuse a job that cannot end well.

    Raises:
        NothingFits: memory or disk is too small; the message has both numbers.
    """
    gpu = sum(device.vram_free for device in machine.gpus)
    for name, wanted, there, cure in (
        ("RAM", need.ram_bytes, machine.ram_available, "Close other programs, or use fewer threads or levels."),
        ("GPU memory", need.vram_bytes, gpu, "Run it on the CPU, or free the GPU."),
        ("disk space", need.disk_bytes, machine.disk_free, "Free some space, choose fewer levels, or another folder."),
    ):
        if wanted > there:
            raise NothingFits(
                f"To {need.what} needs {human_bytes(wanted)} of {name}; {human_bytes(there)} are free.",
                means=f"{human_bytes(wanted - there)} are missing, so it is not begun.",
                do=cure,
            )
