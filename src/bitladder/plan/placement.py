"""Where the parts of a model live: all on the GPU, its experts in RAM, some layers in RAM, or all in RAM.

llama.cpp's rules: the embedding table always stays in RAM; a layer's KV cache lives where the layer does; the output
matrix goes to the GPU last (with ``-ngl`` beyond the number of layers); experts can be kept in RAM layer by layer
(``--n-cpu-moe``), which frees much memory and costs little speed, because a token uses few of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bitladder.describe.cache import cache_bytes, layer_caches
from bitladder.describe.machine import Machine
from bitladder.describe.model import Model
from bitladder.plan.cost import LevelBytes
from bitladder.plan.memory import ENGINE_BYTES, compute_buffers
from bitladder.records.plan import DEFAULT_CTX, Place
from bitladder.units import MiB, human_bytes

RAM_MARGIN = 512 * MiB
"""Left to the system, so that a model that fits does not drive it into swapping."""
VRAM_MARGIN = 512 * MiB
"""Per GPU, for the driver's own context and fragmentation."""
HOST_BUFFER = 32 * MiB
"""What a GPU run keeps in RAM to pass states in and logits out."""


@dataclass(frozen=True)
class Usage:
    """How the model is to be run: context of one request, requests at once, types of the KV cache."""

    n_ctx: int = DEFAULT_CTX
    n_seq: int = 1
    type_k: str = "F16"
    type_v: str = "F16"
    beside_bytes: int = 0
    """Of a projector that is loaded beside the model: to the GPU where layers are, else to RAM."""


@dataclass(frozen=True)
class Placement:
    """One way to run a level on a machine. Bytes."""

    kind: Place
    n_gpu_layers: int
    """For ``-ngl``: layers on the GPU, one more than the model has when the output matrix goes there too."""
    n_cpu_experts: int
    """For ``--n-cpu-moe``: layers whose experts stay in RAM."""
    vram_bytes: int
    ram_bytes: int
    kv_bytes: int
    compute_bytes: int
    weight_bytes: int
    missing_bytes: int = 0
    """What is lacking when it does not fit."""
    whole: bool = False
    """It had to be all on the GPUs."""

    @property
    def total_bytes(self) -> int:
        """In all pools."""
        return self.vram_bytes + self.ram_bytes


def usable_vram(machine: Machine) -> int:
    """Bytes of GPU memory a model may take; 0 where GPU and CPU share one memory."""
    return 0 if machine.unified else sum(max(0, gpu.vram_free - VRAM_MARGIN) for gpu in machine.gpus)


def usable_ram(machine: Machine) -> int:
    """Bytes of RAM a model may take now."""
    return max(0, machine.ram_available - RAM_MARGIN)


def place(model: Model, level: LevelBytes, machine: Machine, wish: Usage) -> Placement:
    """The fastest way to run a level that fits: as much as possible on the GPU, experts leaving it first."""
    need = _Need(model, level, wish)
    vram, ram = usable_vram(machine), usable_ram(machine)
    layers = model.dims.n_layer
    if vram > 0:
        if need.on_gpu(layers, 0) <= vram and need.in_ram(layers + 1, 0) <= ram:
            return need.placed(Place.GPU, layers + 1, 0)
        if need.experts:
            outside = _least(layers, lambda count: need.on_gpu(layers, count) <= vram)
            if outside is not None and need.in_ram(layers + 1, outside) <= ram:
                return need.placed(Place.EXPERTS_IN_RAM, layers + 1, outside)
        inside = layers - (_least(layers, lambda count: need.partly(layers - count) <= vram) or 0)
        if inside > 0 and need.partly(inside) <= vram and need.in_ram(inside, 0) <= ram:
            return need.placed(Place.SPLIT, inside, 0)
    if need.in_ram(0, 0) <= ram:
        return need.placed(Place.CPU, 0, 0)
    lacking = need.in_ram(0, 0) - ram - max(0, vram - need.compute)
    return Placement(
        Place.NONE, 0, 0, 0, need.in_ram(0, 0), need.kv, need.compute, level.total, missing_bytes=max(1, lacking)
    )


class _Need:
    """Bytes that parts of a level take in each pool."""

    def __init__(self, model: Model, level: LevelBytes, wish: Usage) -> None:
        self.layers = model.dims.n_layer
        self.level, self.beside = level, wish.beside_bytes
        self.kv = cache_bytes(
            layer_caches(model), wish.n_ctx, n_seq=wish.n_seq, type_k=wish.type_k, type_v=wish.type_v
        ).total
        self.compute = compute_buffers(model, wish.n_ctx, n_seq=wish.n_seq).total
        self.experts = level.of("experts")
        self.blocks = level.of("layers") + self.experts
        self.head = sum(level.head.values())

    def on_gpu(self, layers: int, cpu_experts: int) -> int:
        """All layers and the output matrix on the GPU, less the experts of some layers."""
        return self.partly(layers) + self.head - self.experts * cpu_experts // self.layers

    def partly(self, layers: int) -> int:
        """Some layers with their cache on the GPU."""
        return (self.blocks + self.kv) * layers // self.layers + self.compute + self.beside

    def in_ram(self, gpu_layers: int, cpu_experts: int) -> int:
        """What stays in RAM when ``gpu_layers`` (of layers + 1) are on the GPU."""
        inside = min(gpu_layers, self.layers)
        ram = self.level.of("embedding") + ENGINE_BYTES
        ram += (self.blocks + self.kv) * (self.layers - inside) // self.layers
        ram += self.experts * cpu_experts // self.layers
        if gpu_layers <= self.layers:
            ram += self.level.of("output") + self.compute
        return ram + (HOST_BUFFER if gpu_layers else self.beside)

    def placed(self, kind: Place, gpu_layers: int, cpu_experts: int) -> Placement:
        inside = min(gpu_layers, self.layers)
        vram = 0
        if gpu_layers > self.layers:
            vram = self.on_gpu(inside, cpu_experts)
        elif gpu_layers:
            vram = self.partly(inside)
        ram = self.in_ram(gpu_layers, cpu_experts)
        return Placement(kind, gpu_layers, cpu_experts, vram, ram, self.kv, self.compute, self.level.total)


def whole_only(placement: Placement, machine: Machine) -> Placement:
    """For engines that do not split a model between GPU and RAM: what is not wholly on the GPUs does not fit."""
    if not usable_vram(machine) or placement.kind == Place.GPU:
        return placement
    missing = max(1, placement.total_bytes - usable_vram(machine))
    return replace(placement, kind=Place.NONE, n_gpu_layers=0, n_cpu_experts=0, missing_bytes=missing, whole=True)


def _least(limit: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest count up to ``limit`` for which a condition holds that stays true once it is."""
    if not holds(limit):
        return None
    low, high = 0, limit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def describe_placement(placement: Placement, machine: Machine) -> str:
    """One sentence: what it needs, where that goes, or what is lacking."""
    need = human_bytes(placement.total_bytes)
    if placement.kind == Place.GPU:
        return f"needs {need}; fits on the GPU ({human_bytes(usable_vram(machine))} usable)"
    if placement.kind == Place.EXPERTS_IN_RAM:
        return (
            f"needs {need}: {human_bytes(placement.vram_bytes)} on the GPU, "
            f"the experts of {placement.n_cpu_experts} layers in RAM"
        )
    if placement.kind == Place.SPLIT:
        return f"needs {need}: {placement.n_gpu_layers} layers on the GPU, the rest in RAM"
    if placement.kind == Place.CPU:
        return f"needs {need} of {human_bytes(usable_ram(machine))} usable RAM"
    return _lacking(placement, machine, need)


def _lacking(placement: Placement, machine: Machine, need: str) -> str:
    if placement.whole:
        there = human_bytes(usable_vram(machine))
        return f"needs {need} on the GPU, where {there} are usable; engines of checkpoints do not split a model"
    short = f"needs {need}, {human_bytes(placement.missing_bytes)} more than can be used"
    if placement.missing_bytes <= machine.ram_total - machine.ram_available:
        return short + "; it would fit if other programs gave their memory back"
    return short
