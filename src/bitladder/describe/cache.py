"""What a model keeps per token and per sequence while it runs: its KV cache, layer by layer, in llama.cpp's layout.

A layer keeps one of

    full      a key and a value row of n_head_kv * head_dim weights each, for every token of the context (grouped
              and multi-query attention differ in n_head_kv only)
    window    the same, for the last ``window`` tokens only; which layers have one is the family's pattern
    latent    one row of kv_lora_rank + rope dimensions for every token, no value row (multi-head latent attention)
    state     a convolution and a recurrent state per sequence, 32-bit floats, whatever the context (Mamba, RWKV,
              gated delta nets, short convolutions)

and a few hybrids keep a state and a KV row in the same layer. What a header leaves unsaid is in the family's row
(``formats/families``).
Source: llama.cpp's llama-kv-cache*.cpp, llama-memory-recurrent.cpp and llama-hparams.cpp (build 11549), checked
against what its allocator reports (benchmarks/memory_prediction.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from bitladder.describe.header_keys import HeaderKeys
from bitladder.describe.model import Model, ModelDims
from bitladder.formats.blocks import QTYPES
from bitladder.formats.families import family_of
from bitladder.formats.families.family import StateTraits, Windows


@dataclass(frozen=True)
class LayerCache:
    """What ``count`` like layers keep each. Widths in weights, states in weights per sequence."""

    k_width: int = 0
    v_width: int = 0
    window: int = 0
    """Tokens a window layer sees; 0 for the whole context."""
    state: int = 0
    count: int = 1


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a whole cache, in its parts."""

    full: int
    window: int
    state: int

    @property
    def total(self) -> int:
        """Everything."""
        return self.full + self.window + self.state


def layer_caches(model: Model) -> tuple[LayerCache, ...]:
    """What the layers of a model keep, like layers together."""
    dims, metadata = model.dims, model.metadata
    keys = HeaderKeys(metadata, dims.architecture)
    heads_for_more = keys.number("nextn_predict_layers", 0)  # the last layers, which have a context of their own
    own = dims.n_layer - heads_for_more if heads_for_more < dims.n_layer else dims.n_layer
    rank = keys.number("attention.kv_lora_rank", 0)
    latent = rank + keys.number("rope.dimension_count", 64) if rank else 0
    heads = keys.per_layer("attention.head_count_kv", dims.n_layer, 1 if latent else dims.n_head_kv)
    family = family_of(dims.architecture)
    windows = _windows(family.windows, dims, keys)
    state = _state(dims, keys)
    recurrent = _recurrent(family.states, dims, keys, heads, state)
    caching = own - keys.number("attention.shared_kv_layers", 0)  # the last ones use another layer's cache
    kinds = Counter(zip(heads[:caching], windows[:caching], recurrent[:caching], strict=True))
    layers = []
    for (head_count, window, keeps_state), count in kinds.items():
        attends = head_count > 0 and (not keeps_state or family.states.beside_attention)
        k_head, v_head = _head_dims(dims, keys, bool(window))
        k_width, v_width = (latent, 0) if latent else (head_count * k_head, head_count * v_head)
        layers.append(
            LayerCache(
                k_width=k_width if attends else 0,
                v_width=v_width if attends else 0,
                window=window if attends else 0,
                state=state if keeps_state else 0,
                count=count,
            )
        )
    return tuple(layers)


def cache_bytes(
    layers: tuple[LayerCache, ...],
    n_ctx: int,
    *,
    n_seq: int = 1,
    n_ubatch: int = 512,
    type_k: str = "F16",
    type_v: str = "F16",
) -> CacheBytes:
    """Bytes the engine allocates for ``n_seq`` sequences of ``n_ctx`` tokens each.

    The engine rounds the context up to 256 tokens, and gives a window layer room for the window and one
    micro-batch of
    ``n_ubatch`` tokens, never more than the context.
    """
    cells = padded_context(n_ctx)
    full = window = state = 0
    for layer in layers:
        if layer.window:
            own = min(cells, padded_context(layer.window + n_ubatch))
            window += layer.count * own * _row(layer, type_k, type_v)
        else:
            full += layer.count * cells * _row(layer, type_k, type_v)
        state += layer.count * layer.state * 4
    return CacheBytes(full * n_seq, window * n_seq, state * n_seq)


def cache_bytes_read(
    layers: tuple[LayerCache, ...], n_past: float, *, type_k: str = "F16", type_v: str = "F16"
) -> float:
    """Bytes of cache that decoding one token reads after ``n_past`` tokens; states are read and written."""
    total = 0.0
    for layer in layers:
        seen = min(n_past, layer.window) if layer.window else n_past
        total += layer.count * (seen * _row(layer, type_k, type_v) + 2 * 4 * layer.state)
    return total


def heads_bytes_read(layers: tuple[LayerCache, ...], dims: ModelDims, n_past: float) -> float:
    """The same if every query head read its keys and values for itself, 16 bits each: what a CPU's work follows."""
    seen = sum(
        layer.count * (min(n_past, layer.window) if layer.window else n_past) for layer in layers if layer.k_width
    )
    return 2.0 * seen * dims.n_head * (dims.head_dim_k + dims.head_dim_v)


def padded_context(n_ctx: int) -> int:
    """Cells the engine really makes for a context: the next multiple of 256."""
    return -(-n_ctx // 256) * 256


def _row(layer: LayerCache, type_k: str, type_v: str) -> int:
    """Bytes of one token in one layer. Rows that do not divide into a block count as whole blocks."""
    total = 0
    for width, qtype in ((layer.k_width, QTYPES[type_k]), (layer.v_width, QTYPES[type_v])):
        total += -(-width // qtype.block_size) * qtype.type_size
    return total


def _windows(windows: Windows | None, dims: ModelDims, keys: HeaderKeys) -> list[int]:
    """Per layer the tokens it sees, 0 for all of them. Without a pattern in the row or the header layers see
    everything, also where config.json names a window (llama, qwen2)."""
    window = dims.sliding_window or (windows.tokens if windows else 0)
    stated = keys.raw("attention.sliding_window_pattern")
    if not window:
        return [0] * dims.n_layer
    if isinstance(stated, list) and len(stated) >= dims.n_layer:
        return [window if item else 0 for item in stated[: dims.n_layer]]
    every = stated if isinstance(stated, int) else windows.every if windows else 0
    if every < 2:
        return [window if every == 0 and stated is not None else 0] * dims.n_layer
    pattern = Windows(every, whole_first=windows is not None and windows.whole_first)
    return [window if pattern.window(layer) else 0 for layer in range(dims.n_layer)]


def _head_dims(dims: ModelDims, keys: HeaderKeys, windowed: bool) -> tuple[int, int]:
    """Head dimensions of a layer; a few families use other ones in window layers."""
    if not windowed:
        return dims.head_dim_k, dims.head_dim_v
    return (
        keys.number("attention.key_length_swa", dims.head_dim_k),
        keys.number("attention.value_length_swa", dims.head_dim_v),
    )


def _state(dims: ModelDims, keys: HeaderKeys) -> int:
    """Weights of the convolution and recurrent state of one recurrent layer."""
    conv, inner = keys.number("ssm.conv_kernel", 0), keys.number("ssm.inner_size", 0)
    size, groups = keys.number("ssm.state_size", 0), keys.number("ssm.group_count", 0)
    if inner:
        return max(0, conv - 1) * (inner + 2 * groups * size) + size * inner
    head = keys.number("kda.head_dim", 0)
    if head:  # convolutions of queries, keys and values, and a matrix for each head
        return dims.n_head * head * (3 * max(0, conv - 1) + head)
    head = keys.number("wkv.head_size", 0)
    if head:
        shift = keys.number("token_shift_count", 2)
        return shift * dims.n_embd + head * dims.n_embd
    short = keys.number("shortconv.l_cache", 0)
    return dims.n_embd * (short - 1) if short else 0


def _recurrent(states: StateTraits, dims: ModelDims, keys: HeaderKeys, heads: list[int], state: int) -> list[bool]:
    """Which layers keep a state."""
    if not state:
        return [False] * dims.n_layer
    if states.beside_attention:
        return [True] * dims.n_layer
    if isinstance(keys.raw("attention.head_count_kv"), list):
        ff = keys.raw("feed_forward_length")
        feeds = [isinstance(ff, list) and layer < len(ff) and ff[layer] > 0 for layer in range(dims.n_layer)]
        return [count == 0 and not (states.one_job and feeds[layer]) for layer, count in enumerate(heads)]
    if states.attention_every:
        every = keys.number("full_attention_interval", states.attention_every)
        return [(layer + 1) % every != 0 for layer in range(dims.n_layer)]
    return [True] * dims.n_layer
