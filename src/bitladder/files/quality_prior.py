"""What levels cost before anything was measured on the model at hand: published perplexities, each with its source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class PublishedCosts:
    """One model that somebody measured at several levels."""

    model: str
    params: float
    """Billions of weights."""
    source: str
    costs: Mapping[str, float]
    """Level -> nats per token lost against 16 bits: the logarithm of the ratio of perplexities."""


@cache
def published_costs() -> tuple[PublishedCosts, ...]:
    """The shipped table, ``data/quality/prior.yaml``."""
    table = _table()
    return tuple(_row(row, table["sources"]) for row in table["models"])


def prior_date() -> str:
    """The day on which the table was last brought up to date, ``2026-11-28``."""
    return str(_table()["as_of"])


@cache
def _table() -> dict[str, Any]:
    text = resources.files("bitladder").joinpath("data/quality/prior.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return loaded


def _row(row: dict[str, Any], sources: Mapping[str, str]) -> PublishedCosts:
    perplexity = row["perplexity"]
    costs = {level: math.log(value / perplexity["F16"]) for level, value in perplexity.items()}
    return PublishedCosts(row["model"], row["params"], sources[row["source"]], costs)
