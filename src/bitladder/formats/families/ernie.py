"""ERNIE 4.5: Llama's layers, rotated neighbour with neighbour in the file as in transformers. In the mixtures the
first layers are dense, the others have experts beside shared ones, chosen with a bias for each."""

from __future__ import annotations

from bitladder.formats.families.family import Family, Layers
from bitladder.formats.families.pieces import (
    EXPERT_INPUTS,
    EXPERT_NAMES,
    EXPERTS,
    MLP,
    PRE_NORMS,
    RMS,
    ROUTERS,
    attention,
    attention_inputs,
    dense,
    experts_after_dense,
    linear,
    mixture,
)
from bitladder.formats.roles import Parameter, SharedInput

_BIAS = "mlp.gate.moe_statics.e_score_correction_bias"
_ATTENTION = (*PRE_NORMS, *attention(bias=False))

ERNIE4_5_MOE = Family(
    "ernie4_5-moe",
    layers=Layers(
        "ernie4_5_moe",
        (
            dense((*_ATTENTION, *MLP)),
            mixture(
                (
                    *_ATTENTION,
                    *EXPERTS,
                    Parameter(_BIAS, ("exp_probs_b.bias",), "row"),
                    *linear("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
                    *linear("mlp.shared_experts.up_proj", "ffn_up_shexp"),
                    *linear("mlp.shared_experts.down_proj", "ffn_down_shexp"),
                ),
                (
                    *attention_inputs("attn_norm.weight"),
                    *EXPERT_INPUTS,
                    SharedInput(("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), "mlp.shared_experts.gate_proj"),
                    SharedInput(
                        ("ffn_down_shexp.weight",), "mlp.shared_experts.down_proj", absorbs="ffn_up_shexp.weight"
                    ),
                ),
            ),
        ),
        kind_of=experts_after_dense,
        options=(
            RMS,
            ("moe_num_experts", "expert_count"),
            ("moe_k", "expert_used_count"),
            ("moe_intermediate_size", "expert_feed_forward_length"),
            ("moe_num_shared_experts", "expert_shared_count"),
            ("moe_layer_start_index", "leading_dense_block_count"),
        ),
        experts=EXPERT_NAMES,
        renamed={_BIAS: "mlp.moe_statics.e_score_correction_bias"},
        routers=ROUTERS,
    ),
)
