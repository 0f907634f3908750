"""Memory of a running model beside its weights and cache: what llama.cpp allocates to compute in.

The engine computes ``n_ubatch`` tokens at once in one arena, whose size is the largest sum of tensors alive at a time.
Which moment that is depends on the family (T tokens of S sequences, D = n_embd, F = n_ff, u experts in use of F_e each,
q and kv the widths of all heads, H heads, states of I channels and N numbers each, with R heads and B = 2 N groups of
inputs; in 32-bit floats):

    feed-forward       T (3 F + 5 D), without a gate T (F + 5 D)
    experts            T (3 u F_e + 5 D), and u D more where their outputs do not fit into what gate and up leave
                       (2 F_e < D)
    attention          T (3 q + 3 D + 2 kv)
    latent attention   T (H (2 kv_rank + nope + 3 rope) + 5 D)
    Mamba 2            T (5 I + 3 B + 2 R + 4 D + min(D, I / 2)) + 2 N I S, and T D more where the layer attends, too
    gated delta net    T (2 I + 2 B + 4 R + 5 D) + N I S, and 3 T D more where two projections are one matrix
    in addition        a mask of 16-bit floats: T times the cells a sequence sees, once per kind of cache

Source: fitted to what llama.cpp's allocator reports (build 11549, flash attention on) for 90 shapes of 15 families; it
is exact to the report's rounding for all but small feed-forwards and layers with states, where it is some percent more.
benchmarks/memory_prediction.py measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bitladder.describe.cache import LayerCache, cache_bytes, layer_caches, padded_context
from bitladder.describe.header_keys import HeaderKeys
from bitladder.describe.model import Model
from bitladder.formats.families import family_of
from bitladder.units import MiB

N_UBATCH = 512
"""Tokens the engine computes at once, llama.cpp's default."""
ENGINE_BYTES = 96 * MiB
"""What the engine's process takes besides model, cache and compute buffers: code, tokenizer, server."""


@dataclass(frozen=True)
class Buffers:
    """Bytes the engine allocates to compute in, for one micro-batch."""

    compute: int
    output: int

    @property
    def total(self) -> int:
        """Both."""
        return self.compute + self.output


def compute_buffers(model: Model, n_ctx: int, *, n_seq: int = 1, n_ubatch: int = N_UBATCH) -> Buffers:
    """The engine's compute and output buffers for ``n_seq`` sequences of ``n_ctx`` tokens each."""
    cells = padded_context(n_ctx)
    tokens = min(n_ubatch, cells * n_seq)
    masks = _mask_cells(layer_caches(model), cells, n_ubatch)
    floats = max(tokens * _widest_moment(model), _recurrent_moment(model, tokens, n_seq))
    return Buffers(4 * floats + 2 * tokens * masks, 4 * n_seq * model.dims.n_vocab)


def heads_bytes(model: Model, n_ctx: int, *, n_seq: int = 1) -> int:
    """What guessing with a model's own heads for further tokens takes beside it: their cache and buffers of their own.
    The heads' weights are among the model's."""
    heads = HeaderKeys(model.metadata, model.dims.architecture).number("nextn_predict_layers", 0)
    widest = max(layer_caches(model), key=lambda layer: layer.k_width + layer.v_width)
    layer = replace(widest, window=0, state=0, count=heads)
    return cache_bytes((layer,), n_ctx, n_seq=n_seq).total + compute_buffers(model, n_ctx, n_seq=n_seq).total


def _mask_cells(layers: Sequence[LayerCache], cells: int, n_ubatch: int) -> int:
    """Cells that the masks cover: one mask for layers that see everything, one for those with a window."""
    windows = {layer.window for layer in layers if layer.window}
    full = cells if any(layer.k_width and not layer.window for layer in layers) else 0
    return full + sum(min(cells, padded_context(window + n_ubatch)) for window in windows)


def _widest_moment(model: Model) -> int:
    """Floats per token at the moment that needs most."""
    dims = model.dims
    keys = HeaderKeys(model.metadata, dims.architecture)
    wide = dims.n_embd
    moments = [(3 if _gated(model) else 1) * dims.n_ff + 5 * wide]
    if dims.n_expert:
        own = keys.number("expert_feed_forward_length", 0) or dims.n_ff
        used = dims.n_expert_used
        moments.append(3 * used * own + 5 * wide + (used * wide if 2 * own < wide else 0))
        if not keys.number("leading_dense_block_count", 0):
            moments.pop(0)
    rank = keys.number("attention.kv_lora_rank", 0)
    if rank:
        rope = keys.number("rope.dimension_count", 0)
        nope = keys.number("attention.key_length_mla", 0) - rope
        moments.append(dims.n_head * (2 * rank + nope + 3 * rope) + 5 * wide)
    else:
        q, kv = dims.n_head * dims.head_dim_k, dims.n_head_kv * dims.head_dim_k
        moments.append(3 * q + 3 * wide + 2 * kv)
    return max(moments)


def _gated(model: Model) -> bool:
    """Whether feed-forward layers multiply with a gate, as nearly all do: a matrix of its own, or one half of up."""
    ups = [tensor.shape[-2] for tensor in model.tensors if tensor.name.endswith(".ffn_up.weight")]
    gates = any(tensor.name.endswith(".ffn_gate.weight") for tensor in model.tensors)
    return gates or not ups or max(ups) > model.dims.n_ff


def _recurrent_moment(model: Model, tokens: int, n_seq: int) -> int:
    """Floats while a layer with states takes in its tokens; 0 for models without one of a known kind."""
    dims = model.dims
    keys = HeaderKeys(model.metadata, dims.architecture)
    inner, rank = keys.number("ssm.inner_size", 0), keys.number("ssm.time_step_rank", 0)
    size, groups = keys.number("ssm.state_size", 0), keys.number("ssm.group_count", 0)
    parts = {tensor.name.rpartition("ssm_")[2] for tensor in model.tensors if ".ssm_" in tensor.name}
    wide = dims.n_embd
    if parts & {"ba.weight", "beta.weight"}:
        floats = 2 * inner + 4 * size * groups + 4 * rank + (8 if "ba.weight" in parts else 5) * wide
        return tokens * floats + size * inner * n_seq
    if "in.weight" in parts and inner:
        floats = 5 * inner + 6 * size * groups + 2 * rank + 4 * wide + min(wide, inner // 2)
        floats += wide if family_of(dims.architecture).states.beside_attention else 0
        return tokens * floats + 2 * size * inner * n_seq
    return 0
