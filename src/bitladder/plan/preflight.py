"""What a job will take before it starts: memory, disk and time, with a refusal that says what is missing.

Formulas only; `files/job_log.py` keeps what jobs took and corrects the next prediction by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bitladder.describe.machine import Machine
from bitladder.errors import NothingFits
from bitladder.formats.blocks import QTYPES
from bitladder.plan.cost import LevelSize
from bitladder.units import Basis, GiB, MiB, human_bytes

QUANTIZE_RATE = {"Q8_0": 2e8, "F16": 3e8, "BF16": 3e8, "F32": 3e8}
"""Weights per second per core, where nothing was measured; every other type ``SEARCHED_RATE``."""
SEARCHED_RATE = 4e7
PIECES_BYTES = 24 * MiB
"""Memory of a thread that quantizes: a piece as 32-bit floats, its search, its result."""
ASSUMED_FLOPS = 2.5e10
"""Operations per second per core of products in f32, where nothing was measured."""
QUANTIZE_START_S, WALK_START_S = 2.0, 5.0
"""Loading libraries and compiled kernels, whatever the model's size."""
BASE_BYTES = 250 * MiB
"""The process itself."""
LOOKED_AT = 5.0
"""Layers in 32-bit floats that the derived walk holds while it looks at one: the file's, the checkpoint's, copies."""
STATE_BYTES = GiB
"""Hidden states that a walk keeps in memory."""


@dataclass(frozen=True)
class JobNeed:
    """A prediction for a job."""

    what: str
    ram_bytes: int
    vram_bytes: int
    disk_bytes: int
    seconds: float
    label: Basis
    """Measured when the rate was measured on this machine, else assumed."""
    kind: str = ""
    """Jobs of a kind are corrected by one another."""

    def named(self, what: str, kind: str = "") -> JobNeed:
        """The same in words that name the levels or the text, and of another kind where one is given."""
        return replace(self, what=what, kind=kind or self.kind)


def weights_to_convert(sizes: Sequence[LevelSize]) -> dict[str, int]:
    """qtype -> weights to convert for levels of one model, each (tensor, qtype) once, however many levels want it."""
    work = {
        (tensor.name, tensor.qtype): tensor.elements
        for size in sizes
        for tensor in size.tensors
        if QTYPES[tensor.qtype].is_quantized
    }
    weights: dict[str, int] = {}
    for (_, qtype), count in work.items():
        weights[qtype] = weights.get(qtype, 0) + count
    return weights


def quantize_need(
    weights: Mapping[str, int], file_bytes: Sequence[int], machine: Machine, *, threads: int, effort: str = "good"
) -> JobNeed:
    """Building levels in one pass. ``weights``: qtype -> weights to convert, over all levels, each (tensor, qtype)
    once. The harder the search for scales (``effort``), the longer: a kind of job each.
    """
    cores = max(1, min(threads, machine.cores))
    seconds = sum(count / (QUANTIZE_RATE.get(qtype, SEARCHED_RATE) * cores) for qtype, count in weights.items())
    seconds += QUANTIZE_START_S if file_bytes else 0.0
    ram = BASE_BYTES + cores * PIECES_BYTES
    return JobNeed("quantize", ram, 0, sum(file_bytes), seconds, Basis.ASSUMED, f"quantize {effort}")


def walk_need(
    layer_bytes: int, head_bytes: int, tokens: int, n_embd: int, levels: int, operations: float, machine: Machine,
    *, flops: float = 0.0, layers_held: float = 2.0,
) -> JobNeed:  # fmt: skip
    """Walking the ladder: one layer as 32-bit floats, hidden states of every level, and the widest matrix of
    the head.

    ``operations`` are of one pass of the reference over the text (2 * weights * tokens); every level passes
    once more.
    ``flops``: measured operations per second, all cores. Hidden states beyond ``STATE_BYTES`` go to disk.
    ``layers_held``: layers in memory at once.
    """
    states = 4 * tokens * n_embd * (levels + 1)
    ram = 600 * MiB + int(layers_held * layer_bytes) + min(states, STATE_BYTES) + head_bytes
    rate = flops or ASSUMED_FLOPS * machine.cores
    label = Basis.MEASURED if flops else Basis.ASSUMED
    seconds = WALK_START_S + operations * (levels + 1) / rate
    return JobNeed("walk", ram, 0, max(0, states - STATE_BYTES), seconds, label, "walk")


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
