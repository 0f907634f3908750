"""The way back through a layer: what leaves it as gradients at its output enters the layer before."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from bitladder.walk.layers import LayeredModel
from bitladder.walk.products import products
from bitladder.walk.states import Batch, States


def send_back(
    model: LayeredModel, block: nn.Module, layer: int, batch: Batch, entered: States, gradients: States, *, half: bool
) -> None:
    """A batch's gradients at a layer's output become those at its input, and the layer's tensors that ask for one get
    theirs added.

    The layer is computed again from ``entered``, the states that entered it: f32[windows, n, width], as the gradients
    are. What stands beyond a window's end takes no part. ``half``: multiply in bfloat16.
    """
    valid = torch.from_numpy(batch.valid).to(model.device)
    gradient = gradients.get(batch).to(model.device)
    with torch.enable_grad(), products(half=half):
        x = entered.get(batch).to(model.device).clone().requires_grad_()
        out = model.forward(block, layer, x)
        torch.autograd.backward(out, torch.where(valid[..., None], gradient, 0))
    gradients.put(batch, cast(torch.Tensor, x.grad))
