"""Backward from the hardware: which models at which levels fit a machine at a speed one can live with, the
largest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bitladder.describe.machine import Machine
from bitladder.describe.model import Model
from bitladder.describe.rates import PoolRates
from bitladder.plan.cost import LevelBytes
from bitladder.plan.placement import Placement, Usage, place
from bitladder.plan.speed import PoolShare, predict
from bitladder.records.plan import Place, PlanSpeed
from bitladder.units import human_bytes

N_PROMPT = 512
"""Prompt length for the time to first token when nobody says otherwise."""


@dataclass(frozen=True)
class MachineRates:
    """How fast each pool is."""

    cpu: PoolRates
    gpu: PoolRates | None = None


@dataclass(frozen=True)
class CatalogueCandidate:
    """A model with the sizes of its levels, largest first."""

    name: str
    licence: str
    model: Model
    levels: tuple[LevelBytes, ...]
    params: float
    """Billions of weights."""
    released: str = ""
    """Month of its first publication, ``2025-04``; empty where nobody says."""
    made_for: str = "chat"
    """``chat``, ``code`` or ``base``."""


@dataclass(frozen=True)
class Option:
    """One model at one level on the machine."""

    name: str
    licence: str
    params: float
    level: str
    placement: Placement
    speed: PlanSpeed
    n_layer: int = 0
    """Layers of the model."""


def shares_of(model: Model, level: LevelBytes, placement: Placement, rates: MachineRates) -> tuple[PoolShare, ...]:
    """Which pool does what for every token under a placement."""
    dims = model.dims
    active = dims.n_expert_used / dims.n_expert if dims.n_expert else 1.0
    layers, experts = level.parts.get("layers", {}), level.parts.get("experts", {})

    def share(pool: PoolRates, part: float, head: bool, expert_part: float, starts: float) -> PoolShare:
        """``part`` of the layers and ``expert_part`` of the experts in a pool that starts work ``starts`` times a
        token.
        """
        used = _sum((head, level.head), (part, layers), (expert_part * active, experts))
        held = _sum((head, level.head), (part, layers), (expert_part, experts))
        return PoolShare(pool, used, held, starts, part, level.head if head else {})

    if placement.kind in (Place.CPU, Place.NONE) or rates.gpu is None:
        return (share(rates.cpu, 1.0, True, 1.0, dims.n_layer),)
    inside = min(placement.n_gpu_layers, dims.n_layer) / dims.n_layer
    outside = placement.n_cpu_experts / dims.n_layer
    whole = placement.n_gpu_layers > dims.n_layer
    on_cpu = dims.n_layer * (1 - inside) + placement.n_cpu_experts
    shares = [share(rates.gpu, inside, whole, inside - outside, dims.n_layer * inside)]
    if on_cpu or not whole:
        shares.append(share(rates.cpu, 1 - inside, not whole, 1 - inside + outside, on_cpu))
    return tuple(shares)


def _sum(*terms: tuple[float, Mapping[str, int]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for factor, sizes in terms:
        for qtype, size in sizes.items():
            if factor > 0:
                total[qtype] = total.get(qtype, 0.0) + factor * size
    return total


def option(
    candidate: CatalogueCandidate,
    level: LevelBytes,
    machine: Machine,
    rates: MachineRates,
    wish: Usage,
    *,
    n_prompt: int = N_PROMPT,
) -> Option:
    """Placement and speed of one level."""
    placement = place(candidate.model, level, machine, wish)
    shares = shares_of(candidate.model, level, placement, rates)
    speed = predict(shares, candidate.model, n_prompt=n_prompt, n_past=wish.n_ctx / 2)
    n_layer = candidate.model.dims.n_layer
    return Option(candidate.name, candidate.licence, candidate.params, level.level, placement, speed, n_layer)


def best_options(
    candidates: Sequence[CatalogueCandidate],
    machine: Machine,
    rates: MachineRates,
    wish: Usage,
    *,
    least_decode: float = 0.0,
    least_bits: float = 0.0,
) -> list[Option]:
    """Per model the largest level that fits and decodes at ``least_decode`` tokens/s or more; the largest model
    first.

    A model whose own context is shorter than the wish is planned at its own. Models of which no level qualifies are
    left out; ``what_would_give`` says why.
    """
    found = []
    for candidate in candidates:
        own = fitting_wish(candidate, wish)
        for level in candidate.levels:
            if 8 * level.total / (candidate.params * 1e9) < least_bits:
                break
            if place(candidate.model, level, machine, own).kind == Place.NONE:
                continue
            row = option(candidate, level, machine, rates, own)
            if row.speed.decode.value >= least_decode:
                found.append(row)
                break
    return sorted(found, key=lambda row: (-row.params, row.name))


def fitting_wish(candidate: CatalogueCandidate, wish: Usage) -> Usage:
    """The wish with a context no longer than the model's."""
    return replace(wish, n_ctx=candidate.model.dims.context(wish.n_ctx))


def what_would_give(
    candidate: CatalogueCandidate,
    level: LevelBytes,
    machine: Machine,
    rates: MachineRates,
    wish: Usage,
    *,
    least_decode: float = 0.0,
) -> str:
    """The least sacrifice that makes a level fit, as a clause after its name: KV precision, then context, then the
    level itself; or what is lacking.
    """
    wish = fitting_wish(candidate, wish)

    def works(trial: Usage, size: LevelBytes) -> bool:
        row = option(candidate, size, machine, rates, trial)
        return row.placement.kind != Place.NONE and row.speed.decode.value >= least_decode

    if works(wish, level):
        return "fits as it is"
    for qtype in ("Q8_0", "Q4_0"):
        if works(replace(wish, type_k=qtype, type_v=qtype), level):
            return f"would need a KV cache in {qtype}"
    eight = replace(wish, type_k="Q8_0", type_v="Q8_0")
    for trial, also in ((wish, ""), (eight, " and a KV cache in Q8_0")):
        n_ctx = trial.n_ctx // 2
        while n_ctx >= 1024:
            if works(replace(trial, n_ctx=n_ctx), level):
                return f"would need a context of {n_ctx} tokens{also}"
            n_ctx //= 2
    for smaller in candidate.levels:
        if smaller.total < level.total and works(wish, smaller):
            return f"would fit at {smaller.level}"
    row = option(candidate, level, machine, rates, wish)
    if row.placement.kind == Place.NONE:
        return f"would need {human_bytes(row.placement.missing_bytes)} more memory"
    return f"would be slow: {row.speed.decode.value:.1f} tokens/s where {least_decode:g} are wanted"


def largest_context(model: Model, level: LevelBytes, machine: Machine, wish: Usage) -> int:
    """The longest context (a multiple of 256) at which a level is placed as it is at the wished one; 0 if it does not
    fit.
    """
    kind = place(model, level, machine, wish).kind
    if kind == Place.NONE:
        return 0
    low, high = 0, max(1, (model.dims.n_ctx_train or 1 << 20) // 256)
    while low < high:
        middle = (low + high + 1) // 2
        trial = place(model, level, machine, replace(wish, n_ctx=256 * middle))
        low, high = (middle, high) if trial.kind in _AS_GOOD[kind] else (low, middle - 1)
    return 256 * low


_AS_GOOD = {
    Place.GPU: {Place.GPU},
    Place.EXPERTS_IN_RAM: {Place.GPU, Place.EXPERTS_IN_RAM},
    Place.SPLIT: {Place.GPU, Place.EXPERTS_IN_RAM, Place.SPLIT},
    Place.CPU: {Place.GPU, Place.EXPERTS_IN_RAM, Place.SPLIT, Place.CPU},
}
"""Placement -> those that are as fast or faster."""
