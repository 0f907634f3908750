"""Tiny random checkpoints of families that no row describes, every structure switched on, made from transformers' own
configuration classes and converted by llama.cpp's own converter, all in one process."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from bitladder.files.convert import ORIGIN
from converted_by_llama import convert_all

N_VOCAB = 96
SIZES = {
    "vocab_size": N_VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED = {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LATENT = {
    "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
_DELTA = {
    "head_dim": 16, "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
_ALTERNATE = {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_L_cache": 3}
_GEMMA = {
    "head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}  # fmt: skip
_PATCHES = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 4}


@dataclass(frozen=True)
class Tiny:
    """A family: transformers' model type, its fields, and keys that releases have and transformers does not write."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    """The configuration of a tower that sees: ``fields`` are then those of the text model."""
    unread: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Tensors that releases have and transformers has no module for, with their shapes."""


FAMILIES = {
    "granite": Tiny(
        "granite",
        {
            "embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "exaone4": Tiny("exaone4", {"sliding_window": 8, "sliding_window_pattern": 4}),
    "hunyuan dense": Tiny("hunyuan_v1_dense", {"head_dim": 16}),
    "seed-oss": Tiny("seed_oss", {"head_dim": 16}),
    "glm4 moe": Tiny("glm4_moe", {**_ROUTED, "head_dim": 16, "use_qk_norm": True}),
    "lfm2": Tiny("lfm2", {**_ALTERNATE, "block_ff_dim": 96, "block_auto_adjust_ff_dim": False}),
    "gpt-oss": Tiny("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}),
    "deepseek2": Tiny("deepseek_v2", {**_ROUTED, **_LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek3": Tiny("deepseek_v3", {**_ROUTED, **_LATENT, "q_lora_rank": 32}),
    "qwen3.5": Tiny("qwen3_5_text", _DELTA),
    "qwen3.5 that sees": Tiny(
        "qwen3_5",
        _DELTA,
        vision={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 4, "num_position_embeddings": 16,
        },
    ),
    "mistral3 that sees": Tiny(
        "mistral3",
        {"model_type": "ministral3", "head_dim": 16},
        vision={
            "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "head_dim": 16,
        },
    ),
    "qwen3 next": Tiny(
        "qwen3_next",
        {**_DELTA, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    ),
    "llama4": Tiny(
        "llama4_text",
        {
            "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
        },
    ),
    "falcon-h1": Tiny(
        "falcon_h1",
        {
            "head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
            "mamba_n_groups": 1, "mamba_chunk_size": 16,
        },
    ),
    "granite hybrid": Tiny(
        "granitemoehybrid",
        {
            "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 96, "mamba_n_heads": 8,
            "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_expand": 2,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
        },
    ),
    "cohere2": Tiny("cohere2", {"sliding_window": 8, "logit_scale": 0.25}, {"rotary_pct": 1.0}),
    "minimax m2": Tiny(
        "minimax_m2",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        {"rotary_dim": 16, "scoring_func": "sigmoid"},
    ),
    "gemma4": Tiny("gemma4_text", {**_GEMMA, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}),
    "gemma4 small": Tiny(  # inputs of each layer's own, and the last layers read keys and values of earlier ones
        "gemma4_text",
        {
            **_GEMMA, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma3n": Tiny(  # several streams of states, inputs of each layer's own, shared keys, more than a norm at the end
        "gemma3n_text",
        {
            "head_dim": 16, "num_hidden_layers": 5, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 96, "laurel_rank": 8, "sliding_window": 8, "intermediate_size": [96] * 5,
            "activation_sparsity_pattern": [0.5] + [0.0] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        },
        unread={f"model.layers.{layer}.self_attn.{one}_proj.weight": (32, 64) for layer in (3, 4) for one in "kv"},
    ),
    "phi": Tiny("phi", {"num_key_value_heads": 4}),  # a head with a bias
    "qwen2.5 that sees": Tiny(  # of these transformers has no language model by itself
        "qwen2_5_vl",
        {"rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}},
        vision={**_PATCHES, "intermediate_size": 32, "fullatt_block_indexes": [0]},
    ),
    "qwen3 that sees": Tiny(
        "qwen3_vl",
        {"head_dim": 16, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
        vision={**_PATCHES, "intermediate_size": 32, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    ),
    "qwen3 moe that sees": Tiny(
        "qwen3_vl_moe",
        {
            **_EXPERTS, "head_dim": 16, "num_experts": 4,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
        },
        vision={**_PATCHES, "intermediate_size": 32, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    ),
    "mistral4 that sees": Tiny(
        "mistral3",
        {**_ROUTED, **_LATENT, "model_type": "mistral4", "q_lora_rank": 32},
        vision={
            "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "head_dim": 16,
        },
    ),
    "gpt2": Tiny("gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128}, {"n_ctx": 128}),
}  # fmt: skip


def make(tiny: Tiny, seed: int = 0) -> Any:
    """A transformers model with random weights everywhere, norms and biases too, float32."""
    sizes = {"text_config": {**SIZES, **tiny.fields}, "vision_config": tiny.vision} if tiny.vision else None
    config = AutoConfig.for_model(tiny.model_type, **(sizes or {**SIZES, **tiny.fields}))
    kind = AutoModelForImageTextToText if tiny.vision else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager", experts_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_(0.1 * noise)
        for name, buffer in model.named_buffers():
            if name in model.state_dict():  # corrections of routers
                buffer.add_(0.01 * torch.randn(buffer.shape, generator=generator))
    return model.float().eval()


def write_all(folder: Path, names: list[str]) -> dict[str, tuple[Any, Path, Path]]:
    """Models, their checkpoint folders and the files that llama.cpp's converter made of them, beside which their origin
    is noted as Bitladder does it."""
    made, jobs = {}, {}
    for name in names:
        tiny, own = FAMILIES[name], folder / name.replace(" ", "-")
        model, checkpoint, gguf = make(tiny), own / "checkpoint", own / "converted" / "model.gguf"
        model.save_pretrained(checkpoint)
        if tiny.unread:
            more = {path: 0.15 * torch.randn(shape) for path, shape in tiny.unread.items()}
            save_file(
                load_file(checkpoint / "model.safetensors") | more, checkpoint / "model.safetensors", {"format": "pt"}
            )
        gguf.parent.mkdir()
        vocabulary = {"type": "BPE", "vocab": {f"t{token}": token for token in range(N_VOCAB)}, "merges": []}
        (checkpoint / "tokenizer.json").write_text(json.dumps({"model": vocabulary, "added_tokens": []}))
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**config, **tiny.keys}))
        (gguf.parent / ORIGIN).write_text(str(checkpoint.resolve()))
        made[name], jobs[checkpoint] = (model, checkpoint, gguf), gguf
    assert convert_all(jobs) == {}
    return made
