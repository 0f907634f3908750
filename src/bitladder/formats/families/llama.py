"""Llama, what llama.cpp runs as Llama (Mistral, Mixtral, and many fine-tunes under other names), and its kin."""

from __future__ import annotations

from bitladder.formats.families.family import CheckpointTraits, Family, Layers, Mix, RopeTables, Windows
from bitladder.formats.families.pieces import EXPERTS, MLP, PRE_NORMS, RMS, ROUTERS, attention, dense, mixture

_MIXTRAL = Layers(
    "mixtral",
    (mixture((*PRE_NORMS, *attention("unpermute", bias=False), *EXPERTS)),),
    options=(RMS, ("num_local_experts", "expert_count"), ("num_experts_per_tok", "expert_used_count")),
    constants=(("sliding_window", None),),
    experts={
        "mlp.experts.gate_up_proj": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.{}.w2",),
    },
    renamed={"mlp.gate.weight": "block_sparse_moe.gate.weight"},
    routers=ROUTERS,
)

LLAMA = Family(
    "llama",
    CheckpointTraits(("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM")),
    features=frozenset(),
    rope_tables=RopeTables(("llama3",)),
    mix=Mix(seventy_layers=80),
    layers=Layers(
        "llama",
        (dense((*PRE_NORMS, *attention("unpermute"), *MLP)),),
        options=(RMS,),
        bias_field="attention_bias",
    ),
    expert_layers=_MIXTRAL,
)
SMOLLM3 = Family(  # every fourth layer knows no positions, which its rows of q and k do not show
    "smollm3",
    CheckpointTraits(("SmolLM3ForCausalLM",), tied=True),
    features=frozenset(),
    layers=Layers(
        "smollm3",
        (dense((*PRE_NORMS, *attention("unpermute"), *MLP)),),
        options=(RMS,),
        constants=(("no_rope_layer_interval", 4),),
        bias_field="attention_bias",
    ),
)
LLAMA4 = Family("llama4", windows=Windows(4, tokens=8192))
DECI = Family("deci", mix=Mix(seventy_layers=80))
