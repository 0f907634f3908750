"""Phi-3 and Phi-4-mini: queries, keys and values lie fused in the file as they do in transformers, gate and up too."""

from __future__ import annotations

from bitladder.formats.families.family import CheckpointTraits, Family, Layers, RopeTables
from bitladder.formats.families.pieces import FUSED_MLP, PRE_NORMS, RMS, dense, fused_mlp_inputs, linear
from bitladder.formats.roles import SharedInput

PHI3 = Family(
    "phi3",
    CheckpointTraits(("Phi3ForCausalLM",)),
    features=frozenset({"fused_qkv", "fused_gate"}),
    rope_tables=RopeTables(("longrope", "su"), ("rope_factors_long", "rope_factors_short")),
    layers=Layers(
        "phi3",
        (
            dense(
                (
                    *PRE_NORMS,
                    *linear("self_attn.qkv_proj", "attn_qkv"),
                    *linear("self_attn.o_proj", "attn_output"),
                    *FUSED_MLP,
                ),
                (
                    SharedInput(("attn_qkv.weight",), "self_attn.qkv_proj", absorbs="attn_norm.weight"),
                    SharedInput(("attn_output.weight",), "self_attn.o_proj"),
                    *fused_mlp_inputs("ffn_norm.weight"),
                ),
            ),
        ),
        options=(RMS, ("original_max_position_embeddings?", "rope.scaling.original_context_length")),
        partial_rotary=True,
        plain_with_window=True,
    ),
)
