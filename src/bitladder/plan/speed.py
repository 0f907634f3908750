"""How fast a level will be, before it runs: decode from bytes touched, prefill from arithmetic, each with a range.

    decode    a token reads every weight it uses once: all layers, the output matrix (one row of the embedding
              table only, so file size overstates), the active experts of a mixture, and the KV cache of the
              tokens before it. Each row of a matrix costs a little beyond its bytes, which small models with
              their short rows feel, and so does each layer.
              seconds = sum over pools and qtypes of (bytes / stream rate + rows * row_s)
                        + cache / its rate + layers * layer_s + token_s
    prefill   a prompt of T tokens takes 2 T operations per weight of the layers and 2 T^2 per attention width,
              at the matrix rate of each weight's qtype, but never less than reading the weights once per
              micro-batch (of a mixture: all experts). The output matrix, and the last layer's feed-forward
              part, are computed for the last token alone. Weights in RAM beside a GPU are lent to it over PCIe.

A figure is *measured* when the user's own runs of this model on this machine anchor it, *derived* when it
follows from the machine's measured rates, *assumed* when data sheets stand in for them; the range widens in
that order. Measured rates are those of a machine without other work, and whatever else runs only slows down:
below, a range is as much wider as repeats of a measurement differed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bitladder.describe.cache import cache_bytes_read, heads_bytes_read, layer_caches
from bitladder.describe.model import Model, ModelDims
from bitladder.describe.rates import PoolRates
from bitladder.formats.blocks import QTYPES
from bitladder.records.plan import Figure, PlanSpeed
from bitladder.units import Basis

HOST_TO_DEVICE = 1.2e10
"""Bytes per second over PCIe that llama.cpp gets when it lends the GPU weights that lie in RAM, to compute a prompt."""
LEND_FROM = 32
"""Tokens from which it does."""
RANGES = {Basis.MEASURED: 1.15, Basis.DERIVED: 1.25, Basis.ASSUMED: 2.0}
"""Label -> factor of the range around a prediction, both ways, on a machine without noise: the errors that
benchmarks/speed_prediction.py found.
"""
N_UBATCH = 512


@dataclass(frozen=True)
class PoolShare:
    """What one pool does for every token: its layers' weights used, by qtype, and its part of the cache."""

    rates: PoolRates
    weight_bytes: Mapping[str, float]
    """qtype -> bytes of the weights that one token uses."""
    held_bytes: Mapping[str, float]
    """qtype -> bytes of all weights here: a batch of tokens uses every expert."""
    layers: float
    cache_share: float
    """Part of the KV cache that lies here, 0 to 1."""
    head_bytes: Mapping[str, float] = field(default_factory=dict)
    """qtype -> bytes of the output matrix, where it lies here; ``weight_bytes`` has them too."""

    def layer_weights(self, qtype: str) -> float:
        """Weights of the layers that one token uses."""
        return _weights(qtype, self.weight_bytes[qtype] - self.head_bytes.get(qtype, 0.0))

    def token_seconds(self, qtype: str, dims: ModelDims) -> float:
        """Reading and multiplying the weights of a type once."""
        rows = self.layer_weights(qtype) * rows_per_weight(dims)
        rows += _weights(qtype, self.head_bytes.get(qtype, 0.0)) / dims.n_embd
        return self.weight_bytes[qtype] / self.rates.stream_of(qtype) + rows * self.rates.row_of(qtype)


def _weights(qtype: str, size: float) -> float:
    return 8 * size / QTYPES[qtype].bpw


def rows_per_weight(dims: ModelDims) -> float:
    """Rows of a layer's matrices per weight: one over the mean length of a row."""
    inner, cached = dims.n_head * dims.head_dim_k, dims.n_head_kv * (dims.head_dim_k + dims.head_dim_v)
    rows = inner + cached + dims.n_embd + 2 * dims.n_ff + dims.n_embd
    return rows / max(1, _attention_weights(dims) + 3 * dims.n_embd * dims.n_ff)


def _attention_weights(dims: ModelDims) -> int:
    inner, cached = dims.n_head * dims.head_dim_k, dims.n_head_kv * (dims.head_dim_k + dims.head_dim_v)
    return dims.n_embd * (2 * inner + cached)


def computed_share(dims: ModelDims) -> float:
    """Part of the layers' weights that every token of a prompt meets: all but the last layer's feed-forward part."""
    feeding = 3 * dims.n_embd * dims.n_ff
    return 1 - feeding / max(1, feeding + _attention_weights(dims)) / dims.n_layer


def decode_seconds(
    shares: Sequence[PoolShare], model: Model, n_past: float, *, type_k: str = "F16", type_v: str = "F16"
) -> float:
    """Seconds for one token after ``n_past`` others."""
    seconds = max(share.rates.token_s for share in shares)
    for share in shares:
        seconds += sum(share.token_seconds(qtype, model.dims) for qtype in share.weight_bytes)
        seconds += share.layers * share.rates.layer_s + _cache_seconds(share, model, n_past, type_k, type_v)
    return seconds


def _cache_seconds(share: PoolShare, model: Model, n_past: float, type_k: str = "F16", type_v: str = "F16") -> float:
    """Attending to the tokens before: by bytes, or by heads where that takes longer."""
    layers = layer_caches(model)
    seconds = cache_bytes_read(layers, n_past, type_k=type_k, type_v=type_v) / share.rates.kv_stream
    if share.rates.heads_stream:
        seconds = max(seconds, heads_bytes_read(layers, model.dims, n_past) / share.rates.heads_stream)
    return share.cache_share * seconds


def prefill_seconds(shares: Sequence[PoolShare], model: Model, n_prompt: int) -> float:
    """Seconds to compute a prompt of ``n_prompt`` tokens."""
    dims = model.dims
    batches = math.ceil(n_prompt / N_UBATCH)
    attended = n_prompt * (n_prompt + 1) / 2
    width = 2 * dims.n_head * (dims.head_dim_k + dims.head_dim_v)
    attending = sum(layer.count for layer in layer_caches(model) if layer.k_width)
    computed, rows = n_prompt * computed_share(dims), rows_per_weight(dims)
    seconds = max(share.rates.prompt_s for share in shares)
    lender = next((share.rates for share in shares if len(shares) > 1 and n_prompt >= LEND_FROM), None)
    for number, share in enumerate(shares):
        rates = lender or share.rates
        lent = lender is not None and number > 0
        for qtype in share.weight_bytes:
            weights = share.layer_weights(qtype)
            arithmetic = weights * computed * (2 / rates.matmul_of(qtype) + rows * rates.prompt_row_of(qtype))
            held = share.held_bytes.get(qtype, 0.0) - share.head_bytes.get(qtype, 0.0)
            reading = batches * held / (HOST_TO_DEVICE if lent else rates.stream_of(qtype))
            seconds += arithmetic + reading if lent else max(arithmetic, reading)
        seconds += sum(size / share.rates.stream_of(qtype) for qtype, size in share.head_bytes.items())
        seconds += share.cache_share * attending * width * attended / share.rates.attention
        seconds += batches * share.layers * rates.layer_s
    return seconds


def predict(
    shares: Sequence[PoolShare], model: Model, *, n_prompt: int, n_past: float, anchor: float = 0.0
) -> PlanSpeed:
    """Decode, prefill and time to first token of a placement.

    ``anchor`` is the factor by which the user's own runs of this model differ from the prediction
    (``anchor_factor``), 0 when there are none.
    """
    label = Basis.MEASURED if anchor else _label(shares)
    noise = max(share.rates.noise for share in shares)
    factor = anchor or 1.0
    per_token = decode_seconds(shares, model, n_past) / factor
    prompt = prefill_seconds(shares, model, n_prompt) / factor
    first = prompt + per_token
    wait = _figure(1 / first, label, noise, "the prompt's arithmetic")
    return PlanSpeed(
        decode=_figure(1 / per_token, label, noise, _decode_bound(shares, model, n_past)),
        prefill=_figure(n_prompt / prompt, label, noise, _prefill_bound(shares)),
        first_token=Figure(first, 1 / wait.high, 1 / wait.low, label, wait.binds),
    )


def anchor_factor(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Median ratio of measured to predicted tokens per second; multiply predictions by it. 0 without runs."""
    ratios = [math.log(real / guess) for guess, real in zip(predicted, measured, strict=True) if guess > 0 and real > 0]
    return math.exp(statistics.median(ratios)) if ratios else 0.0


def _label(shares: Sequence[PoolShare]) -> Basis:
    sources = {share.rates.source for share in shares}
    return Basis.DERIVED if sources == {Basis.MEASURED} else Basis.ASSUMED


def _figure(value: float, label: Basis, noise: float, binds: str) -> Figure:
    """A speed with its range; other programs can only lower it."""
    factor = RANGES[label]
    return Figure(value, value / factor / noise, value * factor, label, binds)


def _decode_bound(shares: Sequence[PoolShare], model: Model, n_past: float) -> str:
    """The largest part of a token's time, in words."""
    parts = {"reading weights": 0.0, "reading the KV cache": 0.0, "starting each layer's work": 0.0}
    for share in shares:
        parts["reading weights"] += sum(share.token_seconds(qtype, model.dims) for qtype in share.weight_bytes)
        parts["reading the KV cache"] += _cache_seconds(share, model, n_past)
        parts["starting each layer's work"] += share.layers * share.rates.layer_s
    return max(parts, key=lambda name: parts[name])


def _prefill_bound(shares: Sequence[PoolShare]) -> str:
    arithmetic = reading = 0.0
    for share in shares:
        for qtype, size in share.weight_bytes.items():
            arithmetic += 2 * N_UBATCH * share.layer_weights(qtype) / share.rates.matmul_of(qtype)
            reading += size / share.rates.stream_of(qtype)
    return "arithmetic" if arithmetic >= reading else "reading weights"
