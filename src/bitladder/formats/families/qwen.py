"""Qwen: dense, mixtures, and the hybrids of gated delta nets."""

from __future__ import annotations

from bitladder.formats.families.family import CheckpointTraits, Family, Layers, Mix, StateTraits
from bitladder.formats.families.pieces import (
    EXPERT_NAMES,
    EXPERT_OPTIONS,
    EXPERTS,
    MLP,
    MOE_INPUTS,
    PRE_NORMS,
    QK_NORMS,
    RMS,
    ROUTERS,
    attention,
    dense,
    linear,
    mixture,
)
from bitladder.formats.roles import SharedInput

_SHARED_EXPERT = (
    *linear("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    *linear("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    *linear("mlp.shared_expert.down_proj", "ffn_down_shexp"),
    *linear("mlp.shared_expert_gate", "ffn_gate_inp_shexp", "row"),
)
_SHARED_EXPERT_INPUTS = (
    SharedInput(
        ("ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_gate_inp_shexp.weight"),
        "mlp.shared_expert.gate_proj",
    ),
    SharedInput(("ffn_down_shexp.weight",), "mlp.shared_expert.down_proj", absorbs="ffn_up_shexp.weight"),
)

QWEN2 = Family(
    "qwen2",
    CheckpointTraits(("Qwen2ForCausalLM",)),
    features=frozenset({"qkv_bias"}),
    mix=Mix(seventy_layers=80),
    layers=Layers("qwen2", (dense((*PRE_NORMS, *attention(), *MLP)),), options=(RMS,)),
)
QWEN2_VL = Family("qwen2vl", mix=Mix(seventy_layers=80))
QWEN2_MOE = Family(
    "qwen2moe",
    layers=Layers(
        "qwen2_moe",
        (
            mixture(
                (*PRE_NORMS, *attention(), *EXPERTS, *_SHARED_EXPERT),
                (*MOE_INPUTS, *_SHARED_EXPERT_INPUTS),
            ),
        ),
        options=(
            *EXPERT_OPTIONS,
            ("moe_intermediate_size", "expert_feed_forward_length"),
            ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        ),
        constants=(("norm_topk_prob", False),),
        experts=EXPERT_NAMES,
        routers=ROUTERS,
    ),
)
QWEN3 = Family(
    "qwen3",
    CheckpointTraits(("Qwen3ForCausalLM",)),
    features=frozenset({"head_norms"}),
    layers=Layers(
        "qwen3",
        (dense((*PRE_NORMS, *QK_NORMS, *attention(), *MLP)),),
        options=(RMS,),
        bias_field="attention_bias",
    ),
)
QWEN3_MOE = Family(
    "qwen3moe",
    CheckpointTraits(("Qwen3MoeForCausalLM",)),
    features=frozenset({"head_norms"}),
    layers=Layers(
        "qwen3_moe",
        (mixture((*PRE_NORMS, *QK_NORMS, *attention(), *EXPERTS)),),
        options=(*EXPERT_OPTIONS, ("moe_intermediate_size", "expert_feed_forward_length")),
        constants=(("norm_topk_prob", True),),
        bias_field="attention_bias",
        experts=EXPERT_NAMES,
        routers=ROUTERS,
    ),
)
QWEN3_NEXT = Family("qwen3next", states=StateTraits(attention_every=4))
QWEN35 = Family("qwen35", states=StateTraits(attention_every=4))
QWEN35_MOE = Family("qwen35moe", states=StateTraits(attention_every=4))
