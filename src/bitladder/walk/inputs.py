"""What linear layers read: sums over the tokens of a text, gathered by hooks while states pass through a layer.

Every shard of the text has sums of its own, which are added in the order of the shards: a result does not depend on
which was computed first, or where.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.errors import BadWeights
from bitladder.formats.roles import SharedInput
from bitladder.walk.products_seen import expert_inputs
from bitladder.walk.states import Batch

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

PRODUCTS = "products:"
"""Begins the kind of inputs that are found by running their module: what each matrix of a stack is multiplied with."""
_STRIP = 128
"""Narrow enough that little below the diagonal is computed, wide enough for products at full speed."""
_LOUD = 64
"""Channels whose products are made in f32 beside bfloat16: they hold most of the energy, and a bfloat16 product is
rounded in proportion to itself, which must stay below the quietest directions' damping."""


@dataclass(frozen=True)
class Wants:
    """Which statistics someone needs beside sums of squares, which cost nothing."""

    gram: bool = False
    largest: bool = False
    held_out: frozenset[int] = frozenset()
    """Windows that have a Gram matrix of their own, too, of linear layers' inputs: places in the list that batches were
    made of."""

    def __or__(self, other: Wants) -> Wants:
        return Wants(self.gram or other.gram, self.largest or other.largest, self.held_out | other.held_out)


@dataclass(frozen=True)
class InputStatistics:
    """What one input (of one expert) looked like over the calibration set."""

    gram: F32
    """``X^T X`` f32[columns, columns], a sum over tokens; f32[0, 0] where only squares were asked for."""
    largest: F32
    """Largest magnitude of each channel, f32[columns]; f32[0] from passes that stop."""
    squares: F64
    """Sum of squares of each channel, f64[columns]: llama.cpp's importance matrix."""
    tokens: int
    held_out: F32
    """The part of ``gram`` that comes from windows held out, of a linear layer's input; else f32[0, 0]."""
    drift: F32
    """``(R - X)^T X`` f32[columns, columns] with R the input that the source itself has there; f32[0, 0] where that
    was not asked for."""

    def moved(self, columns: NDArray[np.int64]) -> InputStatistics:
        """The same with channel i where ``columns[i]`` says."""
        back = np.argsort(columns)

        def square(matrix: F32) -> F32:
            return np.ascontiguousarray(matrix[np.ix_(back, back)]) if len(matrix) else matrix

        largest = self.largest[back] if len(self.largest) else self.largest
        held_out, drift = square(self.held_out), square(self.drift)
        return InputStatistics(square(self.gram), largest, self.squares[back], self.tokens, held_out, drift)


def statistics_of(gram: F64, tokens: int) -> InputStatistics:
    """Statistics that say no more than ``X^T X`` f64[columns, columns], or what stands in its place."""
    none = np.zeros((0, 0), np.float32)
    return InputStatistics(gram.astype(np.float32), np.zeros(0, np.float32), gram.diagonal().copy(), tokens, none, none)


def readable(array: NDArray[Any]) -> torch.Tensor:
    """A tensor of an array that may be shared with others: it must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to
        return torch.from_numpy(array)


class Sums:
    """Running sums of one input. Only the blocks of the Gram matrix on and above the diagonal are computed."""

    def __init__(
        self,
        columns: int,
        device: torch.device,
        *,
        gram: bool,
        largest: bool = True,
        half: bool = False,
        apart: bool = False,
    ) -> None:
        """``gram``, ``largest``: what is asked for besides squares. ``half``: multiply in bfloat16. ``apart``: a Gram
        matrix more, of the tokens that are held out."""
        nothing = torch.zeros(0, 0)
        self.gram = torch.zeros(columns, columns, device=device) if gram else nothing
        self._held_out = torch.zeros_like(self.gram) if apart else nothing
        self._drift = nothing
        self.largest = torch.zeros(columns if largest else 0, device=device)
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.tokens = 0
        self._half = half and columns > 4 * _LOUD
        self._borrowed = False

    def add(self, x: torch.Tensor, held_out: torch.Tensor | None = None) -> None:
        """Take in f32[tokens, columns]; ``held_out`` bool[tokens]."""
        if not len(x):
            return
        squares = torch.linalg.vecdot(x, x, dim=0)
        if held_out is None:
            self._multiply(x, self.gram, squares)
        else:
            self._multiply(x[~held_out], self.gram, squares)
            self._multiply(x[held_out], self._held_out, squares)
        if len(self.largest):
            torch.maximum(self.largest, x.abs().amax(dim=0), out=self.largest)
        self.squares += squares
        self.tokens += len(x)

    def add_drift(self, x: torch.Tensor, original: torch.Tensor) -> None:
        """Take in how far f32[tokens, columns] are from what the source has there."""
        if not len(self._drift):
            self._drift = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        if not self._half:
            self._drift.addmm_((original - x).T, x)
            return
        loud, short = self.squares.topk(_LOUD).indices, (original - x).T
        self._drift += short.bfloat16() @ x.bfloat16().index_fill_(1, loud, 0)
        self._drift.index_add_(1, loud, short @ x.index_select(1, loud))

    def merge(self, later: Sums) -> None:
        """Add what a later shard summed of the same input."""
        self._own()
        with torch.inference_mode():
            if len(self._drift) and len(later._drift):
                self._drift += later._drift
            elif len(later._drift):  # no token of the shards before came by
                self._drift = later._drift
            self.gram += later.gram
            self._held_out += later._held_out
            self.squares += later.squares
            torch.maximum(self.largest, later.largest, out=self.largest)
            self.tokens += later.tokens

    def to_cpu(self) -> None:
        """Move to main memory."""
        vars(self).update({name: one.cpu() for name, one in vars(self).items() if isinstance(one, torch.Tensor)})

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: arrays, which travel without being copied."""
        return {name: one.numpy() if isinstance(one, torch.Tensor) else one for name, one in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Back again; what travelled may be shared with others, so it is copied before it is changed."""
        read = {name: readable(one) for name, one in state.items() if isinstance(one, np.ndarray)}
        vars(self).update(state | read | {"_borrowed": True})

    def borrowed(self) -> Sums:
        """The same, copied before it is changed."""
        other = Sums.__new__(Sums)
        vars(other).update(vars(self) | {"_borrowed": True})
        return other

    def _own(self) -> None:
        if self._borrowed:
            vars(self).update({name: one.clone() for name, one in vars(self).items() if isinstance(one, torch.Tensor)})
            self._borrowed = False

    def _multiply(self, x: torch.Tensor, gram: torch.Tensor, squares: torch.Tensor) -> None:
        if self._half and len(gram):
            _add_half(gram, x, squares.topk(_LOUD).indices)
            return
        for start in range(0, len(gram), _STRIP):
            strip = x[:, start : start + _STRIP]
            gram[start : start + _STRIP, start:].addmm_(strip.T, x[:, start:])

    def result(self) -> InputStatistics:
        """The sums so far, the Gram matrices whole."""
        self._own()
        with torch.inference_mode():
            if len(self._held_out):
                self.gram += self._held_out
            _complete(self.gram)
            _complete(self._held_out)
        return InputStatistics(
            self.gram.cpu().numpy(),
            self.largest.cpu().numpy(),
            self.squares.cpu().numpy(),
            self.tokens,
            self._held_out.cpu().numpy(),
            self._drift.cpu().numpy(),
        )


def _add_half(gram: torch.Tensor, x: torch.Tensor, loud: torch.Tensor) -> None:
    """Products in bfloat16, but those of the ``loud`` channels. What lands below the diagonal is never read."""
    half = x.bfloat16().index_fill_(1, loud, 0)
    for start in range(0, len(gram), _STRIP):
        gram[start : start + _STRIP, start:] += half[:, start : start + _STRIP].T @ half[:, start:]
    products = x.index_select(1, loud).T @ x  # indexing with brackets takes six times as long
    gram.index_add_(0, loud, products)
    gram.index_add_(1, loud, products.index_fill_(1, loud, 0).T)


def _complete(gram: torch.Tensor) -> None:
    """Mirror the upper half, in place: the matrix may be as large as the layer."""
    for start in range(0, len(gram), _STRIP):
        strip = slice(start, start + _STRIP)
        corner = torch.triu(gram[strip, strip])
        gram[strip, strip] = corner + torch.triu(corner, 1).T
        gram[start + _STRIP :, strip] = gram[strip, start + _STRIP :].T


class InputWatch:
    """Sums of one shard over what some inputs of a layer read."""

    def __init__(
        self, inputs: Sequence[SharedInput], wants: Wants, *, half: bool = False, experts: range | None = None
    ) -> None:
        """``half``: Gram matrices are multiplied in bfloat16. ``experts``: which of a stack; all by default."""
        self._wants, self._half, self._experts = wants, half, experts
        self.sums: dict[SharedInput, list[Sums]] = {shared: [] for shared in inputs}

    @contextmanager
    def on(self, block: nn.Module, batch: Batch, original: torch.Tensor | None = None) -> Iterator[None]:
        """Take in what one batch makes the layer's modules read. ``original`` f32[windows, n, columns]: what the source
        itself has there, where a single linear layer's input is watched."""
        with ExitStack() as hooks:
            for shared in self.sums:
                hook = self._hook(shared, batch, original)
                hooks.callback(block.get_submodule(shared.module).register_forward_pre_hook(hook).remove)
            yield

    def take(
        self, shared: SharedInput, module: nn.Module, batch: Batch, x: torch.Tensor, original: torch.Tensor | None
    ) -> None:
        """Take in what one batch makes a linear module read, f32[windows, n, columns], without running it."""
        self._hook(shared, batch, original)(module, (x,))

    def _hook(self, shared: SharedInput, batch: Batch, original: torch.Tensor | None) -> Any:
        wants, sums, shape = self._wants, self.sums[shared], torch.from_numpy(batch.valid)
        marked = torch.tensor([window in wants.held_out for window in batch.windows])
        valid, apart = shape.reshape(-1), marked[:, None].expand_as(shape)[shape]
        held_out = bool(wants.held_out) and wants.gram and shared.kind == "linear"

        def seen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            with torch.no_grad():
                tokens = valid.to(arguments[0].device)
                detached = tuple(one.detach() if isinstance(one, torch.Tensor) else one for one in arguments)
                for number, x in enumerate(vectors(shared.kind, module, detached, tokens, self._experts)):
                    if number == len(sums):
                        sums.append(self._new(x, apart=held_out))
                    sums[number].add(x, apart.to(x.device) if held_out else None)
                    if original is not None:
                        sums[number].add_drift(x, *vectors(shared.kind, module, (original,), tokens))

        return seen

    def _new(self, x: torch.Tensor, *, apart: bool) -> Sums:
        wants = self._wants
        return Sums(x.shape[1], x.device, gram=wants.gram, largest=wants.largest, half=self._half, apart=apart)

    def on_the_cpu(self) -> InputWatch:
        """The same, its sums in main memory."""
        for own in self.sums.values():
            for one in own:
                one.to_cpu()
        return self

    def borrowed(self) -> InputWatch:
        """The same sums, which are copied before they are changed."""
        other = copy(self)
        other.sums = {shared: [one.borrowed() for one in own] for shared, own in self.sums.items()}
        return other

    def merge(self, later: InputWatch) -> None:
        """Add what a later shard saw."""
        for shared, others in later.sums.items():
            sums = self.sums[shared]
            for own, other in zip(sums, others, strict=False):
                own.merge(other)
            sums.extend(others[len(sums) :])

    def peak(self, shared: SharedInput) -> float | None:
        """As ``peak_of``."""
        return _peak(one.largest.numpy(force=True) for one in self.sums[shared])

    def statistics(self, layer: int, shared: SharedInput, some: slice) -> Iterator[InputStatistics]:
        """Those of some of an input's experts, one at a time; its sums are let go of.

        Raises:
            BadWeights: an input is not finite.
        """
        own = self.sums.pop(shared)[some]
        while own:
            yield _checked(shared, layer, own.pop(0).result())

    def results(self, layer: int) -> Mapping[SharedInput, list[InputStatistics]]:
        """Statistics of each input, one per expert for stacked experts; none where no token came by.

        Raises:
            BadWeights: an input is not finite.
        """
        return {shared: [_checked(shared, layer, one.result()) for one in own] for shared, own in self.sums.items()}


def keeping(
    block: nn.Module, modules: Sequence[str], batch: Batch, put: Callable[[str, Batch, torch.Tensor], None]
) -> ExitStack:
    """Hooks that hand what modules read, f32[windows, n, columns], to ``put``, for the time that a batch takes."""
    hooks = ExitStack()

    def hook(module: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, arguments: put(module, batch, arguments[0].reshape(*batch.tokens.shape, -1))

    for module in modules:
        hooks.callback(block.get_submodule(module).register_forward_pre_hook(hook(module)).remove)
    return hooks


def peak_of(statistics: Sequence[InputStatistics]) -> float | None:
    """The largest magnitude in an input, of all experts together; None where nobody asked, or nothing came by."""
    return _peak(one.largest for one in statistics)


def _peak(largest: Iterable[F32]) -> float | None:
    found = max((float(one.max(initial=0)) for one in largest), default=0.0)
    return found if found > 0 else None


def merged(parts: Iterable[InputWatch]) -> InputWatch:
    """What all shards saw, added in their order, as they come."""
    each = iter(parts)
    first = next(each)
    for later in each:
        first.merge(later)
    return first


def _checked(shared: SharedInput, layer: int, seen: InputStatistics) -> InputStatistics:
    if not all(np.isfinite(found).all() for found in (seen.gram, seen.largest, seen.squares)):
        raise BadWeights(
            f"The inputs of {shared.module} in layer {layer} are not finite.",
            means="Weights of this or an earlier layer overflow on the calibration text; the model is damaged.",
            do="Check the source's own answers first; a source in another precision may be sound.",
        )
    return seen


def vectors(
    kind: str, module: Any, arguments: tuple[Any, ...], valid: torch.Tensor, experts: range | None = None
) -> Iterator[torch.Tensor]:
    """What the linear layers of a shared input read in one call of its module.

    Args:
        kind: as ``formats.roles.SharedInput``.
        module: the module that is called, with ``arguments``.
        valid: bool[tokens], which positions hold a token and not padding.
        experts: which of fused ones; all by default.

    Returns:
        f32[tokens, columns]; of fused experts one after another, each with the tokens that were routed to it.
    """
    if kind == "linear":
        x = arguments[0].reshape(-1, arguments[0].shape[-1])
        yield x if bool(valid.all()) else x[valid]
        return
    if kind.startswith(PRODUCTS):
        yield from expert_inputs(module, kind.removeprefix(PRODUCTS), arguments, valid, experts)
        return
    states, chosen = arguments[0], arguments[1]
    for expert in range(module.num_experts) if experts is None else experts:
        x = states[(chosen == expert).any(dim=-1) & valid]
        if kind == "experts_down":
            gate, up = nn.functional.linear(x, module.gate_up_proj[expert]).chunk(2, dim=-1)
            x = module.act_fn(gate) * up
        yield x
