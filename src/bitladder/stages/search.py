"""From a machine backward to models: what of the catalogue runs on it, and what a level would need elsewhere."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from bitladder.describe.machine import Machine
from bitladder.describe.rates import MeasuredMachine, PoolRates, from_data_sheet
from bitladder.errors import BadInput
from bitladder.files.catalogue import CatalogueModel, find_models, level_parts, model_named
from bitladder.files.devices import gpu_figures, known_gpus
from bitladder.files.prices import GPUS, price_file
from bitladder.plan.cost import LevelBytes
from bitladder.plan.inverse import HardwareNeed, hardware_needed, price_kinds
from bitladder.plan.placement import Usage
from bitladder.plan.search import CatalogueCandidate, MachineRates, Option, what_would_give

_ASSUMED_PER_CORE, _ASSUMED_RAM = 8e9, 40e9
"""Bytes per second from RAM when nothing was measured: what a core can ask for, what a desktop's memory gives."""
_ASSUMED_FLOPS = 4e10
"""Operations per second and core when nothing was measured."""
READ_SHARE, MATMUL_SHARE = 0.9, 0.7
"""Shares of a data sheet's peaks that plain reading and a large product reach: what turns measured figures into
peaks.
"""
_ASSUMED_GPU = (4e11, 4e13)
"""Bytes and operations per second of a GPU that the table does not know."""


@dataclass(frozen=True)
class GivesWay:
    """A larger model or level than what fits, and the least that would have to give for it."""

    name: str
    level: str
    gives: str


def machine_rates(machine: Machine, measured: MeasuredMachine | None = None) -> MachineRates:
    """How fast the pools of a machine are: measured if it was, else from tables, else assumed."""
    if measured is not None:
        cpu: PoolRates = measured.rates
    else:
        cpu = from_data_sheet(
            min(_ASSUMED_RAM, _ASSUMED_PER_CORE * machine.cores), _ASSUMED_FLOPS * machine.cores, gpu=False
        )
    if not machine.gpus or machine.unified:
        return MachineRates(cpu)
    figures = []
    found = measured.gpus if measured is not None else ()
    for number, gpu in enumerate(machine.gpus):
        row = gpu_figures(gpu.name) or {}
        if number < len(found):
            figures.append((found[number]["read"] / READ_SHARE, found[number]["f16_matmul"] / MATMUL_SHARE))
            continue
        bandwidth = gpu.bandwidth or row.get("bandwidth", 0) * 1e9 or _ASSUMED_GPU[0]
        flops = gpu.flops or row.get("fp16", 0) * 1e12 or _ASSUMED_GPU[1]
        figures.append((bandwidth, flops))
    slowest = min(figures)
    return MachineRates(cpu, from_data_sheet(slowest[0], slowest[1], gpu=True))


def candidate_of(row: CatalogueModel) -> CatalogueCandidate:
    """A catalogue row with its level sizes."""
    levels = tuple(LevelBytes(level, parts) for level, parts in level_parts(row).items())
    return CatalogueCandidate(row.hub, row.licence, row.model, levels, row.params, row.released, row.made_for)


def just_out_of_reach(
    machine: Machine,
    rates: MachineRates,
    wish: Usage,
    options: Sequence[Option],
    *,
    text: str = "",
    least_decode: float = 0.0,
) -> list[GivesWay]:
    """For the next three larger models than the largest that fits: what would have to give for their Q4_K_M."""
    largest = max((row.params for row in options), default=0.0)
    names = {row.name for row in options}
    beyond = [candidate_of(row) for row in find_models(text) if row.params > largest and row.hub not in names]
    beyond.sort(key=lambda candidate: (candidate.params, candidate.name))
    return [
        GivesWay(
            candidate.name,
            level.level,
            what_would_give(candidate, level, machine, rates, wish, least_decode=least_decode),
        )
        for candidate in beyond[:3]
        for level in candidate.levels
        if level.level == "Q4_K_M"
    ]


def hardware_for(name: str, wish: Usage) -> list[HardwareNeed]:
    """What each level of a model of the catalogue needs, and what it saves against 16 bits.

    Raises:
        BadInput: no such model, or a damaged price table.
    """
    candidate = candidate_of(model_named(name))
    kinds = price_kinds(known_gpus(), load_prices())
    reference = next(level for level in candidate.levels if level.level == "F16")
    return [hardware_needed(candidate.model, level, reference, wish, kinds) for level in candidate.levels]


def load_prices() -> dict[str, dict[str, float]]:
    """The user's prices, GPU -> ``purchase`` and ``hourly``; empty without ``prices.yaml`` in the user's data folder.

    Every row must say when and where it was read (``date`` and ``source``).

    Raises:
        BadInput: a row without date or source, or a price that is no number.
    """
    path = price_file()
    if not path.is_file():
        return {}
    try:
        rows = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get(GPUS, {})
    except (yaml.YAMLError, AttributeError) as error:
        raise BadInput(
            f"{path} is no price table: {error}", do="Rows are 'NAME: {purchase, hourly, date, source}'."
        ) from error
    if not isinstance(rows, dict):
        raise BadInput(
            f"{path}: '{GPUS}' is no table of prices.", do="Rows are 'NAME: {purchase, hourly, date, source}'."
        )
    for name, row in rows.items():
        prices = [row.get(key) for key in ("purchase", "hourly")] if isinstance(row, dict) else []
        sound = all(price is None or (isinstance(price, int | float) and price >= 0) for price in prices)
        if not isinstance(row, dict) or not row.get("date") or not row.get("source") or not sound:
            raise BadInput(
                f"{path}: the prices of '{name}' are not complete.",
                means="A price without a date and a source cannot be trusted later.",
                do="Write 'NAME: {purchase: 1500, hourly: 0.4, date: 2026-01-31, source: where}'; leave out what "
                "you lack.",
            )
    unknown = next((str(name) for name in rows if name not in known_gpus()), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known_gpus(), n=3, cutoff=0.4)
        raise BadInput(
            f"{path} has a price of '{unknown}', which no table of GPUs knows.",
            means=f"Nearest known: {', '.join(near)}" if near else "",
            do=f"Spell it as one of {', '.join(known_gpus())}.",
        )
    return dict(rows)
