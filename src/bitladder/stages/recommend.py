"""What to run on a machine: one answer from the catalogue, and what it rests on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bitladder.stages.plan import PlanRequest

if TYPE_CHECKING:
    from bitladder.describe.machine import Machine
    from bitladder.plan.recommend import Rated, Recommendation
    from bitladder.plan.search import MachineRates
    from bitladder.stages.search import GivesWay


@dataclass(frozen=True)
class RecommendRequest:
    """What one wants to do, and where."""

    use: str = "chat"
    run: PlanRequest = field(default_factory=PlanRequest)
    """Context (None: the use's), requests at once, type of the cache, machine."""
    reserve: int | None = None
    """Bytes for the system and other programs; None: as a person would leave."""
    least_decode: float | None = None
    """Tokens per second; None: the use's."""
    text: str = ""
    """Only models of the catalogue that match."""


@dataclass(frozen=True)
class Recommended:
    """The recommendation, what was assumed of the machine, what is just out of reach."""

    found: Recommendation
    assumed: tuple[str, ...]
    beyond: tuple[GivesWay, ...]
    notes: tuple[str, ...] = ()


def recommend(request: RecommendRequest) -> Recommended:
    """The model and level for a use on a machine, with reasons, what to take instead, and the whole table.

    Raises:
        UsageError: no such use, an unknown machine, a cache of an unknown type.
        BadInput: a faulty row in the user's catalogue.
    """
    from bitladder.files.catalogue import find_models
    from bitladder.files.quality_prior import published_costs
    from bitladder.plan import recommend as policy
    from bitladder.plan.placement import usable_ram, usable_vram
    from bitladder.stages.search import candidate_of, just_out_of_reach

    use = policy.use_named(request.use)
    here, rates, shareable, assumed = _machine(request.run.machine)
    reserve = _reserve(request.reserve, here)
    machine = policy.with_room(here, reserve, shareable)
    least = use.least_decode if request.least_decode is None else request.least_decode
    wish = replace(request.run.wish, n_ctx=request.run.n_ctx or use.n_ctx)
    candidates, published = [candidate_of(row) for row in find_models(request.text)], published_costs()
    rows = policy.rate_all(candidates, machine, rates, wish, use, published)
    answer = policy.best_of(rows, least)
    long_wish = replace(wish, n_ctx=policy.LONG_CTX)
    long_rows = (
        policy.rate_all(candidates, machine, rates, long_wish, use, published) if wish.n_ctx < policy.LONG_CTX else []
    )
    table = policy.best_per_model(rows, least)
    found = policy.Recommendation(
        machine=_called(request.run.machine, here),
        use=use.name,
        n_ctx=wish.n_ctx,
        least_decode=least,
        reserve_bytes=reserve,
        usable_bytes=usable_ram(machine) + usable_vram(machine),
        answer=answer,
        reasons=policy.reasons(answer, rows, machine, reserve, use, least) if answer else (),
        alternatives=policy.alternatives(rows, long_rows, answer, least) if answer else (),
        sizes=policy.size_verdicts(candidates, machine, rates),
        table=tuple(table),
    )
    beyond = just_out_of_reach(
        machine, rates, wish, [row.option for row in table], text=request.text, least_decode=least
    )
    return Recommended(found, assumed, tuple(beyond), _now(answer, here) if request.run.machine is None else ())


def roomy_machine(words: str | None, reserve: int | None) -> tuple[Machine, str]:
    """A machine (None: this one) with room left for the system and other programs, and what to call it.

    Raises:
        UsageError: an unknown machine.
    """
    from bitladder.plan.recommend import with_room

    here, _, shareable, _ = _machine(words)
    return with_room(here, _reserve(reserve, here), shareable), _called(words, here)


def _reserve(wanted: int | None, machine: Machine) -> int:
    from bitladder.plan.recommend import usual_reserve

    return usual_reserve(machine.ram_total) if wanted is None else wanted


def _called(words: str | None, machine: Machine) -> str:
    return words or f"this machine ({machine.summary})"


def _machine(words: str | None) -> tuple[Machine, MachineRates, int, tuple[str, ...]]:
    """The machine, its rates, what of its memory may be shared with a GPU, and what was assumed."""
    from bitladder import system
    from bitladder.describe.machine import unified_share
    from bitladder.files.devices import parse_machine
    from bitladder.plan.search import MachineRates
    from bitladder.stages.plan import the_machine

    if words is not None:
        described = parse_machine(words)
        return described.machine, MachineRates(described.cpu, described.gpu), described.shareable, described.assumed
    machine, rates = the_machine(None)
    share = unified_share(machine.ram_total) if machine.unified and system.MACOS else 1.0  # NVIDIA's share all of it
    return machine, rates, int(machine.ram_total * share), ()


def _now(answer: Rated | None, machine: Machine) -> tuple[str, ...]:
    """What stands in the way at this moment."""
    from bitladder.plan.placement import usable_ram
    from bitladder.units import human_bytes

    if answer is None or answer.option.placement.ram_bytes <= usable_ram(machine):
        return ()
    need, free = human_bytes(answer.option.placement.ram_bytes), human_bytes(usable_ram(machine))
    return (f"Right now {free} of RAM can be had and it needs {need}: close other programs first",)
