"""How a model's tensors meet the residual stream: which read it behind a norm, which write to it, which do neither.

With that a rotation of the stream can be folded into the file. Root mean squares do not change when vectors are
rotated, so a norm without a mean commutes with it once its weights are in the matrices that read behind it:

    embeddings     E R              read       W diag(norm) R         norms     1
    written        R^T W, R^T b     output     W diag(norm) R

What is not named here is not known to do neither: a model with such a tensor is not rotated. The roles are llama.cpp's
names; whether a model really is wired so is found out by comparing predictions (``stages/rotate.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from bitladder.errors import BadInput
from bitladder.formats.roles import EMBEDDING, OUTPUT, OUTPUT_NORM, ROPE_TENSORS, layer_tensor
from bitladder.formats.tensors import TensorInfo

ROTATED = "rotated-F16"
"""What a rotated file says that it is, under the key of recipes."""
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_FEED_FORWARD = (
    "ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_shexp", "ffn_up_shexp",
    "ffn_gate_inp_shexp",
)  # fmt: skip
_WRITERS = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
_INNER = ("attn_q_norm.weight", "attn_k_norm.weight", *ROPE_TENSORS)
"""Between what is read and what is written."""
_NORMS = {**dict.fromkeys(_ATTENTION, "attn_norm.weight"), **dict.fromkeys(_FEED_FORWARD, "ffn_norm.weight")}
"""Behind which norm a matrix reads."""


class Meets(Enum):
    """What a tensor does with the stream."""

    READS = "reads"
    """Its last axis is the stream's, behind a norm."""
    WRITES = "writes"
    """Its axis before the last is the stream's; of a bias, the last."""
    HOLDS = "holds"
    """Its rows are vectors of the stream."""
    NORM = "norm"
    """Its weights go into those that read behind it."""
    NEITHER = "neither"


@dataclass(frozen=True)
class Part:
    """What one tensor does, and behind which norm it reads."""

    meets: Meets
    norm: str = ""


_OUTSIDE = {
    EMBEDDING: Part(Meets.HOLDS),
    OUTPUT: Part(Meets.READS, OUTPUT_NORM),
    OUTPUT_NORM: Part(Meets.NORM),
    **dict.fromkeys((*ROPE_TENSORS, "output.bias"), Part(Meets.NEITHER)),
}
"""Of tensors outside the layers."""


def residual_parts(tensors: Sequence[TensorInfo], width: int) -> dict[str, Part]:
    """What every tensor does with a stream of so many channels, by name.

    Raises:
        BadInput: the stream cannot be rotated: the output matrix is the embedding, norms have biases or follow what is
            written, or a tensor is not known.
    """
    names = {one.name for one in tensors}
    if OUTPUT not in names:
        raise BadInput(
            "The model's output matrix is its embedding.",
            means="Both would have to be rotated, each with the weights of another norm, and stored apart.",
            do="Make a recipe of the model as it is; rotating is for models with an output matrix of their own.",
        )
    parts = {one.name: _part(one.name) for one in tensors}
    for one in tensors:
        part = parts[one.name]
        if part is None:
            raise _not_known(one.name)
        axis = -2 if part.meets is Meets.WRITES and not one.name.endswith(".bias") else -1
        if part.meets is not Meets.NEITHER and (len(one.shape) < -axis or one.shape[axis] != width):
            raise _not_known(one.name)
        if part.norm and part.norm not in names:
            raise _not_known(one.name)
    return {name: part for name, part in parts.items() if part is not None}


def _part(name: str) -> Part | None:
    """None of a tensor that is not known."""
    start, _, role = name.removeprefix("blk.").partition(".")
    if not name.startswith("blk.") or not start.isdigit():
        return _OUTSIDE.get(name)
    base, _, kind = role.rpartition(".")
    if role in _NORMS.values():
        return Part(Meets.NORM)
    if role in _INNER or (kind == "bias" and base in _NORMS):
        return Part(Meets.NEITHER)
    if base in _WRITERS and kind in ("weight", "bias"):
        return Part(Meets.WRITES)
    if kind != "weight" or base not in _NORMS:
        return None
    return Part(Meets.READS, layer_tensor(int(start), _NORMS[base]))


def _not_known(name: str) -> BadInput:
    return BadInput(
        f"How '{name}' meets the residual stream is not known.",
        means="A stream can be rotated where everything reads it behind a norm without a mean, and writes to it "
        "without one.",
        do="Make a recipe of the model as it is.",
    )
