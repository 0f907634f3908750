"""Steps that plan: from headers and figures alone, for this machine or one in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitladder.describe.cache_types import CacheTypes, check_cache, slow_on_gpu, slow_on_processor, split_name
from bitladder.errors import UsageError
from bitladder.progress import Progress
from bitladder.records.plan import Plan

if TYPE_CHECKING:
    from bitladder.describe.machine import Machine
    from bitladder.describe.model import Model
    from bitladder.describe.rates import MeasuredMachine
    from bitladder.files.catalogue import CatalogueModel
    from bitladder.files.describe_checkpoint import Described
    from bitladder.files.remote import Offer
    from bitladder.levels import Level
    from bitladder.plan.abilities import Ability
    from bitladder.plan.advice import Advice
    from bitladder.plan.inverse import HardwareNeed
    from bitladder.plan.launch import LaunchCommand
    from bitladder.plan.pair import PairPlan
    from bitladder.plan.placement import Usage
    from bitladder.plan.scale import ScaleCost
    from bitladder.plan.search import MachineRates


@dataclass(frozen=True)
class PlanRequest:
    """How a model is to be run: context of one request, requests at once, type of the KV cache, and where."""

    n_ctx: int | None = None
    """None: the usual number of tokens, or a model's own when that is less."""
    slots: int = 1
    kv: str = "f16"
    """Types of the KV cache as ``describe.cache_types`` spells them; several for a ladder of levels and caches."""
    machine: str | None = None
    """A machine in words (``RTX 4090 + 64 GiB``); None for this one."""

    @property
    def caches(self) -> tuple[CacheTypes, ...]:
        """The KV caches. Raises UsageError for a type that is none."""
        from bitladder.describe.cache_types import parse_caches

        return parse_caches(self.kv)

    @property
    def wish(self) -> Usage:
        """As planning takes it. Raises UsageError for an unknown type of cache, or several."""
        if len(self.caches) > 1:
            raise UsageError(
                f"Only one type of KV cache can be named here. Got '{self.kv}' instead.",
                do="Several are compared by `bitladder plan MODEL --kv ...` and `bitladder run MODEL --kv ...`.",
            )
        return self.wish_with(self.caches[0])

    def wish_with(self, cache: CacheTypes) -> Usage:
        """As planning takes it, with this cache."""
        from bitladder.plan.placement import Usage
        from bitladder.records.plan import DEFAULT_CTX

        return Usage(self.n_ctx or DEFAULT_CTX, self.slots, cache.k.upper(), cache.v.upper())


@dataclass(frozen=True)
class ModelPlan:
    """A plan with what else is known: exactness, ready-made levels, the pair, the launch command."""

    plan: Plan
    exact: bool
    notes: tuple[str, ...]
    offers: tuple[Offer, ...]
    pair: PairPlan | None = None
    launch: LaunchCommand | None = None
    advice: Advice | None = None
    """Which format suits this machine and use."""
    slow: tuple[str, ...] = ()
    """Warnings where the launched level would run, but slowly."""
    basis: str = ""
    """What sizes follow from, in words."""
    abilities: tuple[Ability, ...] = ()
    """What else the model can have, by which way, and why not the rest."""


def the_machine(words: str | None) -> tuple[Machine, MachineRates]:
    """This machine with its measured rates, or one in words with its data sheet's."""
    from bitladder.files.devices import parse_machine
    from bitladder.files.measured import load_measured
    from bitladder.files.probe import probe_machine
    from bitladder.plan.search import MachineRates
    from bitladder.stages.search import machine_rates

    if words is not None:
        described = parse_machine(words)
        return described.machine, MachineRates(described.cpu, described.gpu)
    machine = probe_machine()
    return machine, machine_rates(machine, load_measured(machine))


def job_costs(model: str, job: str, machine: str | None, progress: Progress) -> list[ScaleCost]:
    """What a long job on a model takes on one GPU, several, and nodes of them; without GPUs on machines like it.

    Args:
        model: whatever `describe` takes.
        job: ``calibrate``, ``gptq``, ``recipe`` or ``run``.
        machine: in words (``8x A100 80GB``); None for nodes with eight H100.
        progress: told what is read.

    Raises:
        UsageError: there is no such job.
    """
    from bitladder.files.describe_source import describe
    from bitladder.files.devices import known_gpus, parse_machine
    from bitladder.plan.scale import CPU_FLOPS, ScaleJob, cpu_workers, gpu_workers, scale_cost

    if job not in tuple(ScaleJob):
        raise UsageError(f"The --job must be one of {', '.join(ScaleJob)}. Got '{job}' instead.")
    name = "H100 SXM"
    found = None if machine is None else parse_machine(machine).machine
    if found is not None and found.gpus:
        name = found.gpus[0].name
    if found is None or found.gpus:
        row = known_gpus()[name]
        workers = gpu_workers(name, row["fp16"], row["memory"])
    else:
        workers = cpu_workers(str(machine), found.cores, CPU_FLOPS * found.cores, found.ram_total)
    described = describe(model, progress).model
    return [scale_cost(described, ScaleJob(job), one) for one in workers]


def plan_model(
    model: str,
    request: PlanRequest,
    *,
    levels: Sequence[Level] | None = None,
    pair: Sequence[Level] = (),
    engine: str | None = None,
    least_decode: float = 0.0,
    progress: Progress,
) -> ModelPlan:
    """The ladder of a model, from headers alone.

    Args:
        model: whatever `describe` takes: a file, a folder, ``hf:``, ``ollama:``, ``lmstudio:``, a catalogue name.
        request: how it is to be run, and where.
        levels: only these; by default the whole ladder, of GGUF files or of checkpoints as the engine needs.
        pair: a quality and a speed level to place together.
        engine: the engine whose launch command is wanted, for the largest level that fits.
        least_decode: tokens per second under which a level counts as not fitting.

    Raises:
        UsageError, BadInput: as the parts say.
    """
    from bitladder.files.describe_source import describe
    from bitladder.formats.recipes import RECIPES
    from bitladder.levels import LADDER, RecipeLevel
    from bitladder.plan.abilities import Route
    from bitladder.plan.cost import checkpoint_levels
    from bitladder.plan.ladder import make_plan, over_caches, usable_context
    from bitladder.plan.launch import LAUNCHED
    from bitladder.stages.anchors import stored_runs

    caches = request.caches
    machine, rates = the_machine(request.machine)
    found = describe(model, progress)
    if engine not in LAUNCHED:
        for cache in caches:
            check_cache(found.model, cache)
    n_ctx = usable_context(found.model, request.n_ctx)
    wishes = {
        cache: replace(request.wish_with(cache), n_ctx=n_ctx, beside_bytes=found.beside_bytes) for cache in caches
    }
    runs = stored_runs(model, machine) if request.machine is None else {}
    whole = engine in LAUNCHED
    wanted = levels or (checkpoint_levels(found.model, engine or "") if whole else LADDER)
    plans = {
        cache: make_plan(
            found.model,
            machine,
            n_ctx=wish.n_ctx,
            levels=wanted,
            whole=whole,
            n_seq=wish.n_seq,
            type_k=wish.type_k,
            type_v=wish.type_v,
            beside_bytes=wish.beside_bytes,
            rates=rates,
            runs={RecipeLevel(level): speed for level, speed in runs.items() if level in RECIPES},
        )
        for cache, wish in wishes.items()
    }
    made = over_caches(plans) if len(plans) > 1 else plans[caches[0]]
    made = _with_kernels(_fast_enough(made, least_decode), wanted, engine, machine)
    largest = _largest(wanted, made)
    chosen = largest[1] if largest and largest[1] in wishes else caches[0]
    wish = wishes[chosen]
    able = _abilities(found)
    files = whole or all(one.way is not Route.NONE for one in able if one.what == "K-quants")
    advice, slow = _advice(found.model, wanted, made, engine, machine, wish) if files else (None, ())
    if engine not in LAUNCHED:
        slow += tuple(filter(None, map(_slow_here(machine), caches)))
    return ModelPlan(
        made,
        found.exact,
        (*found.notes, *_of_heads(found.model, wish)),
        found.offers,
        _pair(found.model, pair, machine, wish) if pair else None,
        _launch(found, model, wanted, made, engine, machine, wish) if engine else None,
        advice,
        slow,
        basis=found.basis.value,
        abilities=able,
    )


def _slow_here(machine: Machine) -> Callable[[CacheTypes], str]:
    """What says of a cache that llama.cpp is slow with it on this machine."""
    from bitladder.plan.kernels import devices_of

    kinds = {device.kind for device in devices_of(machine)}
    return slow_on_gpu if "nvidia" in kinds else slow_on_processor if kinds == {"cpu"} else lambda _: ""


def _abilities(found: Described) -> tuple[Ability, ...]:
    from bitladder.files.engine_package import engine_knows, transformers_has
    from bitladder.plan.abilities import Facts, abilities, walk_gap
    from bitladder.stages.engine_way import engine_missing

    facts = Facts(
        is_gguf=not found.model_class and bool(found.model.raw_metadata),
        converts=found.converts,
        engine_knows=engine_knows(found.model.dims.architecture) if found.converts is not False else None,
        walk_gap=walk_gap(found.model),
        transformers_class=transformers_has(found.model_type) if found.model_type else None,
        engine_gap=engine_missing(found.model) if found.converts is not False else "",
        tokenizer_gap=found.tokenizer_gap,
    )
    return abilities(facts)


def _fast_enough(plan: Plan, least_decode: float) -> Plan:
    """Levels under the least acceptable speed do not fit, and say so."""
    if least_decode <= 0:
        return plan
    levels = [
        replace(
            level,
            fits=False,
            reason=f"{level.speed.decode.value:.3g} tokens/s expected, {least_decode:g} asked for; {level.reason}",
        )
        if level.fits and level.speed and level.speed.decode.value < least_decode
        else level
        for level in plan.levels
    ]
    return replace(plan, levels=tuple(levels))


def _with_kernels(plan: Plan, levels: Sequence[Level], engine: str | None, machine: Machine) -> Plan:
    """Levels that the engine has no kernel for on the described device do not fit, and say so: none is launched."""
    from bitladder.files.kernel_table import kernel_table
    from bitladder.plan.kernels import no_kernel, weakest

    device = weakest(machine)
    if device is None or engine is None:
        return plan
    table, named = kernel_table(), {level.name: level for level in levels}
    reasons = [no_kernel(table, named[split_name(row.level)[0]], device, engine) for row in plan.levels]
    rows = [
        replace(row, fits=False, reason=reason) if reason else row
        for row, reason in zip(plan.levels, reasons, strict=True)
    ]
    return replace(plan, levels=tuple(rows))


def _pair(model: Model, levels: Sequence[Level], machine: Machine, wish: Usage) -> PairPlan:
    from bitladder.plan.cost import level_size
    from bitladder.plan.pair import plan_pair

    if len(levels) != 2:
        raise UsageError(f"A pair is two levels. Got {len(levels)}.", do="Write --pair Q8_0,Q4_K_M.")
    quality, speed = (level_size(model, level).by_part for level in levels)
    return plan_pair(model, quality, speed, machine, wish)


def _of_heads(model: Model, wish: Usage) -> tuple[str, ...]:
    """What guessing with the model's own heads takes, where it has some that the engine runs."""
    from bitladder.engines.speculation import heads_gap
    from bitladder.plan.memory import heads_bytes
    from bitladder.units import human_bytes

    if heads_gap(model):
        return ()
    more = human_bytes(heads_bytes(model, wish.n_ctx, n_seq=wish.n_seq))
    return (
        f"It holds heads that predict further tokens; guessing with them (`--speculate mtp`) takes {more} more memory "
        f"at {wish.n_ctx} tokens of context.",
    )


def _largest(levels: Sequence[Level], plan: Plan) -> tuple[Level, CacheTypes | None] | None:
    """The largest level that fits, and the KV cache that its row names."""
    names = {level.name: level for level in levels}
    found = next((split_name(row.level) for row in plan.levels if row.fits), None)
    return (names[found[0]], found[1]) if found else None


def _advice(
    model: Model, levels: Sequence[Level], plan: Plan, engine: str | None, machine: Machine, wish: Usage
) -> tuple[Advice | None, tuple[str, ...]]:
    """The format for the largest level that fits, and what would be slow about it; nothing where nothing fits."""
    from bitladder.files.kernel_table import kernel_table
    from bitladder.plan.advice import Situation, advise
    from bitladder.plan.cost import level_size
    from bitladder.plan.kernels import kernel_warnings, weakest
    from bitladder.plan.placement import place

    largest = _largest(levels, plan)
    if largest is None:
        return None, ()
    level = largest[0]
    placement = place(model, level_size(model, level).by_part, machine, wish)
    device = weakest(machine)
    advice = advise(Situation(machine, placement, engine or "", wish.n_seq))
    slow = level.slow_paths(engine or "", has_gpu=bool(machine.gpus), cpu_features=machine.features)
    if device is not None:
        slow += kernel_warnings(kernel_table(), levels, device, engine or "")
    return advice, tuple(slow)


def _launch(
    found: Described, source: str, levels: Sequence[Level], plan: Plan, engine: str, machine: Machine, wish: Usage
) -> LaunchCommand:
    from pathlib import Path

    from bitladder.errors import NothingFits
    from bitladder.levels import CheckpointLevel, Container, RecipeLevel
    from bitladder.plan.cost import level_size
    from bitladder.plan.launch import LAUNCHED, launch
    from bitladder.plan.placement import place

    largest = _largest(levels, plan)
    if largest is None:
        raise NothingFits(
            "No level fits, so there is nothing to launch.",
            means=f"{plan.levels[0].level}: {plan.levels[0].reason}." if plan.levels else "",
            do="Name other levels, another machine, or another engine with --launch.",
        )
    level = largest[0]
    if isinstance(level, CheckpointLevel) and engine in LAUNCHED and engine not in level.engines:
        raise UsageError(
            f"{engine} does not serve {level}.",
            means=" ".join(level.format.notes()),
            do=f"Choose another level, or run it in {' or '.join(level.engines)}.",
        )
    model = found.model
    name = Path(source).stem if Path(source).exists() else (model.name or "model")
    placement = place(model, level_size(model, level).by_part, machine, wish)
    path = f"{name}-{level}" + (".gguf" if level.container is Container.FILE else "")
    as_it_is = engine in LAUNCHED and level == RecipeLevel("F16") and not model.raw_metadata
    on_hub = as_it_is and not Path(source).exists()
    if as_it_is:
        path = found.label if on_hub else source
    return launch(
        engine, path, placement, wish, threads=machine.cores, name=name, gpus=len(machine.gpus), on_hub=on_hub
    )


def needs(model: str, request: PlanRequest) -> list[HardwareNeed]:
    """What hardware each level of a catalogue model needs, and what it saves against 16 bits."""
    from bitladder.stages.search import hardware_for

    return hardware_for(model, request.wish)


def catalogue(text: str) -> tuple[CatalogueModel, ...]:
    """Rows of the catalogue that match a text."""
    from bitladder.files.catalogue import find_models

    return find_models(text)


def unusable_gpus() -> list[str]:
    """What is to be known of GPUs that are here and cannot be planned on, a line each."""
    from bitladder.files.nvidia import visible_gpus

    found = visible_gpus()
    silent = [f"{gpu.name} reports no memory ({gpu.remark}): nothing is planned on it." for gpu in found if gpu.silent]
    beside = [gpu for gpu in found if gpu.shares_memory] if any(gpu.total for gpu in found) else []
    return silent + [f"{gpu.name} shares the processor's memory and is left out beside the other." for gpu in beside]


def describe_machine(*, measure: bool, progress: Progress) -> tuple[Machine, MeasuredMachine | None]:
    """This machine, and what was measured on it; measured anew on request, and kept."""
    from bitladder.files.measured import load_measured, save_measured
    from bitladder.files.probe import probe_machine

    machine = probe_machine()
    if not measure:
        return machine, load_measured(machine)
    from bitladder.stages.measure_machine import measure_machine

    measured = measure_machine(machine, progress=progress)
    save_measured(measured)
    return machine, measured
