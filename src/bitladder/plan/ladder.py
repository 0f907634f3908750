"""Which levels of a model fit a machine at a context, how fast they will be, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bitladder.describe.cache import cache_bytes, layer_caches
from bitladder.describe.cache_types import F16_CACHE, CacheTypes
from bitladder.describe.machine import Machine
from bitladder.describe.model import Model
from bitladder.errors import UsageError
from bitladder.formats.parts import parts_of
from bitladder.levels import LADDER, Container, Level
from bitladder.plan.cost import LevelBytes, level_size
from bitladder.plan.memory import compute_buffers
from bitladder.plan.placement import Usage, describe_placement, place, usable_ram, usable_vram, whole_only
from bitladder.plan.search import N_PROMPT, MachineRates, largest_context, shares_of
from bitladder.plan.speed import anchor_factor, predict
from bitladder.records.plan import DEFAULT_CTX, ContextBytes, LevelPlan, Place, Plan

"""Tokens of context when nobody names a number and the model was trained for at least as many."""


def make_plan(
    model: Model,
    machine: Machine,
    *,
    n_ctx: int | None = None,
    levels: Sequence[Level] = LADDER,
    n_seq: int = 1,
    type_k: str = "F16",
    type_v: str = "F16",
    rates: MachineRates | None = None,
    n_prompt: int = N_PROMPT,
    runs: Mapping[Level, float] | None = None,
    whole: bool = False,
    beside_bytes: int = 0,
) -> Plan:
    """The ladder of ``model`` on ``machine``, largest level first.

    ``n_seq`` parallel sequences have ``n_ctx`` tokens of context each (None: `usable_context`); the KV cache holds
    ``type_k`` and ``type_v``; a projector of ``beside_bytes`` is loaded, too. Checkpoint levels, and all when the
    engine does not split models (``whole``), fit on the GPUs or not at all.

    Raises:
        UsageError: a context beyond what the model was trained for, or none; a machine that cannot be.
    """
    n_ctx = usable_context(model, n_ctx)
    check_machine(machine)
    wish = Usage(n_ctx, n_seq, type_k, type_v, beside_bytes)
    anchor = run_anchor(model, machine, wish, rates, runs or {})
    rows = []
    for size in sorted((level_size(model, level) for level in levels), key=lambda size: -size.file_bytes):
        placement = place(model, size.by_part, machine, wish)
        own = not whole and size.level.container is Container.FILE
        if not own:
            placement = whole_only(placement, machine)
        speed = None
        # A CPU's rates and the user's runs are llama.cpp's; a GPU's rates are its memory's, whatever the engine.
        if rates and placement.kind != Place.NONE and (own or placement.kind == Place.GPU):
            shares = shares_of(model, size.by_part, placement, rates)
            speed = predict(shares, model, n_prompt=n_prompt, n_past=n_ctx / 2, anchor=anchor if own else 0.0)
        rows.append(
            LevelPlan(
                level=size.level.name,
                tensor_bytes=size.tensor_bytes,
                file_bytes=size.file_bytes,
                bpw=size.bpw,
                on_label_share=size.on_label_share,
                fallbacks=size.fallbacks,
                kv_bytes=placement.kv_bytes,
                compute_bytes=placement.compute_bytes,
                total_bytes=placement.total_bytes,
                fits=placement.kind != Place.NONE,
                reason=describe_placement(placement, machine),
                placement=placement.kind,
                n_gpu_layers=placement.n_gpu_layers,
                n_cpu_experts=placement.n_cpu_experts,
                vram_bytes=placement.vram_bytes,
                ram_bytes=placement.ram_bytes,
                speed=speed,
                longest_ctx=largest_context(model, size.by_part, machine, wish),
                container=size.level.container,
            )
        )
    return Plan(
        model=model.name,
        architecture=model.dims.architecture,
        machine=machine.summary,
        n_ctx=n_ctx,
        budget_bytes=usable_ram(machine) + usable_vram(machine),
        levels=tuple(rows),
        contexts=_contexts(model, wish),
        beside_bytes=beside_bytes,
    )


def over_caches(plans: Mapping[CacheTypes, Plan]) -> Plan:
    """One ladder of levels and caches from a ladder for each cache: every level with every cache, under the name of the
    two, largest file first. What other contexts take is told of the first cache."""
    first = next(iter(plans.values()))
    rows = [
        replace(row, level=cache.named(row.level))
        for at in range(len(first.levels))
        for cache, row in ((cache, plan.levels[at]) for cache, plan in plans.items())
    ]
    return replace(first, levels=tuple(rows))


def file_memory(model: Model, machine: Machine, *, n_ctx: int, n_seq: int = 1, cache: CacheTypes = F16_CACHE) -> int:
    """Bytes that a file takes as it is, whatever its types: weights, KV cache and buffers.

    Raises:
        UsageError: as ``make_plan``.
    """
    check_context(model, n_ctx)
    wish = Usage(n_ctx, n_seq, cache.k.upper(), cache.v.upper())
    return place(model, LevelBytes(model.name, parts_of(model.tensors)), machine, wish).total_bytes


def _contexts(model: Model, wish: Usage) -> tuple[ContextBytes, ...]:
    """What doubling contexts take, from 512 tokens to the trained length, and the one that was asked for."""
    trained = max(model.dims.n_ctx_train, wish.n_ctx)
    doubling = {512 << step for step in range(trained.bit_length()) if 512 << step <= trained}
    layers = layer_caches(model)
    return tuple(
        ContextBytes(
            n_ctx,
            cache_bytes(layers, n_ctx, n_seq=wish.n_seq, type_k=wish.type_k, type_v=wish.type_v).total,
            compute_buffers(model, n_ctx, n_seq=wish.n_seq).total,
        )
        for n_ctx in sorted(doubling | {trained, wish.n_ctx})
    )


RUN_PAST = 256
"""Tokens before the middle of a measured decode: a workload's prompts and answers are short."""


def run_anchor(
    model: Model, machine: Machine, wish: Usage, rates: MachineRates | None, runs: Mapping[Level, float]
) -> float:
    """How much faster the user's runs of any levels were than predicted; 0 without runs."""
    if rates is None or not runs:
        return 0.0
    predicted = []
    for level in runs:
        size = level_size(model, level).by_part
        shares = shares_of(model, size, place(model, size, machine, wish), rates)
        predicted.append(predict(shares, model, n_prompt=RUN_PAST, n_past=RUN_PAST).decode.value)
    return anchor_factor(predicted, list(runs.values()))


def usable_context(model: Model, n_ctx: int | None) -> int:
    """The context asked for, in tokens; None: ``DEFAULT_CTX``, or what the model was trained for when that is less.

    Raises:
        UsageError: the context asked for is not positive, or longer than the model was trained for.
    """
    if n_ctx is None:
        return model.dims.context(DEFAULT_CTX)
    check_context(model, n_ctx)
    return n_ctx


def check_context(model: Model, n_ctx: int) -> None:
    """Refuse contexts the model cannot use.

    Raises:
        UsageError: the context is not positive, or longer than the model was trained for.
    """
    if n_ctx < 1:
        raise UsageError(f"A context of {n_ctx} tokens is none.", do="Give a positive number of tokens with --ctx.")
    trained = model.dims.n_ctx_train
    if trained and n_ctx > trained:
        raise UsageError(
            f"A context of {n_ctx} tokens is asked for; {model.name} was trained for {trained}.",
            means="Beyond that its answers break down unless its positions are rescaled, which changes the model.",
            do=f"Choose --ctx {trained} or less.",
        )


def check_machine(machine: Machine) -> None:
    """Refuse machines that cannot be.

    Raises:
        UsageError: no memory or no core, or more memory free than there is.
    """
    faults = []
    if machine.cores < 1:
        faults.append(f"{machine.cores} cores")
    if machine.ram_total < 1 or not 0 <= machine.ram_available <= machine.ram_total:
        faults.append(f"{machine.ram_available} of {machine.ram_total} bytes of RAM available")
    faults += [
        f"{gpu.name} with {gpu.vram_free} of {gpu.vram_total} bytes free"
        for gpu in machine.gpus
        if gpu.vram_total < 1 or not 0 <= gpu.vram_free <= gpu.vram_total
    ]
    if faults:
        raise UsageError(
            "There is no such machine: " + ", ".join(faults) + ".",
            do="Check the figures given with --as.",
        )
