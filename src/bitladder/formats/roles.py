"""Model families as rows: how a GGUF file's tensors become the parameters of transformers' layers, and back.

A row says which transformers model a GGUF architecture is, which numbers of the header its configuration
needs, which GGUF tensors make up each parameter of a decoder layer and how, and which linear layers see the
same input. A new family is a row here and a case in ``tests/test_layers.py``.

Tensors are named by *role*: ``attn_q.weight`` is ``blk.N.attn_q.weight`` of any layer N. Transforms are
named here and done in ``walk/transforms.py``; they undo what llama.cpp's converter did:

    same        taken as it is unpermute   rows of a query or key projection go back from llama.cpp's
    interleaved rotary order to two halves per head minus_one   the converter stored norm + 1, transformers'
    layer adds the 1 itself row         a vector becomes a matrix of one row stack       several matrices one
    below the other, expert by expert (gate and up of fused experts)
"""

from __future__ import annotations

from dataclasses import dataclass

EMBEDDING = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def layer_tensor(layer: int, role: str) -> str:
    """The GGUF name of a role's tensor in a layer: ``blk.3.attn_q.weight``."""
    return f"blk.{layer}.{role}"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a decoder layer: its path in the module, the roles it is made of, the transform that
    makes it."""

    path: str
    roles: tuple[str, ...]
    transform: str = "same"
    optional: bool = False
    """A bias that transformers' layer has and a file may lack: zeros then."""


@dataclass(frozen=True)
class SharedInput:
    """Linear layers that read the same vectors, so that one set of statistics serves them all.

    ``module`` is the module whose first argument is that input. ``kind`` is ``linear`` (its forward's input),
    ``experts_in`` (an expert's share of the input of the fused experts) or ``experts_down`` (what an expert's
    down projection reads). ``absorbs`` is the role whose outputs can be divided by a scale that these layers'
    columns are multiplied by, when there is
    one: a norm before them, or a linear layer.
    """

    roles: tuple[str, ...]
    module: str
    kind: str = "linear"
    absorbs: str | None = None


@dataclass(frozen=True)
class Family:
    """A model family. ``options``: (configuration field, GGUF key after the architecture's prefix); a missing
    key leaves transformers' default when the field ends in ``?`` and is an error otherwise. ``constants``:
    fields the family fixes."""

    architecture: str
    model_type: str
    parameters: tuple[Parameter, ...]
    inputs: tuple[SharedInput, ...]
    options: tuple[tuple[str, str], ...] = ()
    constants: tuple[tuple[str, object], ...] = ()
    bias_field: str | None = None
    """Configuration field that says whether attention projections have biases, set when the file has
    ``attn_q.bias``."""
    norm_transform: str = "same"
    """How the norm before the head is stored."""
    has_output_norm: bool = True
    scaled_embedding: bool = False
    """Embeddings are multiplied by the root of their width (Gemma)."""
    moe: bool = False
    wide_query_layers: int | None = None
    """Gemma models with this many layers scale attention by width / heads instead of by the head's width
    (their 27B sizes)."""
    partial_rotary: bool = False
    """Heads may rotate fewer dimensions than they have (Phi-4-mini)."""
    sliding_pattern: int = 0
    """Every n-th layer attends to everything, the others within the sliding window; 0: no alternation."""


def _linear(path: str, role: str, transform: str = "same", *, bias: bool = False) -> tuple[Parameter, ...]:
    weight = Parameter(f"{path}.weight", (f"{role}.weight",), transform)
    return (weight, Parameter(f"{path}.bias", (f"{role}.bias",), transform, optional=True)) if bias else (weight,)


def _attention(transform: str = "same", *, bias: bool = True) -> tuple[Parameter, ...]:
    return (
        *_linear("self_attn.q_proj", "attn_q", transform, bias=bias),
        *_linear("self_attn.k_proj", "attn_k", transform, bias=bias),
        *_linear("self_attn.v_proj", "attn_v", bias=bias),
        *_linear("self_attn.o_proj", "attn_output", bias=bias),
    )


def _norm(path: str, role: str, transform: str = "same") -> Parameter:
    return Parameter(f"{path}.weight", (f"{role}.weight",), transform)


_PRE_NORMS = (_norm("input_layernorm", "attn_norm"), _norm("post_attention_layernorm", "ffn_norm"))
_QK_NORMS = (_norm("self_attn.q_norm", "attn_q_norm"), _norm("self_attn.k_norm", "attn_k_norm"))
_MLP = (
    *_linear("mlp.gate_proj", "ffn_gate"),
    *_linear("mlp.up_proj", "ffn_up"),
    *_linear("mlp.down_proj", "ffn_down"),
)
_EXPERTS = (
    *_linear("mlp.gate", "ffn_gate_inp"),
    Parameter("mlp.experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "stack"),
    Parameter("mlp.experts.down_proj", ("ffn_down_exps.weight",)),
)
_SHARED_EXPERT = (
    *_linear("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    *_linear("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    *_linear("mlp.shared_expert.down_proj", "ffn_down_shexp"),
    *_linear("mlp.shared_expert_gate", "ffn_gate_inp_shexp", "row"),
)
_GEMMA_NORMS = (
    _norm("input_layernorm", "attn_norm", "minus_one"),
    _norm("post_attention_layernorm", "post_attention_norm", "minus_one"),
    _norm("pre_feedforward_layernorm", "ffn_norm", "minus_one"),
    _norm("post_feedforward_layernorm", "post_ffw_norm", "minus_one"),
)


def _attention_inputs(norm: str | None) -> tuple[SharedInput, ...]:
    return (
        SharedInput(("attn_q.weight", "attn_k.weight", "attn_v.weight"), "self_attn.q_proj", absorbs=norm),
        SharedInput(("attn_output.weight",), "self_attn.o_proj", absorbs="attn_v.weight"),
    )


def _mlp_inputs(norm: str | None) -> tuple[SharedInput, ...]:
    return (
        SharedInput(("ffn_gate.weight", "ffn_up.weight"), "mlp.gate_proj", absorbs=norm),
        SharedInput(("ffn_down.weight",), "mlp.down_proj", absorbs="ffn_up.weight"),
    )


_DENSE_INPUTS = (*_attention_inputs("attn_norm.weight"), *_mlp_inputs("ffn_norm.weight"))
# The router reads what the experts read, so a scale on their input would have to go into it too: nothing
# absorbs one here.
_MOE_INPUTS = (
    *_attention_inputs("attn_norm.weight"),
    SharedInput(("ffn_gate_inp.weight",), "mlp.gate"),
    SharedInput(("ffn_gate_exps.weight", "ffn_up_exps.weight"), "mlp.experts", "experts_in"),
    SharedInput(("ffn_down_exps.weight",), "mlp.experts", "experts_down", absorbs="ffn_up_exps.weight"),
)
_SHARED_EXPERT_INPUTS = (
    SharedInput(
        ("ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_gate_inp_shexp.weight"),
        "mlp.shared_expert.gate_proj",
    ),
    SharedInput(("ffn_down_shexp.weight",), "mlp.shared_expert.down_proj", absorbs="ffn_up_shexp.weight"),
)

_RMS = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
_MOE_OPTIONS = (_RMS, ("num_experts", "expert_count"), ("num_experts_per_tok", "expert_used_count"))
_GEMMA_OPTIONS = (
    _RMS,
    ("sliding_window", "attention.sliding_window"),
    ("attn_logit_softcapping?", "attn_logit_softcapping"),
    ("final_logit_softcapping?", "final_logit_softcapping"),
)

_ROWS = (
    Family(
        "llama", "llama", (*_PRE_NORMS, *_attention("unpermute"), *_MLP), _DENSE_INPUTS,
        options=(_RMS,), bias_field="attention_bias",
    ),
    Family(  # mixtral: llama.cpp calls it llama and sets expert_count
        "llama+experts", "mixtral",
        (*_PRE_NORMS, *_attention("unpermute", bias=False), *_EXPERTS), _MOE_INPUTS,
        options=(_RMS, ("num_local_experts", "expert_count"), ("num_experts_per_tok", "expert_used_count")),
        constants=(("sliding_window", None),), moe=True,
    ),
    Family("qwen2", "qwen2", (*_PRE_NORMS, *_attention(), *_MLP), _DENSE_INPUTS, options=(_RMS,)),
    Family(
        "qwen2moe", "qwen2_moe", (*_PRE_NORMS, *_attention(), *_EXPERTS, *_SHARED_EXPERT),
        (*_MOE_INPUTS, *_SHARED_EXPERT_INPUTS),
        options=(
            *_MOE_OPTIONS,
            ("moe_intermediate_size", "expert_feed_forward_length"),
            ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        ),
        constants=(("norm_topk_prob", False),), moe=True,
    ),
    Family(
        "qwen3", "qwen3", (*_PRE_NORMS, *_QK_NORMS, *_attention(), *_MLP), _DENSE_INPUTS,
        options=(_RMS,), bias_field="attention_bias",
    ),
    Family(
        "qwen3moe", "qwen3_moe", (*_PRE_NORMS, *_QK_NORMS, *_attention(), *_EXPERTS), _MOE_INPUTS,
        options=(*_MOE_OPTIONS, ("moe_intermediate_size", "expert_feed_forward_length")),
        constants=(("norm_topk_prob", True),), bias_field="attention_bias", moe=True,
    ),
    Family(
        "gemma2", "gemma2", (*_GEMMA_NORMS, *_attention(bias=False), *_MLP), _DENSE_INPUTS,
        options=_GEMMA_OPTIONS, norm_transform="minus_one", scaled_embedding=True,
        wide_query_layers=46, sliding_pattern=2,
    ),
    Family(
        "gemma3", "gemma3_text",
        (
            *_GEMMA_NORMS,
            _norm("self_attn.q_norm", "attn_q_norm", "minus_one"),
            _norm("self_attn.k_norm", "attn_k_norm", "minus_one"),
            *_attention(bias=False),
            *_MLP,
        ),
        _DENSE_INPUTS,
        options=_GEMMA_OPTIONS, norm_transform="minus_one", scaled_embedding=True,
        wide_query_layers=62, sliding_pattern=6,
    ),
    Family(  # queries, keys and values lie fused in the file as they do in transformers, gate and up too
        "phi3", "phi3",
        (
            *_PRE_NORMS,
            *_linear("self_attn.qkv_proj", "attn_qkv"),
            *_linear("self_attn.o_proj", "attn_output"),
            *_linear("mlp.gate_up_proj", "ffn_up"),
            *_linear("mlp.down_proj", "ffn_down"),
        ),
        (
            SharedInput(("attn_qkv.weight",), "self_attn.qkv_proj", absorbs="attn_norm.weight"),
            SharedInput(("attn_output.weight",), "self_attn.o_proj"),
            SharedInput(("ffn_up.weight",), "mlp.gate_up_proj", absorbs="ffn_norm.weight"),
            SharedInput(("ffn_down.weight",), "mlp.down_proj"),
        ),
        options=(_RMS, ("original_max_position_embeddings?", "rope.scaling.original_context_length")),
        partial_rotary=True,
    ),
    Family(
        "olmo", "olmo",
        (*_attention("unpermute", bias=False), *_MLP), (*_attention_inputs(None), *_mlp_inputs(None)),
        options=(("clip_qkv?", "attention.clamp_kqv"),), has_output_norm=False,
    ),
    Family(
        "olmo2", "olmo2",
        (
            _norm("post_attention_layernorm", "post_attention_norm"),
            _norm("post_feedforward_layernorm", "post_ffw_norm"),
            *_QK_NORMS,
            *_attention(bias=False),
            *_MLP,
        ),
        (*_attention_inputs(None), *_mlp_inputs(None)),
        options=(_RMS,),
    ),
)  # fmt: skip

FAMILIES: dict[str, Family] = {row.architecture: row for row in _ROWS}


def family_of(architecture: str, n_expert: int = 0) -> Family | None:
    """The rows of a GGUF architecture, or None where there are none; Mixtral is ``llama`` with experts."""
    if architecture == "llama" and n_expert:
        architecture = "llama+experts"
    return FAMILIES.get(architecture)
