"""What llama.cpp rounds while it multiplies: the inputs of each matrix, to the type that its weights are
multiplied with.

On the CPU a row of block-quantized weights meets inputs that are rounded to eight bits first, in blocks of 32
or 256 with a scale each; F16 and BF16 weights meet inputs of their own type (ggml-cpu, ``vec_dot_type`` of
each type). With these roundings the walk gives what llama.cpp's own perplexity tool gives; without them, what
the weights alone cost. Engines of INT8-W8A8 checkpoints round whole tokens instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bitladder.formats.blocks import QTYPES
from bitladder.formats.families.family import LayerKind
from bitladder.formats.roles import layer_tensor

InputType = str | Callable[[torch.Tensor], torch.Tensor]
"""The type of a tensor; or, of a checkpoint whose engine rounds inputs at run time, what it does to them."""
QTypeOf = Callable[[str], InputType]
"""That of a tensor by name."""


def rounded_input(x: torch.Tensor, qtype: InputType) -> torch.Tensor:
    """Inputs f32[..., columns] as a matrix of ``qtype`` meets them; columns a multiple of its block."""
    if not isinstance(qtype, str):
        return qtype(x)
    if qtype in ("F16", "BF16"):
        return x.to(torch.float16 if qtype == "F16" else torch.bfloat16).float()
    if not QTYPES[qtype].is_quantized:
        return x
    if QTYPES[qtype].block_size == 256:
        return _q8_k(x)
    return _q8_0(x)


def _q8_0(x: torch.Tensor) -> torch.Tensor:
    """Blocks of 32: d = largest magnitude / 127, stored as F16; codes rounded with the unrounded d."""
    blocks = x.reshape(-1, 32)
    d = blocks.abs().amax(dim=1, keepdim=True) / 127
    codes = torch.round(blocks / torch.where(d == 0, 1, d))
    return (codes * d.half().float()).reshape(x.shape)


def _q8_k(x: torch.Tensor) -> torch.Tensor:
    """Blocks of 256: the value of largest magnitude becomes -127 (so +127 is the other end); d stays f32."""
    blocks = x.reshape(-1, 256)
    peak = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = torch.where(peak == 0, 0, -127 / torch.where(peak == 0, 1, peak))
    codes = torch.round(blocks * scale).clamp_max(127)
    return (codes / torch.where(scale == 0, 1, scale)).reshape(x.shape)


def round_inputs(block: nn.Module, kind: LayerKind, layer: int, qtype_of: QTypeOf) -> None:
    """Make every linear layer of a decoder layer round its inputs as the engine would.

    Fused experts round what enters them; what their down projections read lies inside transformers' own loop
    and is left as it is.
    """
    for parameter in kind.parameters:
        module = parameter.path.removesuffix(".weight")
        if parameter.path.endswith("experts.gate_up_proj"):
            module = parameter.path.rpartition(".")[0]
        elif not isinstance(dict(block.named_modules()).get(module), nn.Linear):
            continue
        qtype = qtype_of(layer_tensor(layer, parameter.roles[0]))
        block.get_submodule(module).register_forward_pre_hook(_hook(qtype))


def _hook(qtype: InputType) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def rounded(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
        return (rounded_input(arguments[0], qtype), *arguments[1:])

    return rounded
