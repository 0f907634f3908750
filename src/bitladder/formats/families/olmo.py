"""OLMo: norms without weights; OLMo 2 and 3: norms after attention and feed-forward only."""

from __future__ import annotations

from bitladder.formats.families.family import CheckpointTraits, Family, Layers, Windows
from bitladder.formats.families.pieces import MLP, QK_NORMS, RMS, attention, attention_inputs, dense, mlp_inputs, norm

_INPUTS = (*attention_inputs(None), *mlp_inputs(None))

OLMO = Family(
    "olmo",
    layers=Layers(
        "olmo",
        (dense((*attention("unpermute", bias=False), *MLP), _INPUTS),),
        options=(("clip_qkv?", "attention.clamp_kqv"),),
        has_output_norm=False,
    ),
)
OLMO2 = Family(
    "olmo2",
    CheckpointTraits(("Olmo2ForCausalLM",)),
    features=frozenset({"only_post_norms", "row_norms"}),
    windows=Windows(4),  # OLMo 3's; the layers below are OLMo 2's, without
    layers=Layers(
        "olmo2",
        (
            dense(
                (
                    norm("post_attention_layernorm", "post_attention_norm"),
                    norm("post_feedforward_layernorm", "post_ffw_norm"),
                    *QK_NORMS,
                    *attention(bias=False),
                    *MLP,
                ),
                _INPUTS,
            ),
        ),
        options=(RMS,),
    ),
)
