"""Checkpoints of many families, converted and measured in the engine: their perplexity is transformers' own.

Slow: transformers builds each, the real converter converts it. Run with ``-m slow``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bitladder.describe.windows import Window
from bitladder.files.gguf import GgufFile
from bitladder.files.sources import resolve
from bitladder.records.fidelity import Way
from bitladder.stages.engine_importance import engine_importance
from bitladder.stages.engine_scores import engine_scores
from bitladder.stages.engine_way import way_for
from tiny_checkpoints import write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.model]

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_multiple_of": 32}),
    "lfm2moe": ("lfm2_moe", {
        "layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1, **EXPERTS,
    }),
    "gpt-oss": ("gpt_oss", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32, "tie_word_embeddings": False,
    }),
    "cohere2": ("cohere2", {"sliding_window": 32}),
    "granite": ("granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "hunyuan-dense": ("hunyuan_v1_dense", {}),
    "olmoe": ("olmoe", {
        "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "tie_word_embeddings": False,
    }),
    "seed_oss": ("seed_oss", {"tie_word_embeddings": False}),
    "starcoder2": ("starcoder2", {"use_bias": True}),
    "mamba2": ("mamba2", {
        "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2, "chunk_size": 32,
        "intermediate_size": 128,
    }),
    "deepseek2": ("deepseek_v2", {
        "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    }),
}  # fmt: skip
HUB_KEYS = {"cohere2": {"rotary_pct": 1.0}}
"""What config.json on the hub has and transformers does not write."""


def checkpoint(family: str, folder: Path, demo_gguf: Path) -> torch.nn.Module:
    """A tiny random model and its checkpoint, with the demo's tokenizer."""
    model_type, fields = FAMILIES[family]
    folder.mkdir()
    vocab = write_tokenizer(folder, demo_gguf)
    config = transformers.AutoConfig.for_model(
        model_type, **{**SIZES, "vocab_size": vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **fields}
    )
    config.tie_word_embeddings = fields.get("tie_word_embeddings", True)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | HUB_KEYS.get(family, {})))
    return model


def transformers_nll(model: torch.nn.Module, windows: list[Window]) -> np.ndarray:
    found = []
    with torch.no_grad():
        for window in windows:
            tokens = torch.from_numpy(window.tokens)
            logp = model(tokens[None], use_cache=False).logits[0].double().log_softmax(-1)
            at = torch.arange(window.first, len(tokens) - 1)
            found.append(-logp[at, tokens[at + 1]].numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_transformers(family, tmp_path, demo_gguf):
    model = checkpoint(family, tmp_path / "source", demo_gguf)
    rng = np.random.default_rng(3)
    windows = [Window(f"text {n}", rng.integers(3, 40000, 96)) for n in range(3)]
    expected = transformers_nll(model, windows)
    with GgufFile.open(resolve(str(tmp_path / "source")).path) as source:
        assert way_for(source, Way.ENGINE) is Way.ENGINE
        own, same = engine_scores(source, [source], windows, threads=1)
        importance = engine_importance(source, windows, threads=1)
        matrices = {
            t.name
            for t in source.model.tensors
            if len(t.shape) > 1
            and t.name.startswith("blk.")
            and t.shape[-1] > 4
            and t.name.endswith(".weight")
            and "norm" not in t.name
        }
    assert not same.kl.any()
    assert matrices - importance.counts.keys() == set()
    np.testing.assert_allclose(own.nll, expected, rtol=3e-3)  # matrices were converted to 16 bits
