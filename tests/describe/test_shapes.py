"""Tensors that follow from dimensions alone, against what llama-quantize reports and what config.json files say."""

import json
from pathlib import Path

import pytest

from bitladder.describe.hf_config import shape_of
from bitladder.describe.shapes import Shape, model_of
from bitladder.errors import BadFile, UnknownArchitecture
from bitladder.formats.families import BY_CLASS, planned
from bitladder.levels import parse_level
from bitladder.plan.cost import level_size
from bitladder.units import MiB

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "llama-recipes.json").read_text())["models"]
SHAPED = [(name, level) for name, model in RECORDED.items() if model.get("shape") for level in model["levels"]]
HALF_A_STEP = 0.01
"""llama-quantize prints MiB with two decimals."""


@pytest.mark.parametrize(("name", "level"), SHAPED)
def test_sizes_from_dimensions_are_llama_quantizes(name, level):
    row = RECORDED[name]
    s = row["shape"]
    tied = "output.weight" not in row["levels"][level]["types"]
    shape = Shape(name, s.get("arch", "llama"), s["L"], s["D"], s["F"], s["H"], s["KV"], s["V"], 4096, tied=tied)
    planned = level_size(model_of(shape), parse_level(level)).tensor_bytes
    assert planned / MiB == pytest.approx(row["levels"][level]["mib"], abs=HALF_A_STEP)


PLAIN = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down"
LATENT = {"kv_rank": 8, "q_rank": 8, "qk_nope": 4, "qk_rope": 4, "v_head": 4}
EXPERTS = {"n_expert": 4, "n_expert_used": 2, "n_ff_expert": 32}
# What a layer of each family has, as llama.cpp loads it (it refuses a file with more or fewer).
LAYERS = {
    "llama": PLAIN,
    "granite": PLAIN,
    "gemma": PLAIN,
    "qwen2": PLAIN,
    "qwen3": PLAIN + " attn_q_norm attn_k_norm",
    "gemma2": PLAIN + " post_attention_norm post_ffw_norm",
    "gemma3": PLAIN + " attn_q_norm attn_k_norm post_attention_norm post_ffw_norm",
    "olmo2": "attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm post_attention_norm post_ffw_norm "
    "ffn_gate ffn_up ffn_down",
    "command-r": "attn_norm attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down",
    "smollm3": PLAIN,
    "glm4": "attn_norm attn_q attn_k attn_v attn_output post_attention_norm ffn_norm ffn_up ffn_down post_ffw_norm",
    "phi3": "attn_norm attn_qkv attn_output ffn_norm ffn_up ffn_down",
    "qwen3moe": "attn_norm attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm ffn_norm ffn_gate_inp "
    "ffn_gate_exps ffn_up_exps ffn_down_exps",
    "deepseek2": "attn_norm attn_q_a attn_q_a_norm attn_q_b attn_kv_a_mqa attn_kv_a_norm attn_k_b attn_v_b attn_output "
    "ffn_norm ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_down_exps",
    "gpt-oss": "attn_norm attn_q attn_k attn_v attn_output attn_sinks post_attention_norm ffn_gate_inp ffn_gate_exps "
    "ffn_up_exps ffn_down_exps",
}


@pytest.mark.parametrize("family", planned())
def test_tensors_of_a_layer(family):
    mixture = EXPERTS if "exps" in LAYERS[family] else {}
    shape = Shape("x", family, 1, 64, 128, 4, 2, 100, 512, **mixture, **(LATENT if family == "deepseek2" else {}))
    names = [t.name for t in model_of(shape).tensors if t.name.startswith("blk.0.")]
    weights = {name.removeprefix("blk.0.").removesuffix(".weight") for name in names if name.endswith(".weight")}
    assert weights == set(LAYERS[family].split())
    biases = {"qwen2": 3, "gpt-oss": 8}
    assert sum(name.endswith(".bias") for name in names) == biases.get(family, 0)
    assert len(names) == len(set(names))


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "head_dim": 64, "tie_word_embeddings": True, "rope_scaling": {"rope_type": "llama3", "factor": 32.0},
}  # fmt: skip


def test_a_config_becomes_a_shape():
    assert shape_of("l", LLAMA) == Shape(
        "l", "llama", 16, 2048, 8192, 32, 8, 128256, 131072, head_dim=64, tied=True, rope_factors=32
    )


def test_the_language_part_of_a_model_that_sees():
    text = {key: value for key, value in LLAMA.items() if key not in ("architectures", "rope_scaling")}
    seeing = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {**text, "sliding_window": 1024}}
    shape = shape_of("g", seeing)
    assert (shape.architecture, shape.sliding_window, shape.n_layer) == ("gemma3", 1024, 16)


def test_experts_have_the_type_that_config_json_says():
    """gpt-oss is published in MXFP4; what was trained on from it, or saved anew, is in floats."""
    config = {
        "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "num_local_experts": 4,
    }  # fmt: skip
    assert shape_of("x", config).expert_qtype == "F16"
    assert shape_of("x", config | {"quantization_config": {"quant_method": "mxfp4"}}).expert_qtype == "MXFP4"


def test_windows_that_llama_cpp_ignores_are_ignored():
    assert shape_of("m", {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}).sliding_window == 0


def test_experts_and_latent_attention():
    config = {
        **LLAMA, "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "topk_method": "noaux_tc",
    }  # fmt: skip
    shape = shape_of("d", config)
    assert (shape.n_expert, shape.n_ff_shared, shape.n_dense_layers, shape.kv_rank) == (256, 2048, 3, 512)
    assert shape.expert_bias
    assert {row.architecture for row in BY_CLASS.values()} <= set(planned())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"architectures": ["FooForCausalLM"]}, UnknownArchitecture, "FooForCausalLM"),
        ({"architectures": None}, UnknownArchitecture, "a none"),
        ({"hidden_size": None}, BadFile, "no hidden_size"),
        ({"hidden_size": 0}, BadFile, "has 0 as hidden_size"),
        ({"num_hidden_layers": "16"}, BadFile, "num_hidden_layers is '16'"),
        ({"vocab_size": -1}, BadFile, "vocab_size is -1, not a whole number from 0 to 2,147,483,647"),
        ({"vocab_size": True}, BadFile, "vocab_size is True"),
    ],
)
def test_configs_that_cannot_be_used(change, error, match):
    with pytest.raises(error, match=match):
        shape_of("x", {**LLAMA, **change})
