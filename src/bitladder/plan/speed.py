"""How fast a level will be, before it runs: decode from bytes touched, prefill from arithmetic, each with a
range.

    decode    a token reads every weight it uses once: all layers, the output matrix (one row of the
    embedding table only, so
              file size overstates), the active experts of a mixture, and the KV cache of the tokens before
              it.
              seconds = sum over pools and qtypes of bytes / stream rate + layers * layer_s + token_s
    prefill   a prompt of T tokens takes 2 T operations per weight used and 2 T^2 per attention width, at the
    matrix rate of
              each weight's qtype, but never less than reading the weights once per micro-batch (of a mixture: all
              experts). Weights in RAM beside a GPU are lent to it over PCIe for that.

A figure is *measured* when the user's own runs of this model on this machine anchor it, *derived* when it
follows from the
machine's measured rates, *assumed* when data sheets stand in for them; the range widens in that order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitladder.describe.cache import cache_bytes_read, layer_caches
from bitladder.describe.model import Model
from bitladder.describe.rates import PoolRates
from bitladder.formats.blocks import QTYPES
from bitladder.records.plan import Figure, Speed

HOST_TO_DEVICE = 1.2e10
"""Bytes per second over PCIe that llama.cpp gets when it lends the GPU weights that lie in RAM, to compute a prompt."""
LEND_FROM = 32
"""Tokens from which it does."""
RANGES = {"measured": 1.25, "derived": 1.5, "assumed": 2.0}
"""Label -> factor of the range around a prediction, both ways: about the errors benchmarks/speed_prediction.py
found.
"""
N_UBATCH = 512


@dataclass(frozen=True)
class Share:
    """What one pool does for every token: its layers' weights used, by qtype, and its part of the cache."""

    rates: PoolRates
    weight_bytes: Mapping[str, float]
    """qtype -> bytes of the weights that one token uses."""
    held_bytes: Mapping[str, float]
    """qtype -> bytes of all weights here: a batch of tokens uses every expert."""
    layers: float
    cache_share: float
    """Part of the KV cache that lies here, 0 to 1."""

    @property
    def weights(self) -> dict[str, float]:
        """qtype -> weights multiplied per token."""
        return {qtype: 8 * size / QTYPES[qtype].bpw for qtype, size in self.weight_bytes.items()}


def decode_seconds(
    shares: Sequence[Share], model: Model, n_past: float, *, type_k: str = "F16", type_v: str = "F16"
) -> float:
    """Seconds for one token after ``n_past`` others."""
    cache = cache_bytes_read(layer_caches(model), n_past, type_k=type_k, type_v=type_v)
    seconds = max(share.rates.token_s for share in shares)
    for share in shares:
        seconds += sum(size / share.rates.stream_of(qtype) for qtype, size in share.weight_bytes.items())
        seconds += share.layers * share.rates.layer_s + share.cache_share * cache / share.rates.kv_stream
    return seconds


def prefill_seconds(shares: Sequence[Share], model: Model, n_prompt: int) -> float:
    """Seconds to compute a prompt of ``n_prompt`` tokens."""
    dims = model.dims
    batches = math.ceil(n_prompt / N_UBATCH)
    attended = n_prompt * (n_prompt + 1) / 2
    width = 2 * dims.n_head * (dims.head_dim_k + dims.head_dim_v)
    attending = sum(layer.count for layer in layer_caches(model) if layer.k_width)
    seconds = max(share.rates.prompt_s for share in shares)
    lender = next((share.rates for share in shares if len(shares) > 1 and n_prompt >= LEND_FROM), None)
    for number, share in enumerate(shares):
        rates = lender or share.rates
        lent = lender is not None and number > 0
        for qtype, weights in share.weights.items():
            arithmetic = 2 * weights * n_prompt / rates.matmul_of(qtype)
            held = share.held_bytes.get(qtype, 0.0)
            reading = batches * held / (HOST_TO_DEVICE if lent else rates.stream_of(qtype))
            seconds += arithmetic + reading if lent else max(arithmetic, reading)
        seconds += share.cache_share * attending * width * attended / share.rates.attention
        seconds += batches * share.layers * rates.layer_s
    return seconds


def predict(shares: Sequence[Share], model: Model, *, n_prompt: int, n_past: float, anchor: float = 0.0) -> Speed:
    """Decode, prefill and time to first token of a placement.

    ``anchor`` is the factor by which the user's own runs of this model differ from the prediction
    (``anchor_factor``), 0
    when there are none.
    """
    label = "measured" if anchor else _label(shares)
    factor = anchor or 1.0
    per_token = decode_seconds(shares, model, n_past) / factor
    prompt = prefill_seconds(shares, model, n_prompt) / factor
    return Speed(
        decode=_figure(1 / per_token, label, _decode_bound(shares, model, n_past)),
        prefill=_figure(n_prompt / prompt, label, _prefill_bound(shares)),
        first_token=_figure(prompt + per_token, label, "the prompt's arithmetic"),
    )


def anchor_factor(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Median ratio of measured to predicted tokens per second; multiply predictions by it. 0 without runs."""
    ratios = [math.log(real / guess) for guess, real in zip(predicted, measured, strict=True) if guess > 0 and real > 0]
    return math.exp(statistics.median(ratios)) if ratios else 0.0


def _label(shares: Sequence[Share]) -> str:
    sources = {share.rates.source for share in shares}
    return "derived" if sources == {"measured"} else "assumed"


def _figure(value: float, label: str, binds: str) -> Figure:
    factor = RANGES[label]
    return Figure(value, value / factor, value * factor, label, binds)


def _decode_bound(shares: Sequence[Share], model: Model, n_past: float) -> str:
    """The largest part of a token's time, in words."""
    cache = cache_bytes_read(layer_caches(model), n_past)
    parts = {"reading weights": 0.0, "reading the KV cache": 0.0, "starting each layer's work": 0.0}
    for share in shares:
        parts["reading weights"] += sum(
            size / share.rates.stream_of(qtype) for qtype, size in share.weight_bytes.items()
        )
        parts["reading the KV cache"] += share.cache_share * cache / share.rates.kv_stream
        parts["starting each layer's work"] += share.layers * share.rates.layer_s
    return max(parts, key=lambda name: parts[name])


def _prefill_bound(shares: Sequence[Share]) -> str:
    arithmetic = sum(2 * N_UBATCH * w / s.rates.matmul_of(q) for s in shares for q, w in s.weights.items())
    reading = sum(size / s.rates.stream_of(q) for s in shares for q, size in s.weight_bytes.items())
    return "arithmetic" if arithmetic >= reading else "reading weights"
