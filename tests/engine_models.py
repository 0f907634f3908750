"""Tiny random models, with a tokenizer of bytes, of architectures whose layers the walk does not know: llama.cpp runs
them. Shapes are those that planning knows (``describe/shapes.py``), or written out here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bitladder.describe.shapes import Shape, model_of
from bitladder.formats.tensors import TensorInfo

N_VOCAB = 288
_WIDE = Shape("tiny", "", 2, 256, 512, 4, 2, N_VOCAB, 1024, head_dim=64)
_EXPERTS: dict[str, Any] = {"n_expert": 4, "n_expert_used": 2, "n_ff_expert": 256}

SHAPES = {
    "gpt-oss": replace(_WIDE, architecture="gpt-oss", sliding_window=128, **_EXPERTS),
    "deepseek2": replace(
        _WIDE, architecture="deepseek2", n_head_kv=4, kv_rank=256, q_rank=256, qk_nope=32, qk_rope=32, v_head=64,
        n_ff_shared=256, n_dense_layers=1, **_EXPERTS,
    ),
    "granite": replace(_WIDE, architecture="granite"),
    "command-r": replace(_WIDE, architecture="command-r", tied=True),
}  # fmt: skip
_MORE_KEYS: dict[str, dict[str, Any]] = {
    "gpt-oss": {"rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 512},
    "granite": {"residual_scale": 0.5, "embedding_scale": 4.0, "attention.scale": 0.1, "logit_scale": 2.0},
    "deepseek2": {"expert_gating_func": 2, "expert_weights_norm": True},
    "command-r": {"logit_scale": 1.0},
}
_MAMBA2: dict[str, dict[str, Any]] = {
    "keys": {
        "context_length": 1024, "embedding_length": 256, "feed_forward_length": 0, "block_count": 2,
        "attention.head_count": 0, "attention.layer_norm_rms_epsilon": 1e-5, "ssm.conv_kernel": 4,
        "ssm.inner_size": 512, "ssm.state_size": 64, "ssm.group_count": 1, "ssm.time_step_rank": 8,
    },
    "layer": {
        "attn_norm.weight": (256,), "ssm_in.weight": (2 * 512 + 2 * 64 + 8, 256), "ssm_conv1d.weight": (640, 4),
        "ssm_conv1d.bias": (640,), "ssm_dt.bias": (8,), "ssm_a": (8, 1), "ssm_d": (8, 1), "ssm_norm.weight": (1, 512),
        "ssm_out.weight": (256, 512),
    },
}  # fmt: skip
FAMILIES = (*SHAPES, "mamba2")
_BERT: dict[str, dict[str, Any]] = {
    "keys": {
        "context_length": 512, "embedding_length": 256, "feed_forward_length": 512, "block_count": 2,
        "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5, "attention.causal": False, "pooling_type": 1,
    },
    "layer": {
        f"{name}.{kind}": shape if kind == "weight" else shape[:1]
        for name, shape in {
            "attn_q": (256, 256), "attn_k": (256, 256), "attn_v": (256, 256), "attn_output": (256, 256),
            "attn_output_norm": (256,), "ffn_up": (512, 256), "ffn_down": (256, 512), "layer_output_norm": (256,),
        }.items()
        for kind in ("weight", "bias")
    },
    "outer": {"position_embd.weight": (512, 256), "token_types.weight": (2, 256), "token_embd_norm.weight": (256,),
              "token_embd_norm.bias": (256,)},
}  # fmt: skip
_WRITTEN_OUT: dict[str, dict[str, dict[str, Any]]] = {
    "mamba2": {**_MAMBA2, "outer": {"output_norm.weight": (256,)}},
    "bert": _BERT,
}
"""Families whose shapes planning does not know; ``bert`` is an encoder, which predicts no next token."""
_HALF = ("ssm_in.weight", "ssm_out.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight",
         "ffn_up.weight", "ffn_down.weight")  # fmt: skip


def write_family(
    path: Path, architecture: str, *, scaled: Mapping[str, tuple[int, int, float]] | None = None, **keys: Any
) -> Path:
    """Write a model of a family, matrices in F16. ``scaled``: tensors to rows from, to, and a factor on them. ``keys``
    are put in the place of the family's own."""
    if architecture in _WRITTEN_OUT:
        rows = _WRITTEN_OUT[architecture]
        metadata = {f"{architecture}.{key}": value for key, value in rows["keys"].items()}
        shapes = {"token_embd.weight": (N_VOCAB, 256), **rows["outer"]}
        shapes |= {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in rows["layer"].items()}
        tensors = [
            TensorInfo(name, shape, "F16" if name.split(".", 2)[-1] in _HALF else "F32")
            for name, shape in shapes.items()
        ]
    else:
        model = model_of(SHAPES[architecture])
        metadata, tensors = dict(model.metadata), list(model.tensors)
    metadata |= {f"{architecture}.{key}": value for key, value in {**_MORE_KEYS.get(architecture, {}), **keys}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key != "general.architecture":
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
            add[type(value)](key, value)
    if architecture == "bert":
        writer.add_uint32("tokenizer.ggml.token_type_count", 2)
    byte_tokens(writer)
    rng = np.random.default_rng(0)
    for tensor in tensors:
        value = _sized(tensor, rng.standard_normal(tensor.shape, np.float32))
        if tensor.name in (scaled or {}):
            start, stop, factor = scaled[tensor.name]
            value[start:stop] *= np.float16(factor)
        writer.add_tensor(tensor.name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _sized(tensor: TensorInfo, value: np.ndarray) -> np.ndarray:
    """At a size at which answers are decided and nothing explodes."""
    if tensor.name.endswith("ssm_a"):
        return -np.exp(0.3 * value)
    if "norm" in tensor.name:
        return (1 + 0.1 * value).astype(np.float32)
    if len(tensor.shape) > 1 and tensor.shape[-1] > 16:
        value = value * (
            0.1 if "token_embd" in tensor.name or tensor.name == "output.weight" else 1.2 * tensor.shape[-1] ** -0.5
        )
    else:
        value = 0.1 * value
    return value.astype(np.float16 if tensor.qtype == "F16" else np.float32)


def byte_tokens(writer: gguf.GGUFWriter) -> None:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = {byte: 256 + n for n, byte in enumerate(b for b in range(256) if b not in plain)}
    tokens = ["<end>", *(chr(others.get(byte, byte)) for byte in range(256)), "ab"]
    tokens += [f"<{number}>" for number in range(N_VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (N_VOCAB - 1)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
