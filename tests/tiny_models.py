"""Tiny random models of every family: made by transformers, written to GGUF as llama.cpp's converter writes
them.

Names come from gguf's own tensor name map, and what the converter does to weights is written out here once
more, from its source (conversion/*.py), so that the rows in formats/families are tested against something
that does not use them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

N_VOCAB = 96
SIZES = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A tiny model: its transformers side, its GGUF side."""

    model_type: str
    architecture: str
    fields: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    permuted: bool = False
    norm_plus_one: bool = False
    tensors: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}


def _llama3_factors(config: Any) -> dict[str, np.ndarray]:
    """The factors that the converter stores for Llama 3's scaling: plain over scaled frequency."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dims = config.head_dim
    plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, dims, 2) / dims)
    return {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}


_SHORT = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 48}
_WIDE = {"attention.key_length": 24, "attention.value_length": 24}
_GEMMA = {
    "head_dim": 24,
    "sliding_window": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
}
_GEMMA_KEYS = {"attention.sliding_window": 8, **_WIDE}

CASES: dict[str, Case] = {
    "llama": Case("llama", "llama", {"tie_word_embeddings": True}, permuted=True),
    "llama with biases": Case("llama", "llama", {"attention_bias": True}, permuted=True),
    "llama 3 scaling": Case(
        "llama",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
        permuted=True,
        tensors=_llama3_factors,
    ),
    "llama linear": Case(
        "llama",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        permuted=True,
    ),
    "mistral, wide heads": Case("mistral", "llama", {"head_dim": 24}, _WIDE, permuted=True),
    "mixtral": Case(
        "mixtral",
        "llama",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4, "expert_used_count": 2},
        permuted=True,
    ),
    "qwen2": Case("qwen2", "qwen2"),
    "qwen2 yarn": Case(
        "qwen2",
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
    ),
    "qwen2moe": Case(
        "qwen2_moe",
        "qwen2moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 80, "norm_topk_prob": False},
        {**_EXPERT_KEYS, "expert_shared_feed_forward_length": 80},
    ),
    "qwen3": Case("qwen3", "qwen3", {"head_dim": 24}, _WIDE),
    "qwen3moe": Case(
        "qwen3_moe",
        "qwen3moe",
        {**_EXPERTS, "head_dim": 24, "norm_topk_prob": True},
        {**_EXPERT_KEYS, **_WIDE},
    ),
    "gemma2": Case(
        "gemma2",
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {**_GEMMA_KEYS, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        norm_plus_one=True,
    ),
    "gemma3": Case(
        "gemma3_text",
        "gemma3",
        {
            **_GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {**_GEMMA_KEYS, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        norm_plus_one=True,
    ),
    "phi3": Case("phi3", "phi3"),
    "phi3 longrope, part of a head": Case(
        "phi3",
        "phi3",
        {
            "num_attention_heads": 2,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                "short_factor": _SHORT, "long_factor": [8.0] * 8,
            },
        },
        {
            "rope.scaling.original_context_length": 64, "rope.dimension_count": 16,
            "rope.scaling.attn_factor": (1 + 1 / 6) ** 0.5,  # sqrt(1 + log(128 / 64) / log(64))
        },
        tensors=lambda config: {
            "rope_factors_short.weight": np.array(_SHORT, np.float32),
            "rope_factors_long.weight": np.full(8, 8, np.float32),
        },
    ),
    "olmo": Case(
        "olmo", "olmo", {"clip_qkv": 0.5},
        {"attention.clamp_kqv": 0.5, "attention.layer_norm_epsilon": 1e-5},
        permuted=True,
    ),
    "olmo2": Case("olmo2", "olmo2"),
    "smollm3": Case("smollm3", "smollm3", {"num_hidden_layers": 5}, permuted=True),
    "ernie4_5moe": Case(  # the first layer dense; experts 48 wide happen to make a token that noise of 1e-6 turns over
        "ernie4_5_moe",
        "ernie4_5-moe",
        {
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
        },
        {
            "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64, "expert_shared_count": 2,
            "expert_shared_feed_forward_length": 128, "leading_dense_block_count": 1, "interleave_moe_layer_step": 1,
        },
    ),
    "glm4": Case(
        "glm4",
        "glm4",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        {"rope.dimension_count": 8},
    ),
}  # fmt: skip


def make(case: Case, seed: int = 0, **sizes: int) -> Any:
    """A transformers model with random weights everywhere, norms and biases too, float32."""
    config = AutoConfig.for_model(case.model_type, **{**SIZES, **case.fields, **sizes})
    # sdpa knows no soft cap; the plain loop over experts is the definition the others are measured by.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + (1.0 if name.endswith("norm.weight") and not case.norm_plus_one else 0.0))
    return model.float().eval()


def _permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of the converter."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def _converted(case: Case, config: Any, name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """A checkpoint tensor as GGUF tensors, names without the part that gguf's map knows."""
    if name.endswith("experts.gate_up_proj"):
        layer = name.split(".")[2]
        gate, up = np.split(weight, 2, axis=1)
        return {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
    if name.endswith("mlp.gate.moe_statics.e_score_correction_bias"):
        return {f"blk.{name.split('.')[2]}.exp_probs_b.bias": weight.reshape(-1)}
    if name.endswith("experts.down_proj"):
        return {f"blk.{name.split('.')[2]}.ffn_down_exps.weight": weight}
    if case.permuted and ".q_proj." in name:
        weight = _permute(weight, config.num_attention_heads)
    if case.permuted and ".k_proj." in name:
        weight = _permute(weight, config.num_key_value_heads)
    if case.norm_plus_one and name.endswith("norm.weight"):
        weight = weight + 1
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == case.architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    # Mixtral's router had another name in the checkpoints that the map was made for.
    known = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if case.model_type == "mixtral" else name
    target = names.get_name(known, try_suffixes=(".weight", ".bias"))
    assert target is not None, f"gguf has no name for {name}"
    return {target: weight.squeeze()}


def _named_tokens(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """A list of tokens that no engine could cut a text into."""
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{token}" for token in range(n_vocab)])


def write(
    case: Case,
    model: Any,
    path: Path,
    dtype: Any = np.float32,
    tokenizer: Callable[[gguf.GGUFWriter, int], None] = _named_tokens,
) -> Path:
    """Write a tiny model to GGUF; matrices in ``dtype``, vectors in f32. ``tokenizer`` writes its keys."""
    config, arch = model.config, case.architecture
    rope = config.rope_parameters
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", 1e-5),
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
        **case.keys,
    }
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{arch}.{key}", value)
    tokenizer(writer, config.vocab_size)
    tensors = dict(case.tensors(config))
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if not (tied and name == "lm_head.weight"):
            tensors |= _converted(case, config, name, parameter.detach().numpy())
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value.astype(dtype if value.ndim > 1 else np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_merges(writer, n_vocab):
    """As many tokens as the tiny models have, of a tokenizer that llama.cpp loads."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(n_vocab)])
    writer.add_token_types([1] * n_vocab)
    writer.add_token_merges(["t 0"])
