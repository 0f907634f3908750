"""What rows of families are put together from: parameters and inputs that many families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitladder.formats.families.family import LayerKind
from bitladder.formats.roles import Parameter, SharedInput, Stop


def linear(path: str, role: str, transform: str = "same", *, bias: bool = False) -> tuple[Parameter, ...]:
    """A linear layer's weight, and its bias where a file may have one."""
    weight = Parameter(f"{path}.weight", (f"{role}.weight",), transform)
    return (weight, Parameter(f"{path}.bias", (f"{role}.bias",), transform, optional=True)) if bias else (weight,)


def attention(transform: str = "same", *, bias: bool = True, output_bias: bool = True) -> tuple[Parameter, ...]:
    """Separate projections; ``transform``: of queries and keys. ``output_bias``: where there is ``bias`` at all."""
    return (
        *linear("self_attn.q_proj", "attn_q", transform, bias=bias),
        *linear("self_attn.k_proj", "attn_k", transform, bias=bias),
        *linear("self_attn.v_proj", "attn_v", bias=bias),
        *linear("self_attn.o_proj", "attn_output", bias=bias and output_bias),
    )


def norm(path: str, role: str, transform: str = "same") -> Parameter:
    """A norm's weight."""
    return Parameter(f"{path}.weight", (f"{role}.weight",), transform)


PRE_NORMS = (norm("input_layernorm", "attn_norm"), norm("post_attention_layernorm", "ffn_norm"))
QK_NORMS = (norm("self_attn.q_norm", "attn_q_norm"), norm("self_attn.k_norm", "attn_k_norm"))
MLP = (
    *linear("mlp.gate_proj", "ffn_gate"),
    *linear("mlp.up_proj", "ffn_up"),
    *linear("mlp.down_proj", "ffn_down"),
)
FUSED_MLP = (*linear("mlp.gate_up_proj", "ffn_up"), *linear("mlp.down_proj", "ffn_down"))
EXPERTS = (
    *linear("mlp.gate", "ffn_gate_inp"),
    Parameter("mlp.experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "stack"),
    Parameter("mlp.experts.down_proj", ("ffn_down_exps.weight",)),
)


def attention_inputs(before: str | None, values: str | None = "attn_v.weight") -> tuple[SharedInput, ...]:
    """``before``: the norm's role. ``values``: what can take up scales on the output projection's input."""
    return (
        SharedInput(("attn_q.weight", "attn_k.weight", "attn_v.weight"), "self_attn.q_proj", absorbs=before),
        SharedInput(("attn_output.weight",), "self_attn.o_proj", absorbs=values),
    )


def mlp_inputs(before: str | None) -> tuple[SharedInput, ...]:
    """``before``: the norm's role."""
    return (
        SharedInput(("ffn_gate.weight", "ffn_up.weight"), "mlp.gate_proj", absorbs=before),
        SharedInput(("ffn_down.weight",), "mlp.down_proj", absorbs="ffn_up.weight"),
    )


def fused_mlp_inputs(before: str | None) -> tuple[SharedInput, ...]:
    """Of ``FUSED_MLP``; nothing takes up scales on the down projection's input: gates share the matrix."""
    return (
        SharedInput(("ffn_up.weight",), "mlp.gate_up_proj", absorbs=before),
        SharedInput(("ffn_down.weight",), "mlp.down_proj"),
    )


DENSE_INPUTS = (*attention_inputs("attn_norm.weight"), *mlp_inputs("ffn_norm.weight"))
# The router reads what the experts read, so a scale on their input would have to go into it too: nothing
# absorbs one here.
EXPERT_INPUTS = (
    SharedInput(("ffn_gate_inp.weight",), "mlp.gate"),
    SharedInput(("ffn_gate_exps.weight", "ffn_up_exps.weight"), "mlp.experts", "experts_in"),
    SharedInput(("ffn_down_exps.weight",), "mlp.experts", "experts_down", absorbs="ffn_up_exps.weight"),
)
MOE_INPUTS = (*attention_inputs("attn_norm.weight"), *EXPERT_INPUTS)

AFTER_ATTENTION = Stop("self_attn.o_proj", "self_attn", returns_pair=True)
AFTER_MLP = Stop("mlp.down_proj", "mlp")


def dense(parameters: tuple[Parameter, ...], inputs: tuple[SharedInput, ...] = DENSE_INPUTS) -> LayerKind:
    """A layer of attention and an MLP."""
    return LayerKind(parameters, inputs, (AFTER_ATTENTION, AFTER_MLP))


def mixture(parameters: tuple[Parameter, ...], inputs: tuple[SharedInput, ...] = MOE_INPUTS) -> LayerKind:
    """A layer of attention and experts, where no pass stops after the attention."""
    return LayerKind(parameters, inputs, (AFTER_ATTENTION,))


def experts_after_dense(keys: Mapping[str, Any], layer: int) -> int:
    """Kinds are (dense, mixture): as many dense layers as the header says come first."""
    leading = keys.get("leading_dense_block_count")
    return 0 if isinstance(leading, int) and layer < leading else 1


RMS = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
EXPERT_OPTIONS = (RMS, ("num_experts", "expert_count"), ("num_experts_per_tok", "expert_used_count"))

EXPERT_NAMES = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    "mlp.experts.down_proj": ("mlp.experts.{}.down_proj",),
}
"""Experts on disk as most families have them."""
ROUTERS = ("mlp.gate", "mlp.shared_expert_gate", "block_sparse_moe.gate")
"""Every name that routers go by; one that a model lacks does no harm."""
