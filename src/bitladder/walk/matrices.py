"""A layer's matrices as checkpoints hold them: a row for each output, one expert at a time, and the rows of the linear
layers that are one matrix in the module one after another (``formats/disk_names.py``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import from_numpy, nn, no_grad

from bitladder.formats.families.family import Layers
from bitladder.formats.roles import Parameter
from bitladder.walk.layers import tensor_at

F32 = NDArray[np.float32]


def matrix(family: Layers, block: nn.Module, parameter: Parameter, expert: int | None = None) -> F32:
    """A parameter of a layer (of one expert, where experts are stacked), f32[outputs, inputs]."""
    value = tensor_at(block, parameter.path).detach()
    return as_linears(family, parameter, (value if expert is None else value[expert]).cpu().numpy())


def set_matrix(family: Layers, block: nn.Module, parameter: Parameter, expert: int | None, value: F32) -> None:
    """Replace a parameter of a layer (of one expert) by f32[outputs, inputs]."""
    target = tensor_at(block, parameter.path)
    with no_grad():
        (target if expert is None else target[expert]).copy_(from_numpy(as_module(family, parameter, value)))


def as_linears(family: Layers, parameter: Parameter, value: F32) -> F32:
    """f32[..., outputs, inputs] of a parameter as its module holds it."""
    upright = np.swapaxes(value, -1, -2) if parameter.turned else value
    return np.ascontiguousarray(in_runs(family, parameter.path, upright), np.float32)


def as_module(family: Layers, parameter: Parameter, value: F32) -> F32:
    """What ``as_linears`` undoes."""
    upright = in_turn(family, parameter.path, value)
    return np.ascontiguousarray(np.swapaxes(upright, -1, -2) if parameter.turned else upright, np.float32)


def in_runs(family: Layers, path: str, value: F32) -> F32:
    """Rows f32[..., rows, columns] that belong to several linear layers in turn, those of each one together."""
    return _dealt(value, len(family.experts[path])) if path in family.in_turn else value


def in_turn(family: Layers, path: str, value: F32) -> F32:
    """What ``in_runs`` undoes."""
    return _dealt(value, value.shape[-2] // len(family.experts[path])) if path in family.in_turn else value


def _dealt(value: F32, hands: int) -> F32:
    """Rows dealt to so many hands, one after another; the hands one below the other."""
    *stack, rows, columns = value.shape
    return value.reshape(*stack, rows // hands, hands, columns).swapaxes(-3, -2).reshape(value.shape)
