"""What the jobs of a sweep will take. What a model's first job builds and measures, its later ones find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.describe.machine import Machine
from bitladder.describe.model import Model
from bitladder.levels import Container, Level
from bitladder.plan.cost import level_size
from bitladder.plan.preflight import JobNeed, quantize_need, walk_need, weights_to_convert
from bitladder.records.plan import LevelPlan, Plan

ASSUMED_STREAM = 1e10
"""Bytes per second of a CPU whose rates nobody measured, for how fast it answers."""
_PROMPT_FASTER = 8.0
"""Times faster than an answer a prompt is computed there."""


@dataclass(frozen=True)
class Asked:
    """A workload in numbers: tokens of all prompts and of all answers at their longest."""

    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class ModelWork:
    """What a model's ladder takes, whatever it is asked."""

    build: JobNeed
    walk: JobNeed


def model_work(
    model: Model, plan: Plan, levels: Sequence[Level], machine: Machine, *, tokens: int, threads: int, effort: str,
    flops: float = 0.0,
) -> ModelWork:  # fmt: skip
    """Building and measuring those of the levels that fit.

    Args:
        model: from its headers.
        plan: the ladder on this machine.
        levels: the ladder.
        machine: where it runs.
        tokens: of the text that fidelity is measured on.
        threads: worker threads.
        effort: how long scales are searched for.
        flops: measured operations per second; 0 where nobody measured.
    """
    fitting = {row.level for row in plan.levels if row.fits or row.container is Container.FOLDER}
    sizes = [level_size(model, level) for level in levels if level.name in fitting]
    build = quantize_need(
        weights_to_convert(sizes), [size.file_bytes for size in sizes], machine, threads=threads, effort=effort
    )
    layers: dict[str, int] = {}
    for tensor in model.tensors:
        if tensor.name.startswith("blk."):
            layer = tensor.name.split(".", 2)[1]
            layers[layer] = layers.get(layer, 0) + tensor.elements
    dims = model.dims
    head = dims.n_vocab * dims.n_embd
    operations = 2.0 * (sum(layers.values()) + head) * tokens
    walk = walk_need(
        4 * max(layers.values(), default=0), 4 * head, tokens, dims.n_embd, len(sizes), operations, machine, flops=flops
    )
    return ModelWork(build, walk)


def answering_seconds(plan: Plan, asked: Asked) -> float:
    """Seconds until the reference and every level that runs here have answered a workload."""
    rows = [row for row in plan.levels if row.fits and row.container is Container.FILE]
    largest = [rows[0]] if rows else []  # stands for the reference, which is no smaller
    return sum(_seconds(row, asked) for row in [*largest, *rows])


def _seconds(row: LevelPlan, asked: Asked) -> float:
    if row.speed is not None:
        return asked.answer_tokens / row.speed.decode.value + asked.prompt_tokens / row.speed.prefill.value
    decode = ASSUMED_STREAM / max(1, row.file_bytes)
    return asked.answer_tokens / decode + asked.prompt_tokens / (_PROMPT_FASTER * decode)
