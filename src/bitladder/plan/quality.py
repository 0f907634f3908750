"""How able a model is expected to be at a level, before anything was measured: a prior that ranks what could be run.

Everything is in nats of loss per token, so that a larger model and a finer level can be weighed against each other:

    size     A / N^a of the law of pre-training losses, with N the effective weights
             (Hoffmann et al. 2022, with the constants of the replication by Besiroglu et al., arXiv 2404.10102)
    level    the published costs of a level, moved to another size by N^-0.23 and averaged as logarithms
             (the exponent: Ouyang et al., arXiv 2411.17691; the costs: ``data/quality/prior.yaml``)

Effective weights are the geometric mean of those in the model and those that a token uses (a rule of thumb for mixtures
of experts), doubled for every 16 months between releases: the compute that reaches a given loss halves every 8 months
(Ho et al., arXiv 2403.05812, interval 5 to 14 months), and at the best split weights grow as its square root.

It knows nothing of data, tuning or a task. It is there to keep a large model at 2 bits from leading a smaller one at 4;
only a measurement says more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.files.quality_prior import PublishedCosts
from bitladder.formats.blocks import QTYPES
from bitladder.plan.cost import LevelBytes
from bitladder.plan.search import CatalogueCandidate

SIZE_SCALE, SIZE_EXPONENT = 482.01, 0.3478
"""A and a of A / N^a, in nats per token with N in weights."""
COST_EXPONENT = 0.23
"""A level costs a model of N weights about N^-0.23."""
MONTHS_PER_DOUBLING = 16.0
"""Months after which a model of half the weights is as able."""


@dataclass(frozen=True)
class LevelCost:
    """What a level is expected to lose, nats per token: the mean over published models, the least and the most."""

    value: float
    low: float
    high: float


def level_cost(level: str, params: float, published: Sequence[PublishedCosts]) -> LevelCost | None:
    """The prior of a level's cost for a model of ``params`` billion weights; None for a level that nobody published.

    16 bits cost nothing.
    """
    if level in ("F16", "BF16", "F32"):
        return LevelCost(0.0, 0.0, 0.0)
    moved = [row.costs[level] * (row.params / params) ** COST_EXPONENT for row in published if level in row.costs]
    if not moved:
        return None
    return LevelCost(math.exp(sum(map(math.log, moved)) / len(moved)), min(moved), max(moved))


def effective_weights(candidate: CatalogueCandidate, newest: str) -> float:
    """Weights of a dense model of the month ``newest`` (``2026-04``) that is expected to be as able.

    Tables that a token reads a row of are not counted. A model without a month counts as the newest.
    """
    level, dims = candidate.levels[0], candidate.model.dims
    layers, experts = _weights(level, "layers"), _weights(level, "experts")
    head = dims.n_vocab * dims.n_embd
    used = dims.n_expert_used / dims.n_expert if dims.n_expert else 1.0
    held, active = layers + experts + head, layers + experts * used + head
    months = _month(newest) - _month(candidate.released or newest)
    return math.sqrt(held * active) / 2 ** (months / MONTHS_PER_DOUBLING)


def size_loss(weights: float) -> float:
    """The part of a model's loss that more weights would take away, nats per token."""
    return float(SIZE_SCALE / weights**SIZE_EXPONENT)


def _weights(level: LevelBytes, part: str) -> float:
    return sum(8 * size / QTYPES[qtype].bpw for qtype, size in level.parts.get(part, {}).items())


def _month(text: str) -> int:
    year, month = text.split("-")
    return 12 * int(year) + int(month)
