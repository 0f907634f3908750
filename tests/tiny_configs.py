"""Tiny checkpoints of many architectures, random weights from transformers' own configuration classes, every structure
of the family switched on. Their figures mean nothing; names and rules of shapes are the family's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

N_VOCAB = 256

_BASE = {
    "vocab_size": N_VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
_NEAR, _FAR = "sliding_attention", "full_attention"
_HEAD = {"head_dim": 16}
_FOUR = {"num_hidden_layers": 4}
_MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_MOE = {
    "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_DELTA_NET = {
    **_FOUR, **_HEAD, "linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip
_QWEN_EXPERTS = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
_SECTIONS = {
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_d_conv": 4,
}  # fmt: skip
_NEMOTRON = {
    **_HEAD, **_FOUR, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16, "expand": 2,
    "conv_kernel": 4,
}  # fmt: skip
_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", _HEAD),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", _QWEN_EXPERTS),
    "qwen3": ("qwen3", _HEAD),
    "qwen3_moe": ("qwen3_moe", {**_HEAD, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_next": ("qwen3_next", {**_DELTA_NET, **_QWEN_EXPERTS}),
    "qwen3_5": ("qwen3_5_text", {**_DELTA_NET, **_SECTIONS}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**_DELTA_NET, **_QWEN_EXPERTS, **_SECTIONS}),
    "gemma2": ("gemma2", _HEAD),
    "gemma3": ("gemma3_text", {**_HEAD, "sliding_window": 128, "num_hidden_layers": 6}),
    "gemma3n": (
        "gemma3n_text",
        {
            # the engine has constants here: 20 layers with keys of their own, 256 inputs for each layer, a rank of 64
            **_HEAD, "num_hidden_layers": 22, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": N_VOCAB, "laurel_rank": 64, "sliding_window": 128,
            "intermediate_size": [96] * 22, "activation_sparsity_pattern": [0.0] * 22,
            "layer_types": [_NEAR, _FAR] * 11,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            **_HEAD, "global_head_dim": 32, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": N_VOCAB,
            "num_kv_shared_layers": 0, "layer_types": [_NEAR, _FAR],
        },
    ),
    "phi3": ("phi3", {}),
    "phi3_longrope": (
        "phi3",
        {
            "max_position_embeddings": 1024, "original_max_position_embeddings": 512,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        },
    ),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 128, **_FOUR}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {**_HEAD, **_FOUR, "sliding_window": 128}),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_MAMBA, **_FOUR, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32,
            "layer_types": ["mamba", "mamba", "attention", "mamba"], "position_embedding_type": "nope",
        },
    ),
    "smollm3": ("smollm3", _FOUR),
    "glm4": ("glm4", _HEAD),
    "glm4_moe": ("glm4_moe", {**_HEAD, **_MOE}),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        {**_MLA, **_MOE, "num_hidden_layers": 3, "index_topk": 64, "index_head_dim": 128, "index_n_heads": 2},
    ),
    "deepseek_v2": ("deepseek_v2", {**_MLA, **_MOE, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", {**_MLA, **_MOE, "n_group": 2}),
    "kimi_linear": (
        "kimi_linear",
        {
            **_MLA, **_MOE, **_FOUR, "q_lora_rank": None, "num_experts": 8, "num_shared_experts": 1,
            "num_experts_per_token": 2,
            "linear_attn_config": {
                "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 16, "num_heads": 8,
                "short_conv_kernel_size": 4,
            },
        },
    ),
    "mistral4": (
        "mistral3",
        {
            "text_config": {**_BASE, **_MLA, **_MOE, "model_type": "mistral4"},
            "vision_config": {**_SIGHT, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "head_dim": 16},
        },
    ),
    "ministral3": ("ministral3", _HEAD),
    "gpt_oss": (
        "gpt_oss", {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128}
    ),
    "llama4": (
        "llama4_text",
        {
            **_HEAD, **_FOUR, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
        },
    ),
    "lfm2": ("lfm2", {**_FOUR, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "lfm2_moe": (
        "lfm2_moe",
        {
            **_FOUR, "layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1,
        },
    ),
    "nemotron_h": (
        "nemotron_h", {**_NEMOTRON, "layers_block_type": ["mamba", "attention", "mlp", "mamba"]}
    ),
    "nemotron_h_moe": (
        "nemotron_h",
        {
            **_NEMOTRON, "layers_block_type": ["mamba", "attention", "moe", "mamba"], "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "mamba2": (
        "mamba2",
        {
            "intermediate_size": 128, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2,
            "conv_kernel": 4,
        },
    ),
    "falcon_h1": ("falcon_h1", {**_MAMBA, **_HEAD, "mamba_d_ssm": 128}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEAD),
    "ernie4_5": ("ernie4_5", _HEAD),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "intermediate_size": 64, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 1,
        },
    ),
    "exaone4": ("exaone4", {**_HEAD, **_FOUR, "sliding_window": 128, "sliding_window_pattern": 4}),
    "seed_oss": ("seed_oss", _HEAD),
    "minimax_m2": ("minimax_m2", {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16}),
    "starcoder2": ("starcoder2", {}),
    "bitnet": ("bitnet", {"tie_word_embeddings": True}),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "text_config": {**_BASE, **_HEAD, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
            "vision_config": {
                **_SIGHT, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0],
            },
        },
    ),
    "gemma3_vision": (
        "gemma3",
        {
            "text_config": {**_BASE, **_HEAD, "sliding_window": 128},
            "vision_config": {**_SIGHT, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3_vision": (
        "mistral3",
        {
            "text_config": {**_BASE, **_HEAD, "model_type": "mistral"},
            "vision_config": {**_SIGHT, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "head_dim": 16},
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": {**_BASE, "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}},
            "vision_config": {
                **_SIGHT, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0],
            },
        },
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        {
            "text_config": {
                **_BASE, **_HEAD, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
                "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False,
            },
            "vision_config": {
                **_SIGHT, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0],
            },
        },
    ),
    "glm4v": (
        "glm4v",
        {
            "text_config": {
                **_BASE, **_HEAD,
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                    "mrope_section": [2, 1, 1],
                },
            },
            "vision_config": {**_SIGHT, "depth": 1, "num_heads": 2, "out_hidden_size": 64},
        },
    ),
    "gemma": ("gemma", _HEAD),
    "glm4_moe_lite": ("glm4_moe_lite", {**_MLA, **_MOE, "mlp_layer_types": ["dense", "sparse"]}),
    "solar_open": ("solar_open", {**_HEAD, **_MOE}),
    "dots1": ("dots1", {**_HEAD, **_MOE, "sliding_window": None}),
    "hy_v3": (
        "hy_v3",
        {
            **_HEAD, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "exaone_moe": (
        "exaone_moe",
        {
            **_HEAD, **_FOUR, "sliding_window": 128, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
    ),
    "cohere2_moe": (
        "cohere2_moe",
        {
            **_HEAD, **_FOUR, "sliding_window": 128, "num_experts": 8, "num_experts_per_tok": 2,
            "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "prefix_dense_intermediate_size": 96,
        },
    ),
    "afmoe": (
        "afmoe",
        {
            **_HEAD, **_FOUR, "sliding_window": 128, "num_experts": 8, "num_experts_per_tok": 2,
            "num_shared_experts": 1, "moe_intermediate_size": 32, "num_dense_layers": 1,
        },
    ),
    "granitemoeshared": (
        "granitemoeshared", {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32}
    ),
    "minicpm3": ("minicpm3", {**_MLA, "dim_model_base": 32}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", _HEAD),
    "bamba": ("bamba", {**_MAMBA, **_FOUR, "attn_layer_indices": [2]}),
    "jamba": (
        "jamba",
        {
            **_FOUR, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 4, "attn_layer_offset": 2,
            "mamba_dt_rank": 8,
        },
    ),
    "mamba": ("mamba", {"time_step_rank": 8, "intermediate_size": 128}),
    "falcon_mamba": ("falcon_mamba", {"time_step_rank": 8, "intermediate_size": 128}),
    "jais2": ("jais2", _HEAD),
    "nemotron": ("nemotron", _HEAD),
    "stablelm": ("stablelm", {}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "falcon": ("falcon", {"ffn_hidden_size": 128, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 128, "num_key_value_heads": None}),
    "gpt2": ("gpt2", {"n_positions": 512, "num_key_value_heads": None}),
    "gpt_bigcode": ("gpt_bigcode", {"n_positions": 512, "num_key_value_heads": None}),
}  # fmt: skip
"""Name -> transformers' model type, and what its configuration has beside or instead of ``_BASE``."""


HUB_KEYS: dict[str, dict[str, Any]] = {
    "cohere2": {"rotary_pct": 1.0},
    "gpt2": {"n_ctx": 512},
    "gpt_neox": {"rotary_pct": 0.25},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
    "kimi_linear": {"moe_router_activation_func": "sigmoid"},
    "minimax_m2": {"scoring_func": "sigmoid"},
    "nemotron_h": {"hybrid_override_pattern": "M*-M", "layers_block_type": None},
    "nemotron_h_moe": {"hybrid_override_pattern": "M*EM", "layers_block_type": None},
}
"""What the hub's config.json has and transformers leaves out, or words otherwise, when it saves one; converters ask for
it. None: the hub's has no such key."""
HUB_NAMES: dict[str, dict[str, str]] = {"kimi_linear": {".layers.0.block_sparse_moe.": ".layers.0.mlp."}}
"""What the hub's names of tensors have where transformers writes another one."""
HUB_COPIES: dict[str, dict[str, str]] = {"gemma3n": {".layers.20.": ".layers.18.", ".layers.21.": ".layers.19."}}
"""Layers that have tensors on the hub which transformers neither reads nor saves (the engine wants them): here those of
another layer."""
PIECES = {
    "bitnet", "ernie4_5", "ernie4_5_moe", "gemma", "gemma2", "gemma3", "gemma3n", "gemma3_vision", "gemma4", "jamba",
    "minicpm3", "nemotron", "phi3", "phi3_longrope",
}  # fmt: skip
"""Families whose converter wants a tokenizer of sentencepiece; the others get a byte-level one."""
_GLM = ("[gMASK]", "<sop>", "<|user|>", "<|observation|>")
ADDED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("glm4", "glm4_moe", "glm_moe_dsa"), _GLM),
    **dict.fromkeys(("phi3", "phi3_longrope"), ("<|endoftext|>",)),
}
"""Control tokens that a family's converter, or the engine, looks for."""


def config_of(name: str, vocab: int = N_VOCAB) -> Any:
    """The configuration, a ``transformers.PretrainedConfig``; ``vocab``: tokens."""
    import transformers

    model_type, own = CONFIGS[name]
    fields = {key: dict(value) if isinstance(value, dict) else value for key, value in {**_BASE, **own}.items()}
    if "text_config" in own:
        fields = {key: fields[key] for key in own}
    text = fields.get("text_config", fields)
    text |= {key: vocab for key in ("vocab_size", "vocab_size_per_layer_input") if key in text}
    return transformers.AutoConfig.for_model(model_type, **fields)


def class_of(config: Any) -> Any:
    """The class of the whole model."""
    import transformers

    seeing = hasattr(config, "text_config")
    auto = transformers.AutoModelForImageTextToText if seeing else transformers.AutoModelForCausalLM
    return auto._model_mapping[type(config)]


def write_config(name: str, folder: Path) -> Path:
    """config.json alone, as a release has it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(name)
    written = {**config.to_dict(), "architectures": [class_of(config).__name__]}
    (folder / "config.json").write_text(json.dumps(_as_released(name, written), default=str))
    return folder


def write_checkpoint(name: str, folder: Path, vocab: int = N_VOCAB) -> Path:
    """A checkpoint of random weights in bfloat16, as transformers saves it, with the hub's keys and no tokenizer."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    config = config_of(name, vocab)
    class_of(config)(config).to(torch.bfloat16).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(_as_released(name, json.loads(path.read_text()))))
    if name in HUB_NAMES or name in HUB_COPIES:
        stored = load_file(folder / "model.safetensors")
        for old, new in HUB_NAMES.get(name, {}).items():
            stored = {tensor.replace(old, new): value for tensor, value in stored.items()}
        for to, of in HUB_COPIES.get(name, {}).items():
            stored = {
                tensor.replace(of, to): value.clone() for tensor, value in stored.items() if of in tensor
            } | stored
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_release(name: str, folder: Path) -> Path:
    """A whole checkpoint: ``write_checkpoint``'s, with a tokenizer of the kind that the family's converter reads."""
    from tiny_tokenizers import write_bytes, write_pieces

    folder.mkdir(parents=True)
    write = write_pieces if name in PIECES else write_bytes
    return write_checkpoint(name, folder, write(folder, ADDED.get(name, ())))


def _as_released(name: str, config: dict[str, Any]) -> dict[str, Any]:
    own = HUB_KEYS.get(name, {})
    return {key: value for key, value in {**config, **own}.items() if value is not None or key not in own}
