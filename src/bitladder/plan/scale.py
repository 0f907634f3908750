"""What a long job on a large model takes on one GPU, on several, on nodes: on paper, before anybody rents any.

A walk takes a layer at a time, in phases: the units of a phase depend on nothing of one another, and the next phase
waits for all of them. Shards of the text (`walk/states.SHARD_TOKENS` each) go up to an input on all workers; then the
matrices that read it are coded, each a unit of its own (of experts, each expert). For T tokens and a layer of matrices
(R outputs, K inputs; of experts those that a token is sent to):

    forward      2 T R K                                shards; to measure, once for each level more
    sums         T K (K + 128) for each input           shards: GPTQ and error feedback; an importance matrix T K
    the source   2 T R K, and 2 T K^2 for each input    shards: GPTQ and error feedback, which make up for what was lost
                 of up to 11,584 columns                before; the forward part beside the codes chosen last in a layer
    codes        R K^2, 5 R K^2 where inputs are        matrices: GPTQ and error feedback. The factor is made on a CPU,
                 compared; a factor of 2/3 K^3          in f64, which counts twice
    weighing     forward and twice as much back         by the driver
    encoding     weights at `SEARCHED_RATE` a core      on the nodes of workers that have a shard
    moved        the layer's weights to every node, sums of each shard (f32[K, K] for each input) to where they are used
    memory       a worker: the layer, its shard's states and the widest input, sums of one input or of some experts

so that workers help until the shards run out, or the one matrix that reads an input is what remains. Rates are of data
sheets: products at `REACHED` of a GPU's share (`describe.rates.MATMUL_EFFICIENCY`), PCIe and the network at what they
usually give. Good to a factor of `RANGE`; benchmarks/scale_cost.py holds one, two and four workers against measured
runs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from bitladder.describe.model import Model
from bitladder.describe.rates import MATMUL_EFFICIENCY
from bitladder.formats.parts import parts_of
from bitladder.formats.tensors import TensorInfo
from bitladder.levels.methods import GPTQ
from bitladder.plan.calibration import REACHED, START_SECONDS
from bitladder.plan.preflight import SEARCHED_RATE
from bitladder.units import GiB

SHARD_TOKENS = 4096
"""As ``walk.states`` cuts a text."""
GROUP_BYTES = 256 * 1024**2
"""As ``walk.coding`` holds sums of experts."""
RANGE = 2.0
"""Factor either way around the predicted time."""
PROCESS_BYTES = 600 * 1024**2
TOKENS = 32_768
"""64 windows of 512, what calibrated levels read of a text at most unless told otherwise."""
_IMPORTANCE_TOKENS, _WEIGHING_TOKENS, _MEASURED_TOKENS = 16_384, 4096, 4096
_RUN_LEVELS = 10
"""Levels of the usual ladder beside the source."""
_RECIPE_WALKS = 5
"""Recipes that predictions are scaled to, and the written one measured."""
_SHARED_INPUT = ("attn_k", "attn_v", "attn_kv_a_mqa", "ffn_up", "ffn_up_exps", "ffn_up_shexp")
"""Matrices that read what the one before them reads."""


class ScaleJob(StrEnum):
    """A job that is planned."""

    CALIBRATE = "calibrate"
    """An importance matrix."""
    GPTQ = "gptq"
    """One GPTQ level."""
    RECIPE = "recipe"
    """Weighing, choosing, and a file with error feedback."""
    RUN = "run"
    """The usual ladder, built and measured; its workload comes on top."""


@dataclass(frozen=True)
class Workers:
    """What computes. Rates are of one worker: a GPU, or all cores of a node that has none."""

    name: str
    count: int
    per_node: int
    flops: float
    """Operations per second of large products, as a data sheet's share or as measured."""
    memory_bytes: int
    weights_bytes: float
    """Bytes of a weight where products are made: 4 on a CPU, 2 on a GPU in bfloat16."""
    cores: int = 16
    """Of the process that drives the walk, and of each worker."""
    host_flops: float = 1e12
    """Operations per second of the driver, where it computes by itself: its GPU's on a node that has one."""
    network: float = 1.25e9
    """Bytes per second between nodes: 10 Gbit/s."""
    host_link: float = 1.2e10
    """Bytes per second from RAM to a GPU, llama.cpp's measured share of PCIe 4."""
    disk: float = 1.5e9
    """Bytes per second that a layer is read with."""
    codes_reached: float = REACHED
    """Share of ``flops`` that choosing codes reaches: column after column, which a GPU is poor at."""
    is_gpu: bool = True

    @property
    def nodes(self) -> int:
        """Machines."""
        return max(1, math.ceil(self.count / self.per_node))


CPU_FLOPS = 2.5e10
"""Operations per second of a core in large products, where nobody measured."""
_MAKING_UP = 5.0
"""Products of a matrix with a square one, in halves, where it makes up for what was lost before it."""
GPUS, NODES, PER_NODE = (1, 4, 8), (2, 8, 32), 8
"""What is compared: GPUs of one machine, then machines with ``PER_NODE`` each."""
_CODES_ON_GPU = 0.05


def gpu_workers(name: str, fp16_tflops: float, memory_gib: float) -> list[Workers]:
    """GPUs of one kind, one machine's and several machines', as a row of ``data/devices/gpus.yaml`` describes them."""
    rate = fp16_tflops * 1e12 * MATMUL_EFFICIENCY
    memory = int(memory_gib * GiB)
    counts = [(count, f"{count} GPU" if count == 1 else f"{count} GPUs") for count in GPUS]
    counts += [(count * PER_NODE, f"{count} nodes of {PER_NODE}") for count in NODES]
    return [
        Workers(f"{words} {name}", count, PER_NODE, rate, memory, 2, host_flops=rate, codes_reached=_CODES_ON_GPU)
        for count, words in counts
    ]


def cpu_workers(name: str, cores: int, flops: float, memory_bytes: int) -> list[Workers]:
    """Machines without a GPU. ``flops``: operations per second of large products, all cores."""
    counts = [(count, "1 machine" if count == 1 else f"{count} machines") for count in (1, *NODES)]
    return [
        Workers(f"{words} ({name})", count, 1, flops, memory_bytes, 4, cores=cores, host_flops=flops, is_gpu=False)
        for count, words in counts
    ]


@dataclass(frozen=True)
class ScaleCost:
    """A job on some workers. Bytes, seconds, operations."""

    workers: str
    count: int
    flops: float
    memory_bytes: int
    """Of each worker."""
    busy: int
    """Workers that have a shard; the text has no more."""
    fits: bool
    moved_bytes: int
    """Between nodes, or between the driver and its GPUs."""
    disk_bytes: int
    seconds: float
    low_s: float
    high_s: float
    waiting_share: float
    """Of the time, in which the driver computes alone, or codes are chosen by fewer workers than there are."""


@dataclass(frozen=True)
class _Matrix:
    """Matrices of one shape in a layer."""

    rows: int
    columns: int
    count: int
    """How many there are: 1, or as many as experts."""
    used: float
    """How many of them a token meets."""
    own_input: bool

    @property
    def forward(self) -> float:
        """Operations for each token, to go through it."""
        return 2 * self.rows * self.columns * self.used

    @property
    def compared(self) -> bool:
        """Whether what it reads is compared with what it reads in the source."""
        return self.count == 1 and self.columns <= GPTQ.widest_drift

    @property
    def sums(self) -> float:
        """Operations for each token, to sum what it reads as feedback needs it."""
        return self.columns * (self.columns + 128) * self.used + 2 * self.columns**2 * self.compared


def _matrices(tensors: Sequence[TensorInfo], model: Model) -> list[_Matrix]:
    """The matrices of a layer."""
    dims = model.dims
    found = []
    for tensor in tensors:
        if len(tensor.shape) < 2:
            continue
        count = tensor.shape[0] if len(tensor.shape) == 3 else 1
        is_expert = "experts" in parts_of([tensor])
        used = count * (dims.n_expert_used / dims.n_expert) if is_expert and dims.n_expert else float(count)
        own = tensor.name.split(".")[2] not in _SHARED_INPUT
        found.append(_Matrix(tensor.shape[-2], tensor.shape[-1], count, used, own))
    return found


@dataclass(frozen=True)
class _LayerCost:
    """One layer: operations of all shards together, of choosing codes, and of what the driver does; bytes."""

    shared: float
    source: float
    """The source's own pass, which can go on beside the codes of the layer before."""
    codes: Sequence[Sequence[CodeWork]]
    """For each input, of each share of what reads it."""
    alone: float
    weights: int
    sums: int
    """Bytes of the sums of one shard."""
    held: int
    """Bytes of those that are held at a time."""
    widest: int


@dataclass(frozen=True)
class CodeWork:
    """A unit of codes: operations of its factor, and of choosing them."""

    factor: float
    choosing: float

    def seconds(self, workers: Workers) -> float:
        """On one of them."""
        cpu = workers.cores * CPU_FLOPS if workers.is_gpu else workers.flops
        return self.factor / (REACHED * cpu) + self.choosing / (workers.codes_reached * workers.flops)


def _codes(matrices: Sequence[_Matrix]) -> list[list[CodeWork]]:
    """Units of codes, for each input."""
    inputs: list[list[CodeWork]] = []
    for one in matrices:
        factor = 2 / 3 * one.columns**3
        work = CodeWork(factor, (_MAKING_UP if one.compared else 1.0) * one.rows * one.columns**2)
        if one.own_input:
            inputs.append([work] * one.count)
        elif one.count > 1:  # of each expert, by whoever codes what reads the same
            inputs[-1] = [CodeWork(own.factor, own.choosing + work.choosing) for own in inputs[-1]]
        else:
            inputs[-1].append(work)
    return inputs


def spread_seconds(units: Sequence[float], workers: int) -> float:
    """Units on so many workers, the longest first, each to whoever is free."""
    free = [0.0] * max(1, workers)
    for unit in sorted(units, reverse=True):
        heapq.heapreplace(free, free[0] + unit)
    return max(free)


def _layer(matrices: Sequence[_Matrix], job: ScaleJob, tokens: int) -> _LayerCost:
    weights = sum(one.rows * one.columns * one.count for one in matrices)
    forward = sum(one.forward for one in matrices)
    squares = sum(one.sums for one in matrices if one.own_input)
    source = tokens * forward
    held = max((_held(one) for one in matrices if one.own_input), default=0)
    diagonal = sum(4 * one.columns * one.count for one in matrices if one.own_input)
    widest = max((one.columns for one in matrices), default=0)
    moved = sum(4 * one.columns**2 * (one.count + one.compared) for one in matrices if one.own_input)
    match job:
        case ScaleJob.CALIBRATE:
            return _LayerCost(tokens * forward, 0.0, (), 0.0, weights, diagonal, diagonal, widest)
        case ScaleJob.GPTQ:
            return _LayerCost(source + tokens * squares, source, _codes(matrices), 0.0, weights, moved, held, widest)
        case ScaleJob.RECIPE:
            weighing = 3 * _WEIGHING_TOKENS * forward + _RECIPE_WALKS * _MEASURED_TOKENS * forward
            codes = _codes(matrices)
            return _LayerCost(source + tokens * squares, source, codes, weighing, weights, moved, held, widest)
        case ScaleJob.RUN:
            measuring = (_RUN_LEVELS + 1) * _MEASURED_TOKENS * forward
            return _LayerCost(tokens * forward, 0.0, (), measuring, weights, diagonal, diagonal, widest)


def _held(one: _Matrix) -> int:
    """Bytes of the sums of an input that are held at a time: of experts, of as many as fit into ``GROUP_BYTES``."""
    return 4 * one.columns**2 * max(1 + one.compared, min(one.count, GROUP_BYTES // (4 * one.columns**2)))


_ENCODED = {ScaleJob.CALIBRATE: 0, ScaleJob.GPTQ: 0, ScaleJob.RECIPE: 1, ScaleJob.RUN: _RUN_LEVELS}
"""Times that all weights are encoded."""
_WRITTEN_BITS = {ScaleJob.CALIBRATE: 0.0, ScaleJob.GPTQ: 4.5, ScaleJob.RECIPE: 4.5, ScaleJob.RUN: 60.0}
"""Bits on the disk for each weight, all levels together."""


def scale_cost(model: Model, job: ScaleJob, workers: Workers, *, tokens: int = TOKENS) -> ScaleCost:
    """What a job takes on some workers.

    Args:
        model: from its headers, or a shape's.
        job: which one.
        workers: what computes.
        tokens: of the text; an importance matrix reads `_IMPORTANCE_TOKENS` of them at most.
    """
    if job in (ScaleJob.CALIBRATE, ScaleJob.RUN):
        tokens = min(tokens, _IMPORTANCE_TOKENS)
    layers = _layers(model)
    shards = max(1, tokens // SHARD_TOKENS)
    busy = min(shards, workers.count)
    nodes = math.ceil(busy / workers.per_node)
    per_worker = math.ceil(shards / busy)  # shards that one worker does of a layer
    flops = seconds = waiting = 0.0
    moved = memory = 0
    for tensors in layers:
        cost = _layer(_matrices(tensors, model), job, tokens)
        codes = [[one.seconds(workers) for one in units] for units in cost.codes]
        if codes:
            codes[-1] += [cost.source / shards / (REACHED * workers.flops)] * shards
        chosen = sum(one.factor + one.choosing for units in cost.codes for one in units)
        flops += cost.shared + cost.source + cost.alone + chosen
        stored = sum(tensor.nbytes for tensor in tensors)
        to_workers = stored * (nodes - 1) + (busy * int(cost.weights * workers.weights_bytes) if workers.is_gpu else 0)
        back = cost.sums * shards
        moved += to_workers + (back if busy > 1 or workers.is_gpu else 0)
        computing = cost.shared * per_worker / shards / (REACHED * workers.flops)
        coding = [spread_seconds(units, workers.count) for units in codes]
        driving = cost.alone / (REACHED * workers.host_flops)
        encoding = _ENCODED[job] * cost.weights / (SEARCHED_RATE * workers.cores * nodes)
        reading = stored / workers.disk + stored * (nodes > 1) / workers.network
        link = workers.network if nodes > 1 else workers.host_link
        carrying = cost.weights * workers.weights_bytes + back if workers.is_gpu or nodes > 1 else 0.0
        seconds += computing + sum(coding) + driving + encoding + reading + carrying / link
        full = sum(sum(units) for units in codes) / workers.count
        waiting += driving + sum(coding) - full
        states = per_worker * SHARD_TOKENS * (model.dims.n_embd + cost.widest) * 4
        memory = max(memory, int(cost.weights * max(workers.weights_bytes, 2)) + cost.held + 2 * states)
    total = sum(tensor.elements for tensor in model.tensors)
    disk = int(total * _WRITTEN_BITS[job] / 8) + 2 * tokens * model.dims.n_embd * 4
    whole = START_SECONDS + seconds
    memory += PROCESS_BYTES
    return ScaleCost(
        workers.name, workers.count, flops, memory, busy, memory <= workers.memory_bytes, int(moved), disk, whole,
        whole / RANGE, whole * RANGE, waiting / whole,
    )  # fmt: skip


def layer_phases(model: Model, layer: int, job: ScaleJob, workers: Workers, *, tokens: int) -> list[list[float]]:
    """The phases of a layer of an importance matrix or a GPTQ level, each as the seconds of its units. The source's
    pass through the next layer stands beside the codes that are chosen last, behind them."""
    matrices = _matrices(_layers(model)[layer], model)
    shards = max(1, tokens // SHARD_TOKENS)

    def of_shards(operations: float) -> list[float]:
        return [SHARD_TOKENS * operations / (REACHED * workers.flops)] * shards

    if job is not ScaleJob.GPTQ:
        return [of_shards(sum(one.forward for one in matrices))]
    phases, left = [], 0.0
    codes = iter(_codes(matrices))
    for one in matrices:
        if one.own_input:  # a pass that stops there begins with what was coded last
            phases.append(of_shards(left + one.sums))
            phases.append([unit.seconds(workers) for unit in next(codes)])
            left = 0.0
        left += one.forward
    phases[-1] += of_shards(sum(one.forward for one in matrices))
    return [*phases, of_shards(left)]


def _layers(model: Model) -> list[list[TensorInfo]]:
    layers: dict[str, list[TensorInfo]] = {}
    for tensor in model.tensors:
        if tensor.name.startswith("blk."):
            layers.setdefault(tensor.name.split(".", 2)[1], []).append(tensor)
    return list(layers.values())
