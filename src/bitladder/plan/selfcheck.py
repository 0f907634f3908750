"""What differences between implementations mean: how large they may be, where two part, what can be trusted.

The engine rounds what its matrices read (Q8 blocks beside quantized weights, 16 bits beside F16 and BF16 ones), the
others do not. How much that may change is not assumed but measured, on the layer itself: it is computed with plain and
with rounded inputs, and the engine may differ from the rounded result by ``ROUNDINGS`` times what rounding changed. On
top of that comes what sums in another order and tables of functions (GELU in 16 bits) make: a share of what the layer
changes, and 32-bit rounding of what it is given. On the demo model the engine's own difference is half of what rounding
changes, at most 1.2 times for any token; a wrong mask, norm or permutation changes more than ten times as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitladder.records.selfcheck import HEAD, ComparedPair, ComparedSide, Implementation, LayerGap, Trust, TrustedPart

Numbers = NDArray[np.float64]

ROUNDINGS = 2.0
"""Times what rounding changes."""
ENGINE_SHARE, EXACT_SHARE = 2e-3, 1e-4
"""Of what a layer changes: beside the engine, and where both compute in 32-bit floats."""
SIZE_SHARE = 2e-6
"""Of the length of what a layer is given: a sum of 32-bit floats."""
WEIGHT_SHARES = {"F16": 5e-3, "BF16": 4e-2}
"""Of what a layer changes, where a checkpoint's weights were rounded to this type in the file: ten times a half of its
last bit. Only files that other converters wrote have that; Bitladder keeps a checkpoint's type."""
OUTSIDE, OUTSIDE_ROUTED = 0.02, 0.1
"""Share of tokens that may be outside: where experts are chosen, two that are nearly alike can change places."""
KL_ROUNDINGS, KL_FLOOR = 10.0, 1e-4
"""KL divergence grows as the square of differences."""


@dataclass(frozen=True)
class Bound:
    """How large a token's difference may be."""

    roundings: float
    share: float
    outside: float

    def of(self, rounding: Numbers, change: Numbers, size: Numbers) -> Numbers:
        """f64[tokens] of lengths f64[tokens]: what rounding changes, what the layer changes, what it is given."""
        return self.roundings * rounding + self.share * change + SIZE_SHARE * size

    @property
    def words(self) -> str:
        """How it was set."""
        parts = [f"{self.share:.2g} of what the layer changes", f"{SIZE_SHARE:.0e} of what it is given"]
        if self.roundings:
            parts.insert(0, f"{self.roundings:g} times what rounding the inputs of its matrices changes there")
        return f"{' + '.join(parts)}; at most {self.outside:.0%} of the tokens outside"


def bound_of(one: Implementation, other: Implementation, *, routed: bool, weight_share: float) -> Bound:
    """Of two implementations. ``routed``: a router chooses experts. ``weight_share``: see ``WEIGHT_SHARES``."""
    engine = Implementation.ENGINE in (one, other)
    transformers = Implementation.TRANSFORMERS in (one, other)
    share = (ENGINE_SHARE if engine else EXACT_SHARE) + (weight_share if transformers else 0.0)
    return Bound(ROUNDINGS if engine else 0.0, share, OUTSIDE_ROUTED if routed else OUTSIDE)


def layer_gap(layer: int, gap: Numbers, rounding: Numbers, change: Numbers, size: Numbers, bound: Bound) -> LayerGap:
    """A layer's verdict from lengths f64[tokens]; what is not finite is outside."""
    allowed = bound.of(rounding, change, size)
    outside = float(np.mean(~(gap <= allowed)))
    scale = np.where(change > 0, change, 1.0)
    return LayerGap(
        layer, _finite(np.median(gap / scale)), _finite(np.median(allowed / scale)), outside, outside > bound.outside
    )


def _finite(value: np.floating) -> float:
    return float(value) if np.isfinite(value) else math.inf


def comparison(
    one: Implementation, other: Implementation, layers: Sequence[LayerGap], bound: Bound, *, kl_mean: float,
    kl_rounding: float, top1: float, unseen: str = "",
) -> ComparedPair:  # fmt: skip
    """Two implementations part where a layer does; where none is seen, where predictions differ by more than rounding
    explains. ``kl_rounding``: KL that rounding alone makes."""
    first = next((gap.layer for gap in layers if gap.parts), None)
    kl_bound = KL_ROUNDINGS * kl_rounding + KL_FLOOR
    agrees = first is None if layers else kl_mean <= kl_bound
    return ComparedPair(one, other, tuple(layers), unseen, bound.words, kl_mean, kl_bound, top1, first, agrees)


@dataclass(frozen=True)
class _Standing:
    """Where one implementation stands among the others."""

    trust: Trust
    why: str


def trust(
    compared: Sequence[ComparedSide], comparisons: Sequence[ComparedPair], *, measured_by: Implementation,
    from_checkpoint: bool,
) -> tuple[TrustedPart, ...]:  # fmt: skip
    """What can be trusted.

    Args:
        compared: all three implementations.
        comparisons: those that were made.
        measured_by: what fidelity and importance of this model come from.
        from_checkpoint: transformers read the checkpoint and not the file.
    """
    stands = {one.name: _standing(one, comparisons) for one in compared}
    walk, engine = stands[Implementation.WALK], stands[Implementation.ENGINE]
    own = stands[Implementation.TRANSFORMERS]
    measured = stands[measured_by]
    calibrated = walk
    if from_checkpoint and walk.trust is Trust.YES and own.trust is Trust.NO:
        calibrated = _Standing(Trust.NO, f"checkpoint levels run in transformers' layers, and {own.why}")
    parts = {
        "fidelity": (measured_by, measured),
        "importance": (measured_by, measured),
        "calibration": (Implementation.WALK, calibrated),
        "recipes": (Implementation.WALK, walk),
        "workload": (Implementation.ENGINE, engine),
    }
    found = [TrustedPart(what, way.value, one.trust, one.why) for what, (way, one) in parts.items()]
    if from_checkpoint:
        found.insert(0, TrustedPart("conversion", "converter", *_conversion(own)))
    return tuple(found)


def _conversion(own: _Standing) -> tuple[Trust, str]:
    if own.trust is Trust.NO:
        return Trust.NO, f"the file is not what transformers makes of the checkpoint: {own.why}"
    return own.trust, own.why


def _standing(one: ComparedSide, comparisons: Sequence[ComparedPair]) -> _Standing:
    if one.missing:
        return _Standing(Trust.NO, f"{_NAMES[one.name]} cannot go: {one.missing}")
    own = [made for made in comparisons if one.name in (made.one, made.other)]
    if not own:
        return _Standing(Trust.UNCHECKED, "there is nothing to compare it with")
    agreeing = [_NAMES[_partner(made, one.name)] for made in own if made.agrees]
    if agreeing:
        return _Standing(Trust.YES, f"{_NAMES[one.name]} agrees with {' and '.join(agreeing)}")
    where = " and ".join(f"{_NAMES[_partner(made, one.name)]} {place(made.first)}" for made in own)
    alone = any(made.agrees for made in comparisons)
    more = "" if alone else "; which of them is wrong is not known"
    return _Standing(Trust.NO, f"{_NAMES[one.name]} parts from {where}{more}")


_NAMES = {
    Implementation.WALK: "the walk", Implementation.TRANSFORMERS: "transformers", Implementation.ENGINE: "the engine",
}  # fmt: skip


def _partner(made: ComparedPair, name: Implementation) -> Implementation:
    return made.other if made.one is name else made.one


def place(layer: int | None) -> str:
    """Where two part, in words: a layer, ``HEAD``, or None for predictions whose layers were not seen."""
    if layer is None:
        return "in its predictions"
    if layer == 0:
        return "at layer 0, or at the embedding before it"
    return "at the norm or the head behind the layers" if layer == HEAD else f"at layer {layer}"


def blind_spots(windows: Mapping[int, int], n: int, n_ctx: int) -> tuple[str, ...]:
    """What windows of ``n`` tokens cannot show. ``windows``: sliding windows in tokens, with how many layers have them;
    ``n_ctx``: the trained context."""
    found = []
    for size, layers in sorted(windows.items()):
        if size >= n:
            found.append(
                f"{layers} layers see a window of {size} tokens only, which {n} tokens do not reach: "
                f"--tokens {size + 32} would."
            )
    if n < n_ctx:
        found.append(f"Positions beyond {n} were not compared (trained for {n_ctx}).")
    return tuple(found)
