"""A model from config.json and the headers of its weights alone, by rules that hold across families: what planning
falls back on when neither a row of ours nor the converter knows the class.

The bytes of matrices are those of the headers. What is estimated: which of them llama.cpp would treat in what way
(names are translated by their last words), and what the cache of each layer holds (by keys that families share,
``layer_types``, ``kv_lora_rank``, ``sliding_window`` and the sizes of states).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from bitladder.describe.config_keys import Config, layer_number
from bitladder.describe.model import Model, ModelDims
from bitladder.errors import BadFile
from bitladder.formats.families import FAMILIES
from bitladder.formats.tensors import TensorInfo


class Stored(Protocol):
    """A tensor as a checkpoint's header names it."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def dtype(self) -> str:
        """As safetensors call it: ``BF16``, ``I32``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In numpy order."""


_BESIDE = re.compile(
    r"(^|\.)(vision|visual|vit|image|img|audio|speech|sound|video|mm|multi_modal|patch)[a-z_]*(_|\.)"
    r"|embed_(vision|audio)|(^|\.)(encoder|aligner|projector|connector)\."
)
"""Names of towers and projectors beside the language model."""
_SCALES = re.compile(
    r"(weight_scale(_inv|_2)?|(weight|input)_global_scale|input_scale|weight_zero_point|weight_shape|qzeros|scales|g_idx"
    r"|_scales|inv_freq)$"
)
"""What packed weights have beside them, and tables that are computed."""
_PACKED_DOWN = re.compile(r"\.qweight$")
"""Matrices that hold several inputs in a word, not several outputs: [inputs / per word, outputs]."""
_OUTER = (
    ("token_embd.weight", r"(embed_tokens|wte|word_embeddings|tok_embeddings|embeddings?|embed_in)\.weight"),
    ("output.weight", r"(lm_head|embed_out|output)\.weight"),
    ("per_layer_token_embd.weight", r"embed_tokens_per_layer\.weight"),
)
_INNER = (
    ("attn_qkv", r"qkv_proj|query_key_value|c_attn|qkv|Wqkv"),
    ("attn_q", r"q_proj|wq|query"), ("attn_k", r"k_proj|wk|key"), ("attn_v", r"v_proj|wv|value"),
    ("attn_output", r"self_attn\.(o_proj|out_proj|dense)|(attention|attn)\.(o_proj|out_proj|dense|c_proj|wo)|wo"),
    ("ffn_gate", r"gate_proj|w1|ffn_gate"), ("ffn_up", r"gate_up_proj|up_proj|w3|fc1|c_fc|dense_h_to_4h|fc_in"),
    ("ffn_down", r"down_proj|w2|fc2|mlp\.c_proj|dense_4h_to_h|fc_out"),
    ("ffn_gate_inp", r"(mlp|moe|block_sparse_moe|feed_forward|ffn|mixer)\.(gate|router)|router(\.(layer|proj))?"),
    ("ssm_conv1d", r"conv1d|short_conv\.conv|conv\.conv|[qkv]_conv1d"),
)  # fmt: skip
"""llama.cpp's name, and the last words of the names in checkpoints that mean it."""
_WHOLE = re.compile(r"ssm_conv1d|ffn_gate_inp|A_log|(wpe|position_embeddings|embed_positions)\.weight$")
"""Matrices that llama.cpp's converter leaves in 32 bits."""


def beside_language(name: str) -> bool:
    """Whether a tensor belongs to a tower or projector for images or sound."""
    return _BESIDE.search(name) is not None


def language_tensors(tensors: Sequence[Stored]) -> list[Stored]:
    """The tensors that hold weights of the language part: towers, scales and computed tables are left out."""
    return [tensor for tensor in tensors if not beside_language(tensor.name) and not _SCALES.search(tensor.name)]


def llama_name(name: str) -> str:
    """What llama.cpp calls a checkpoint's tensor, by the last words of its name; one made of these where none fits."""
    return _name(name)[0]


def elements_of(tensor: Stored, bits: int) -> int:
    """Weights in a tensor; ``bits``: of each, where integers hold several."""
    return math.prod(weight_shape(tensor, bits))


def weight_shape(tensor: Stored, bits: int) -> tuple[int, ...]:
    """The shape of the weights in a tensor, packed or not: GPTQ and AWQ pack 32-bit words, NVFP4 and MXFP4 bytes."""
    *outer, last = tensor.shape or (1,)
    if tensor.dtype in ("I32", "U32") and outer:
        if _PACKED_DOWN.search(tensor.name) and len(outer) == 1:
            return (last, outer[0] * 32 // bits)
        return (*outer, last * 32 // bits)
    if tensor.dtype in ("U8", "I8") and outer and bits == 4:
        return (*outer, last * 2)
    return (*outer, last)


def estimated(label: str, config: Mapping[str, Any], tensors: Sequence[Stored]) -> Model:
    """The model as its GGUF file would be, about.

    Args:
        label: How to call it.
        config: config.json.
        tensors: All of the checkpoint's.

    Raises:
        BadFile: a figure of config.json is no number, or absurd; or no tensor is a matrix.
    """
    numbers = Config(label, config)
    listed = tuple(_merged(numbers, language_tensors(tensors)))
    if not any(len(tensor.shape) > 1 for tensor in listed):
        raise BadFile(f"{label} holds no matrix of a language model.", do="Name a language model's checkpoint.")
    embedding = next((tensor for tensor in listed if tensor.name == "token_embd.weight"), None)
    n_layer = numbers.n_layer or 1 + max((layer_number(tensor.name) or 0 for tensor in tensors), default=0)
    n_embd = numbers.n_embd or (embedding.shape[-1] if embedding else 1)
    dims = ModelDims(
        architecture=_architecture(numbers.model_type),
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=numbers.n_ff,
        n_head=numbers.n_head,
        n_head_kv=1 if numbers.kv_rank else numbers.n_head_kv,
        head_dim_k=numbers.head_dim,
        head_dim_v=numbers.head_dim_v,
        n_vocab=embedding.shape[0] if embedding else numbers.n_vocab,
        n_ctx_train=numbers.n_ctx,
        n_expert=numbers.n_expert,
        n_expert_used=numbers.n_expert_used,
        sliding_window=numbers.sliding_window,
    )
    keys = {f"{dims.architecture}.{key}": value for key, value in numbers.cache_keys(n_layer).items()}
    header = 40 * dims.n_vocab + 100 * len(listed)
    return Model(label, dims, listed, {"general.architecture": dims.architecture, **keys}, header_bytes=header)


def _architecture(model_type: str) -> str:
    """llama.cpp's word for the family where a row has it, which may be spelled with other strokes."""
    return next((name for name in (model_type, model_type.replace("_", "-")) if name in FAMILIES), model_type)


def _merged(numbers: Config, tensors: Sequence[Stored]) -> Iterator[TensorInfo]:
    """Tensors under llama.cpp's names: experts of a layer stacked, a tied head left out."""
    experts: dict[str, list[tuple[int, ...]]] = {}
    seen: set[str] = set()
    for tensor in tensors:
        name, number = _name(tensor.name)
        if name == "output.weight" and numbers.tied:
            continue
        shape = weight_shape(tensor, numbers.bits)
        if name.endswith("ssm_conv1d.weight"):
            shape = tuple(size for size in shape if size != 1)
        if number is not None:
            experts.setdefault(name, []).append(shape)
            continue
        while name in seen:
            name = _again(name)
        seen.add(name)
        whole = len(shape) < 2 or _WHOLE.search(name) is not None
        yield TensorInfo(name, shape, "F32" if whole else "F16")
    for name, shapes in experts.items():
        yield TensorInfo(name, (len(shapes), *shapes[0]), "F16")


def _again(name: str) -> str:
    """Another name of the same kind: a second matrix that ends in the same words."""
    stem, _, kind = name.rpartition(".")
    return f"{stem}_b.{kind}"


def _name(name: str) -> tuple[str, int | None]:
    """llama.cpp's name of a tensor, and the number of its expert where it is one expert's."""
    name = re.sub(r"\.(qweight|weight_packed|weight_blocks)$|_blocks$", ".weight", name)
    layer = layer_number(name)
    if layer is None:
        for own, pattern in _OUTER:
            if re.search(rf"(^|[._]){pattern}$", name):
                return own, None
        return name, None
    kind = "bias" if name.endswith("bias") else "weight"
    rest = re.sub(r"^.*?\.\d+\.", "", name)
    expert = re.search(r"experts?\.(\d+)\.", rest)
    stem = re.sub(r"\.(weight|bias)$", "", rest)
    own = next((own for own, pattern in _INNER if re.search(rf"(^|\.)({pattern})$", stem)), "")
    if not own:
        own = re.sub(r"[^A-Za-z0-9]+", "_", stem)
    elif "shared" in stem:
        own += "_shexp"
    elif "expert" in stem:
        own += "_exps"
    return f"blk.{layer}.{own}.{kind}", int(expert[1]) if expert else None
