"""Products of a level that passes beside its reference, in bfloat16, with errors as small as the level's differences.

A level's linear layer reads nearly what the reference's reads, with nearly its weights. With the reference's input
``x``, output ``y`` and weights ``W`` at hand, the level's output is exact arithmetic away from them::

    (x + d) (W + D)  =  y  +  d (W + D)  +  x D

Only the last two terms are multiplied anew. They are as small as what the level loses, so what bfloat16 rounds off them
moves a loss by some thousandths of itself at most, be it 1e-6 or 1 nat (``benchmarks/walk_differences.py``). Both are
one product of twice the length, which processors with matrix instructions do several times as fast as the one in f32.
Everything between linear layers is computed in f32 as ever.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from bitladder.units import GiB
from bitladder.walk.states import Batch

_FEWEST = 2**12
"""Weights of a matrix below which nothing is won."""
HELD_BYTES = 2 * GiB
"""Of what the reference read and gave in one layer; linear layers beyond it are multiplied in f32."""


class _Call(NamedTuple):
    """A linear layer of the reference on one batch: f32[windows, n, in], that in bfloat16, f32[windows, n, out]."""

    x: torch.Tensor
    half: torch.Tensor
    y: torch.Tensor


class _Matrix(NamedTuple):
    """A level's matrix beside the reference's: bfloat16[out, 2 in], and what its bias differs by."""

    both: torch.Tensor
    bias: torch.Tensor | None


def beside(level: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """bfloat16[out, 2 in]: a level's matrix f32[out, in], then its difference from the reference's."""
    columns = level.shape[1]
    both = torch.empty(level.shape[0], 2 * columns, dtype=torch.bfloat16, device=level.device)
    both[:, :columns] = level
    both[:, columns:] = level - reference
    return both


def apart(level: torch.Tensor, reference: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """bfloat16[..., 2 in]: what a level's inputs f32[..., in] differ by, then the reference's; ``half``: these in
    bfloat16."""
    return torch.cat([(level - reference).bfloat16(), half], -1)


class Beside:
    """What the reference's linear layers read and gave in the layer that levels pass next."""

    def __init__(self, *, held_bytes: int = HELD_BYTES) -> None:
        self._limit, self._held = held_bytes, 0
        self._calls: dict[tuple[int, str], _Call] = {}
        self._weights: dict[str, nn.Linear] = {}
        self._kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._block: nn.Module | None = None
        self._matrices: dict[str, _Matrix] = {}
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def forget(self) -> None:
        """The layer is done."""
        self._calls, self._weights, self._matrices = {}, {}, {}
        self._held, self._kept, self._block, self._last = 0, None, None, None

    def on(self, block: nn.Module, batch: Batch, *, reference: bool) -> AbstractContextManager[None]:
        """For the time that a batch takes through a layer of the reference, which goes first, or of a level."""
        windows, n = batch.tokens.shape
        return self._watched(block, batch.start, (windows, n)) if reference else self._helped(block, batch.start)

    @contextmanager
    def _watched(self, block: nn.Module, batch: int, shape: tuple[int, int]) -> Iterator[None]:
        """Keep what happens inside."""
        self._weights = dict(_linear(block))
        hooks = [
            module.register_forward_hook(partial(self._keep, batch, shape, path))
            for path, module in self._weights.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._kept = None

    def _keep(
        self,
        batch: int,
        shape: tuple[int, int],
        path: str,
        _: nn.Module,
        inputs: tuple[torch.Tensor, ...],
        y: torch.Tensor,
    ) -> None:
        """Copies, since who gets them may change them; what several layers read is kept once."""
        x = inputs[0]
        again = self._calls.pop((batch, path), None) is not None
        if again or x.dim() != 3 or tuple(x.shape[:2]) != shape:  # not every token once, each in its place
            self._weights.pop(path, None)
            return
        new = self._kept is None or self._kept[0] is not x
        size = 4 * y.numel() + (6 * x.numel() if new else 0)
        if self._held + size > self._limit:
            return
        self._held += size
        if new:
            self._kept = x, x.clone(), x.bfloat16()
        assert self._kept is not None
        self._calls[batch, path] = _Call(*self._kept[1:], y.clone())

    @contextmanager
    def _helped(self, block: nn.Module, batch: int) -> Iterator[None]:
        """Inside it, linear layers that the reference's are known of multiply differences."""
        if block is not self._block:
            self._block, self._matrices = block, {}
        changed: list[nn.Linear] = []
        for path, module in _linear(block):
            call, own = self._calls.get((batch, path)), self._weights.get(path)
            if call is not None and own is not None and own.weight.shape == module.weight.shape:
                module.forward = partial(self._forward, path, call, module, own)  # type: ignore[method-assign]
                changed.append(module)
        try:
            yield
        finally:
            for module in changed:
                del module.forward
            self._last = None

    def _forward(self, path: str, call: _Call, module: nn.Linear, own: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if x.shape != call.x.shape:
            return functional.linear(x, module.weight, module.bias)
        if path not in self._matrices:
            bias = None if module.bias is None or own.bias is None else module.bias - own.bias
            self._matrices[path] = _Matrix(beside(module.weight, own.weight), bias)
        matrix = self._matrices[path]
        if self._last is None or self._last[0] is not x or self._last[1] is not call.x:
            self._last = x, call.x, apart(x, call.x, call.half)
        out = functional.linear(self._last[2], matrix.both).float().add_(call.y)
        return out if matrix.bias is None else out.add_(matrix.bias)


def _linear(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in block.named_modules():
        if type(module) is nn.Linear and module.weight.numel() >= _FEWEST and module.weight.dtype == torch.float32:
            yield path, module


class HeadBeside:
    """The same at the head, slice by slice of the vocabulary."""

    def __init__(self) -> None:
        self._matrices: dict[Hashable, torch.Tensor] = {}

    def take_slice(self, heads: dict[Hashable, torch.Tensor], reference: Hashable) -> None:
        """Other rows of every model's output matrix f32[rows, n_embd]."""
        self._matrices = {identity: beside(rows, heads[reference]) for identity, rows in heads.items()}

    def difference(self, identity: Hashable, both: torch.Tensor) -> torch.Tensor:
        """Logits minus the reference's, f32[tokens, rows]; ``both``: ``apart`` of the normed states."""
        return functional.linear(both, self._matrices[identity]).float()


def differences_for(device: torch.device, asked: bool | None = None) -> bool:
    """What was asked for; where nothing was, whether it pays on this processor."""
    return device.type == "cpu" and differences_pay() if asked is None else asked


@cache
def differences_pay() -> bool:
    """Whether this processor multiplies in bfloat16 several times as fast as in f32: with AMX. Vector instructions do
    so at most twice as fast, which the product of twice the length takes back."""
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
    return bool(found.get("amx_bf16"))
