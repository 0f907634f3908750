"""What a unit takes of a Ray node, in words: ``CPU=2,GPU=0.5,memory=8GB,big=1``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from bitladder.errors import UsageError
from bitladder.units import parse_bytes


@dataclass(frozen=True)
class Needs:
    """Of each unit; what is not named is Ray's default, or what the unit says itself."""

    cpus: float | None = None
    gpus: float | None = None
    memory: int | None = None
    """Bytes."""
    custom: Mapping[str, float] = field(default_factory=dict)


def parse_needs(text: str) -> Needs:
    """Read ``NAME=AMOUNT,...``; CPU, GPU and memory are Ray's own, other names are custom resources.

    Raises:
        UsageError: it is not of that form, or an amount is no positive number.
    """
    found: dict[str, float] = {}
    memory = None
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, equals, amount = (one.strip() for one in part.partition("="))
        if not name or not equals or name in found:
            raise _wrong(part)
        if name == "memory":
            memory = parse_bytes(amount)
            continue
        try:
            number = float(amount)
        except ValueError:
            raise _wrong(part) from None
        if not math.isfinite(number) or number < 0 or (number > 1 and number != int(number)):
            raise _wrong(part)
        found[name] = number
    return Needs(found.pop("CPU", None), found.pop("GPU", None), memory, found)


def _wrong(part: str) -> UsageError:
    return UsageError(
        f"'{part}' is not what a unit can need.",
        means="Each is NAME=AMOUNT: CPU, GPU, memory or a resource that the cluster's nodes were started with. Ray "
        "takes fractions below 1, and whole numbers above.",
        do="For example --unit-needs GPU=0.5,memory=8GB",
    )
