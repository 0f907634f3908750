"""Gemma: norms stored with 1 added, norms after attention and feed-forward, layers with windows from Gemma 2 on."""

from __future__ import annotations

from bitladder.formats.families.family import CheckpointTraits, Family, Layers, Windows
from bitladder.formats.families.pieces import MLP, RMS, attention, dense, norm

_NORMS = (
    norm("input_layernorm", "attn_norm", "minus_one"),
    norm("post_attention_layernorm", "post_attention_norm", "minus_one"),
    norm("pre_feedforward_layernorm", "ffn_norm", "minus_one"),
    norm("post_feedforward_layernorm", "post_ffw_norm", "minus_one"),
)
_QK_NORMS = (
    norm("self_attn.q_norm", "attn_q_norm", "minus_one"),
    norm("self_attn.k_norm", "attn_k_norm", "minus_one"),
)
_OPTIONS = (
    RMS,
    ("sliding_window", "attention.sliding_window"),
    ("attn_logit_softcapping?", "attn_logit_softcapping"),
    ("final_logit_softcapping?", "final_logit_softcapping"),
)

GEMMA = Family("gemma", CheckpointTraits(("GemmaForCausalLM",), tied=True), features=frozenset())
GEMMA2 = Family(
    "gemma2",
    CheckpointTraits(("Gemma2ForCausalLM",), tied=True),
    features=frozenset({"post_norms"}),
    windows=Windows(2),
    layers=Layers(
        "gemma2",
        (dense((*_NORMS, *attention(bias=False), *MLP)),),
        options=_OPTIONS,
        norm_transform="minus_one",
        scaled_embedding=True,
        wide_query_layers=46,
        windows=Windows(2),
    ),
)
GEMMA3 = Family(
    "gemma3",
    CheckpointTraits(("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), tied=True),
    features=frozenset({"post_norms", "head_norms"}),
    windows=Windows(6),
    layers=Layers(
        "gemma3_text",
        (dense((*_NORMS, *_QK_NORMS, *attention(bias=False), *MLP)),),
        options=_OPTIONS,
        norm_transform="minus_one",
        scaled_embedding=True,
        wide_query_layers=62,
        windows=Windows(6),
        local_rope=True,
    ),
)
GEMMA3N = Family("gemma3n", windows=Windows(5))
