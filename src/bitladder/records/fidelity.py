"""How close a level's predictions stay to the reference's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from bitladder.records import OPTIONAL, Real


class Way(StrEnum):
    """What computed the predictions that were compared."""

    WALK = "walk"
    """Layers one by one in 32-bit floats: what the weights alone cost."""
    ENGINE = "engine"
    """llama.cpp on the files as they run, its rounding of inputs included."""
    DEPLOYED = "deployed"
    """The same with the KV cache and the attention that a server has, deep in a context; the reference with 16 bits."""


@dataclass(frozen=True)
class Losses:
    """What a level loses on some scored tokens, compared with the reference on the same ones.

    ``kl`` is the divergence KL(reference || level) of the next-token distributions in nats, per scored token;
    ``ppl_ratio`` the perplexity over the reference's; ``top1`` the share of tokens whose most likely next token is the
    same. ``*_low`` and ``*_high`` are 95% intervals that resample documents (or, in a single text, windows).
    """

    tokens: int
    kl_mean: Real
    kl_low: Real
    kl_high: Real
    kl_p99: Real
    ppl_ratio: Real
    ppl_ratio_low: Real
    ppl_ratio_high: Real
    top1: Real
    top1_low: Real
    top1_high: Real

    @property
    def losses(self) -> dict[str, Any]:
        """These figures by name."""
        return {one.name: getattr(self, one.name) for one in fields(Losses)}


@dataclass(frozen=True, kw_only=True)
class AtDepth(Losses):
    """Losses at one depth: the same scored tokens behind a longer or a shorter context."""

    depth: int
    """Tokens of context, the scored ones included."""
    rise: Real = math.nan
    """KL here over the KL at the shallowest depth, paired by document; NaN there."""
    rise_low: Real = math.nan
    rise_high: Real = math.nan

    @property
    def rises(self) -> bool:
        """Whether the loss is surely larger here than at the shallowest depth."""
        return self.rise_low > 1


@dataclass(frozen=True, kw_only=True)
class Fidelity(Losses):
    """Token-level comparison of a level with the reference. ``ppl`` is exp(mean negative log-likelihood) over scored
    tokens.
    """

    level: str
    units: int
    """How many units were resampled for the intervals."""
    unit: str
    """``document`` or ``window``."""
    kl_median: Real
    kl_max: Real
    ppl: Real
    ppl_reference: Real
    kl_median_low: Real = math.nan
    kl_median_high: Real = math.nan
    kl_p99_low: Real = math.nan
    kl_p99_high: Real = math.nan
    unit_kl: tuple[Real, ...] = ()
    """Mean KL of each unit, nats per token."""
    unit_tokens: tuple[int, ...] = ()
    """Scored tokens of each unit."""
    way: Way = Way.WALK
    """Figures of different ways are not compared with one another."""
    depths: tuple[AtDepth, ...] = field(default=(), metadata=OPTIONAL)
    """By depth, the shallowest first, where it was measured so; the figures above are over all of them then."""

    @property
    def has_units(self) -> bool:
        """Whether the figures of at least two units are there and make sense: earlier versions kept none, and a record
        may come from anywhere."""
        whole = 1 < len(self.unit_kl) == len(self.unit_tokens) and min(self.unit_tokens) > 0
        return whole and all(0 <= kl < math.inf for kl in self.unit_kl)
