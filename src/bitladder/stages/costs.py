"""What a million answer tokens cost with each level of a run, where the user gave prices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitladder.describe.machine import Machine
from bitladder.engines.endpoint import EndpointSettings
from bitladder.files.devices import known_gpu
from bitladder.files.prices import Hourly, Price, machine_price, price_of
from bitladder.records.evaluation import LevelAnswers
from bitladder.records.run import LevelCost
from bitladder.stages.search import load_prices


@dataclass(frozen=True)
class Prices:
    """What of a run has a price."""

    hourly: Hourly | None
    """An hour here."""
    elsewhere: Mapping[str, tuple[str, Price | None]]
    """Name in tables of everything behind an address, to its model and the price of that."""


def prices_of(machine: Machine, endpoints: Mapping[str, EndpointSettings]) -> Prices:
    """The user's prices of this machine and of the models at addresses, which are given by their names in tables.

    Raises:
        BadInput: the table of prices has a fault.
    """
    return Prices(_hourly(machine), {name: (one.model, price_of(one.model)) for name, one in endpoints.items()})


def level_costs(answers: Sequence[LevelAnswers], prices: Prices) -> tuple[LevelCost, ...]:
    """A cost for everything that answered and has a price: here of the hour and the measured speed, at an address of
    the row of its model."""
    found = []
    for level in answers:
        rate = level.speed.decode_tokens_per_s
        if level.level in prices.elsewhere:
            model, price = prices.elsewhere[level.level]
            if price is not None:
                found.append(LevelCost(level.level, price.answer, f"{model} as its row in prices.yaml says"))
        elif prices.hourly is not None and math.isfinite(rate) and rate > 0:
            found.append(LevelCost(level.level, prices.hourly.price * 1e6 / rate / 3600, prices.hourly.basis))
    return tuple(found)


def _hourly(machine: Machine) -> Hourly | None:
    """What an hour here costs: the row of this machine, else its GPUs where each has an hourly price."""
    own = machine_price()
    if own is not None or not machine.gpus:
        return own
    prices = load_prices()
    rows = [prices.get(known_gpu(gpu.name) or "", {}) for gpu in machine.gpus]
    if not all(row.get("hourly") is not None for row in rows):
        return None
    price = sum(float(row["hourly"]) for row in rows)
    names = ", ".join(dict.fromkeys(gpu.name for gpu in machine.gpus))
    oldest = min(str(row["date"]) for row in rows)
    return Hourly(price, f"{len(rows)} x {names} at {price:g} an hour together ({oldest})")
