"""The tensors of a model from its dimensions alone, in GGUF names and order of layers.

This is how sizes are exact before anything is downloaded. A family's row (``formats/families``) has the set of its
features; what a feature adds to a layer is written once, here. Checked by giving files without weights to
llama.cpp, which refuses a missing tensor or a wrong shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from bitladder.describe.model import Model, ModelDims
from bitladder.errors import UnknownArchitecture
from bitladder.formats.families import family_of, planned
from bitladder.formats.families.family import Feature
from bitladder.formats.tensors import TensorInfo


@dataclass(frozen=True)
class Shape:
    """Dimensions from which a model's tensors follow; llama.cpp's words. Zero means: has none."""

    name: str
    architecture: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_ctx: int
    head_dim: int = 0
    tied: bool = False
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_expert: int = 0
    n_ff_shared: int = 0
    n_dense_layers: int = 0
    expert_bias: bool = False
    sliding_window: int = 0
    rope_factors: int = 0
    """Length of a table of rotation factors stored with the model (Llama 3.1 and later, Phi-3 with long
    context).
    """
    q_rank: int = 0
    kv_rank: int = 0
    qk_nope: int = 0
    qk_rope: int = 0
    v_head: int = 0
    expert_qtype: str = field(default="F16")
    """Experts that are published quantized (MXFP4 of gpt-oss) keep their type."""

    @property
    def head(self) -> int:
        """Weights per head."""
        return self.head_dim or self.n_embd // self.n_head


def model_of(shape: Shape, *, tensors: bool = True) -> Model:
    """A 16-bit model of this shape, as if read from its GGUF header; without ``tensors`` only its dimensions
    and keys.

    Raises:
        UnknownArchitecture: no family of that name has rows here.
    """
    latent = shape.kv_rank > 0
    head_k = shape.kv_rank + shape.qk_rope if latent else shape.head
    dims = ModelDims(
        architecture=shape.architecture,
        n_layer=shape.n_layer,
        n_embd=shape.n_embd,
        n_ff=shape.n_ff,
        n_head=shape.n_head,
        n_head_kv=1 if latent else shape.n_head_kv,
        head_dim_k=head_k,
        head_dim_v=shape.kv_rank if latent else shape.head,
        n_vocab=shape.n_vocab,
        n_ctx_train=shape.n_ctx,
        n_expert=shape.n_expert,
        n_expert_used=shape.n_expert_used,
        sliding_window=shape.sliding_window,
    )
    header = 40 * shape.n_vocab + 100 * 12 * shape.n_layer  # tokens, types, merges; tensor names: about right
    listed = tensors_of(shape) if tensors else ()
    return Model(shape.name, dims, listed, metadata_of(shape), header_bytes=header)


def metadata_of(shape: Shape) -> dict[str, Any]:
    """The header keys that dimensions determine, as a converter would write them."""
    keys: dict[str, Any] = {
        "block_count": shape.n_layer,
        "context_length": shape.n_ctx,
        "embedding_length": shape.n_embd,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": 1 if shape.kv_rank else shape.n_head_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "vocab_size": shape.n_vocab,
    }
    if shape.sliding_window:
        keys["attention.sliding_window"] = shape.sliding_window
    if shape.n_expert:
        keys |= {"expert_count": shape.n_expert, "expert_used_count": shape.n_expert_used}
        keys["expert_feed_forward_length"] = shape.n_ff_expert or shape.n_ff
    if shape.kv_rank:
        keys |= {
            "attention.kv_lora_rank": shape.kv_rank,
            "attention.key_length": shape.kv_rank + shape.qk_rope,
            "attention.value_length": shape.kv_rank,
            "attention.key_length_mla": shape.qk_nope + shape.qk_rope,
            "attention.value_length_mla": shape.v_head,
            "rope.dimension_count": shape.qk_rope,
            "leading_dense_block_count": shape.n_dense_layers,
            "expert_shared_count": shape.n_ff_shared // shape.n_ff_expert if shape.n_ff_expert else 0,
            "expert_weights_scale": 1.0,
        }
        if shape.q_rank:
            keys["attention.q_lora_rank"] = shape.q_rank
    else:
        keys |= {"attention.key_length": shape.head, "attention.value_length": shape.head}
        keys["rope.dimension_count"] = shape.head
    prefixed = {f"{shape.architecture}.{key}": value for key, value in keys.items()}
    return {"general.architecture": shape.architecture, **prefixed}


def tensors_of(shape: Shape) -> tuple[TensorInfo, ...]:
    """Every tensor of the 16-bit model: matrices F16, norms and biases F32.

    Raises:
        UnknownArchitecture: no family of that name has rows here.
    """
    features = family_of(shape.architecture).features
    if features is None:
        raise UnknownArchitecture(
            f"The shapes of the family '{shape.architecture}' are not known.",
            means=f"Known are {', '.join(planned())}.",
            do="Give a GGUF file; its header is enough.",
        )
    tensors = list(_outer(shape))
    for layer in range(shape.n_layer):
        for tensor in _layer(shape, features, layer):
            tensors.append(replace(tensor, name=f"blk.{layer}.{tensor.name}"))
    return tuple(tensors)


def _matrix(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(f"{name}.weight", shape, "F16")


def _vector(name: str, *shape: int, kind: str = "weight") -> TensorInfo:
    return TensorInfo(f"{name}.{kind}", shape, "F32")


def _outer(shape: Shape) -> Iterator[TensorInfo]:
    yield _matrix("token_embd", shape.n_vocab, shape.n_embd)
    yield _vector("output_norm", shape.n_embd)
    if not shape.tied:
        yield _matrix("output", shape.n_vocab, shape.n_embd)
    if shape.rope_factors:
        for name in family_of(shape.architecture).rope_tables.tensors:
            yield _vector(name, shape.rope_factors)


def _layer(shape: Shape, features: frozenset[Feature], layer: int) -> Iterator[TensorInfo]:
    if "only_post_norms" not in features:
        yield _vector("attn_norm", shape.n_embd)
    yield from _latent_attention(shape) if "latent" in features else _attention(shape, features)
    if "post_norms" in features or "only_post_norms" in features:
        yield _vector("post_attention_norm", shape.n_embd)
        yield _vector("post_ffw_norm", shape.n_embd)
    if "ffn_norm_called_post" in features:
        yield _vector("post_attention_norm", shape.n_embd)
    elif "only_post_norms" not in features and "one_norm" not in features:
        yield _vector("ffn_norm", shape.n_embd)
    if shape.n_expert and layer >= shape.n_dense_layers:
        yield from _experts(shape, features)
    elif "fused_gate" in features:
        yield _matrix("ffn_up", 2 * shape.n_ff, shape.n_embd)
        yield _matrix("ffn_down", shape.n_embd, shape.n_ff)
    else:
        yield from _gated("", shape.n_embd, shape.n_ff)


def _attention(shape: Shape, features: frozenset[Feature]) -> Iterator[TensorInfo]:
    q, kv = shape.n_head * shape.head, shape.n_head_kv * shape.head
    if "fused_qkv" in features:
        yield _matrix("attn_qkv", q + 2 * kv, shape.n_embd)
    else:
        yield _matrix("attn_q", q, shape.n_embd)
        yield _matrix("attn_k", kv, shape.n_embd)
        yield _matrix("attn_v", kv, shape.n_embd)
    yield _matrix("attn_output", shape.n_embd, q)
    if features & {"qkv_bias", "all_bias"}:
        for name, size in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
            yield _vector(name, size, kind="bias")
    if "all_bias" in features:
        yield _vector("attn_output", shape.n_embd, kind="bias")
    if "sinks" in features:
        yield _vector("attn_sinks", shape.n_head)
    if "head_norms" in features:
        yield _vector("attn_q_norm", shape.head)
        yield _vector("attn_k_norm", shape.head)
    if "row_norms" in features:
        yield _vector("attn_q_norm", q)
        yield _vector("attn_k_norm", kv)


def _latent_attention(shape: Shape) -> Iterator[TensorInfo]:
    q_head = shape.qk_nope + shape.qk_rope
    if shape.q_rank:
        yield _matrix("attn_q_a", shape.q_rank, shape.n_embd)
        yield _vector("attn_q_a_norm", shape.q_rank)
        yield _matrix("attn_q_b", shape.n_head * q_head, shape.q_rank)
    else:
        yield _matrix("attn_q", shape.n_head * q_head, shape.n_embd)
    yield _matrix("attn_kv_a_mqa", shape.kv_rank + shape.qk_rope, shape.n_embd)
    yield _vector("attn_kv_a_norm", shape.kv_rank)
    yield _matrix("attn_k_b", shape.n_head, shape.kv_rank, shape.qk_nope)
    yield _matrix("attn_v_b", shape.n_head, shape.v_head, shape.kv_rank)
    yield _matrix("attn_output", shape.n_embd, shape.n_head * shape.v_head)


def _gated(suffix: str, n_embd: int, n_ff: int) -> Iterator[TensorInfo]:
    yield _matrix(f"ffn_gate{suffix}", n_ff, n_embd)
    yield _matrix(f"ffn_up{suffix}", n_ff, n_embd)
    yield _matrix(f"ffn_down{suffix}", n_embd, n_ff)


def _experts(shape: Shape, features: frozenset[Feature]) -> Iterator[TensorInfo]:
    experts, wide = shape.n_expert, shape.n_ff_expert or shape.n_ff
    yield _vector("ffn_gate_inp", experts, shape.n_embd)
    for name, rows, columns in (
        ("ffn_gate_exps", wide, shape.n_embd),
        ("ffn_up_exps", wide, shape.n_embd),
        ("ffn_down_exps", shape.n_embd, wide),
    ):
        yield replace(_matrix(name, experts, rows, columns), qtype=shape.expert_qtype)
        if "all_bias" in features:
            yield _vector(name, experts, rows, kind="bias")
    if "all_bias" in features:
        yield _vector("ffn_gate_inp", experts, kind="bias")
    if shape.expert_bias:
        yield _vector("exp_probs_b", experts, kind="bias")
    if shape.n_ff_shared:
        yield from _gated("_shexp", shape.n_embd, shape.n_ff_shared)
