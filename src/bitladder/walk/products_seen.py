"""Which matrices of a module read which of its tensors: seen while its own forward runs, whatever its code is.

Every product of a parameter and another tensor passes torch's function protocol. The parameter is known by its memory,
one of stacked experts by its place in the stack, and linear layers that read the same tensor by that tensor's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset({
    nn.functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
    torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.addmm,
})  # fmt: skip

Memory = tuple[int, int, int, int]


def memory_of(x: torch.Tensor) -> Memory:
    """Equal for tensors, and views of another shape, that are the same values in the same place."""
    return x.untyped_storage().data_ptr(), int(x.storage_offset()), x.numel(), x.shape[-1] if x.ndim else 1


@dataclass(frozen=True)
class Product:
    """A parameter met an input."""

    path: str
    matrix: int | None
    """Which one of a stack; None where the whole stack was multiplied at once, or there is no stack."""
    x: torch.Tensor
    natural: bool
    """Inputs meet the parameter's last axis, else the one before it."""
    out: torch.Tensor


class Products(TorchFunctionMode):
    """Inside, every product with a parameter of a module is noted in ``seen``, in order."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.seen: list[Product] = []
        self._parameters = {
            value.untyped_storage().data_ptr(): (path, value)
            for path, value in module.named_parameters()
            if value.ndim > 1
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch calls it."""
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and isinstance(out, torch.Tensor):
            tensors = [one for one in _flat(args) if isinstance(one, torch.Tensor) and one.ndim > 1]
            for weight in tensors:
                path, whole = self._parameters.get(weight.untyped_storage().data_ptr(), ("", None))
                if whole is None:
                    continue
                other = next((one for one in tensors if one is not weight), None)
                if other is not None:
                    self.seen.append(_product(path, whole, weight, other, out, linear=func is nn.functional.linear))
                break
        return out


def _flat(arguments: Any) -> Iterator[Any]:
    for one in arguments:
        if isinstance(one, (tuple, list)):
            yield from _flat(one)
        else:
            yield one


def _product(
    path: str, whole: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, out: torch.Tensor, *, linear: bool
) -> Product:
    matrix = None
    if whole.ndim == 3 and weight.ndim == 2:
        matrix = weight.storage_offset() // whole.stride(0)
    along = weight.stride(-1) if linear else weight.stride(-2)
    return Product(path, matrix, x.detach(), along == whole.stride(-1), out.detach())


def expert_inputs(
    module: nn.Module, leaf: str, arguments: tuple[Any, ...], valid: torch.Tensor, experts: range | None = None
) -> Iterator[torch.Tensor]:
    """What each expert's matrix of a stack reads in one call of the module that holds them, f32[tokens, columns].

    Args:
        module: called with ``arguments``, whose first axes are tokens, once or once for each expert.
        leaf: the stack's name in it.
        arguments: of its forward.
        valid: bool[tokens], which positions hold a token and not padding.
        experts: which of them; all by default.
    """
    kept = tuple(_kept(one, valid) for one in arguments)
    with Products(module) as products, torch.no_grad():
        type(module).forward(module, *kept)
    stack = module.get_parameter(leaf)
    found: dict[int, list[torch.Tensor]] = {}
    for product in products.seen:
        if product.path == leaf and product.matrix is not None:
            found.setdefault(product.matrix, []).append(product.x.reshape(-1, product.x.shape[-1]))
        elif product.path == leaf:  # all at once: rows of zeros were not sent there
            for expert, x in enumerate(product.x.reshape(len(stack), -1, product.x.shape[-1])):
                found.setdefault(expert, []).append(x[x.abs().amax(dim=-1) > 0])
    columns = next((x.shape[-1] for own in found.values() for x in own), 0)
    for expert in range(len(stack)) if experts is None else experts:
        own = found.get(expert, [])
        yield torch.cat(own) if own else torch.zeros(0, columns)


def _kept(value: Any, valid: torch.Tensor) -> Any:
    """An argument's rows that belong to tokens."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or bool(valid.all()):
        return value
    repeats, rest = divmod(value.shape[0], len(valid))
    return value if rest or not repeats else value[valid.repeat(repeats)]
