"""GLM-4 (0414): Llama's layers with gate and up fused, norms after attention and feed-forward too, and half of a head
rotated, neighbour with neighbour in the file as in transformers."""

from __future__ import annotations

from bitladder.formats.families.family import CheckpointTraits, Family, Layers
from bitladder.formats.families.pieces import (
    FUSED_MLP,
    PRE_NORMS,
    RMS,
    attention,
    attention_inputs,
    dense,
    fused_mlp_inputs,
    norm,
)

GLM4 = Family(
    "glm4",
    CheckpointTraits(("Glm4ForCausalLM",)),
    features=frozenset({"fused_gate", "post_norms"}),
    layers=Layers(
        "glm4",
        (
            dense(
                (
                    *PRE_NORMS,
                    norm("post_self_attn_layernorm", "post_attention_norm"),
                    norm("post_mlp_layernorm", "post_ffw_norm"),
                    *attention(output_bias=False),
                    *FUSED_MLP,
                ),
                (*attention_inputs("attn_norm.weight"), *fused_mlp_inputs("ffn_norm.weight")),
            ),
        ),
        options=(RMS,),
        bias_field="attention_bias",
        partial_rotary=True,
        variant_keys=("rope.dimension_sections",),  # of models that see: rows of q and k are in another order
    ),
)
