"""Matrix products of a pass: by the library that is fastest on this processor, and in bfloat16 where that is enough.

Products in f32 are torch's own, or oneDNN's where torch's are written for another maker's processors. Both sum in f32.

A calibrating pass may multiply in bfloat16, where the processor has instructions for that. Methods read two things off
a pass: the Gram matrix of each input, or its squares, and the states that go on to the next layer. Both are sums over
thousands of tokens; rounding what enters a product to 8 bits of mantissa moves an importance by 0.1% (median), and what
is built from it errs as much on other text as before, at twice the speed or better (``benchmarks/bfloat16_error.py``).
Sums stay in f32. Nothing that is reported about a level is measured this way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bitladder.executors import Executor

_FEWEST = 2**16
"""Weights of a matrix below which nothing is won: routers, which should not be rounded either."""
_FEWEST_STEPS = 2**25
"""Multiplications of a product below which oneDNN is not asked: what it compiles for a shape that it has not met takes
as long (2 ms)."""
_FEWEST_ATTENDING = 256
"""Tokens of a window below which torch's own attention is as fast."""


class _Products(TorchFunctionMode, ABC):
    """Inside it, linear layers and plainly causal attention go another way than torch's own."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch instead of ``func``."""
        given = kwargs or {}
        if func is functional.linear and len(args) > 1:
            return self.linear(*args, **given)
        if func is functional.scaled_dot_product_attention and _plainly_causal(*args, **given):
            found = self.attention(*args[:3], scale=given.get("scale"))
            if found is not None:
                return found
        return func(*args, **given)

    @abstractmethod
    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As ``torch.nn.functional.linear``."""

    @abstractmethod
    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
    ) -> torch.Tensor | None:
        """Of f32[windows, heads, n, width]; None where torch's own is to be taken."""


class _HalfProducts(_Products):
    """Products in bfloat16 that take and give f32."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """In bfloat16, of f32 weights that are many."""
        if weight.numel() < _FEWEST or weight.dtype != torch.float32:
            return functional.linear(x, weight, bias)
        out = functional.linear(self._rounded(x), weight.bfloat16()).float()
        return out if bias is None else out + bias

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
    ) -> torch.Tensor:
        """In bfloat16."""
        return _half_causal_attention(query, key, value, scale=scale)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values read the same tensor, one after another."""
        if self._last is None or self._last[0] is not x:
            self._last = x, x.bfloat16()
        return self._last[1]


class _FastProducts(_Products):
    """Products in f32 by oneDNN where nobody asks for gradients, those of attention where windows are long."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """By whom it is fastest."""
        return linear(x, weight, bias)

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
    ) -> torch.Tensor | None:
        """By oneDNN."""
        if query.shape[2] < _FEWEST_ATTENDING or not _plain(query, key, value):
            return None
        return _causal_attention(query, key, value, scale=scale)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x weight' + bias``, f32[..., columns] by f32[rows, columns], as ``torch.nn.functional.linear``: by oneDNN where
    that is faster and nobody asks for gradients. The result does not depend on how many threads there are."""
    if x.numel() * weight.shape[0] >= _FEWEST_STEPS and one_dnn_pays() and _plain(x, weight, bias):
        return _one_dnn(x, weight, bias)
    return functional.linear(x, weight, bias)


def _plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all are f32 on the processor, and nobody asks for gradients."""
    there = [one for one in tensors if one is not None]
    watched = torch.is_grad_enabled() and any(one.requires_grad for one in there)
    return not watched and all(one.dtype == torch.float32 and one.device.type == "cpu" for one in there)


def _one_dnn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer; what does not lie in a row would take a hundred times as long."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return out


def _plainly_causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: object,
) -> bool:
    """Whether each token sees those up to itself, and nothing else is asked for."""
    whole = query.shape[2] == key.shape[2] and key.shape[-1] == value.shape[-1]
    return is_causal and attn_mask is None and not dropout_p and whole and query.dtype == torch.float32


def _half_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
) -> torch.Tensor:
    """Attention f32[windows, heads, n, width]; heads that share keys and values go through a product together."""
    grouped = _grouped(query, key.shape[1], scale).bfloat16()
    out = torch.empty_like(grouped, dtype=torch.float32)
    _attend(grouped, key.bfloat16(), value.bfloat16().mT, out, lambda some, by: some @ by.mT, queries=64)
    return out.view_as(query)


def _causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
) -> torch.Tensor:
    """As ``_half_causal_attention``, in f32 by oneDNN, which knows no batches of products."""
    grouped = _grouped(query, key.shape[1], scale)
    out = torch.empty_like(grouped)
    for window in range(out.shape[0]):
        for head in range(out.shape[1]):
            one = window, head
            _attend(grouped[one], key[one].contiguous(), value[one].mT, out[one], _one_dnn, queries=128)
    return out.view_as(query)


def _grouped(query: torch.Tensor, shared: int, scale: float | None) -> torch.Tensor:
    """Scaled queries f32[windows, shared, heads / shared, n, width]."""
    windows, _, n, width = query.shape
    return (query * (width**-0.5 if scale is None else scale)).reshape(windows, shared, -1, n, width)


def _attend(
    grouped: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *, queries: int,
) -> None:  # fmt: skip
    """Each token attends to those up to itself, so many queries at a time: what follows them is not computed, and
    products still run at full speed.

    Args:
        grouped: scaled queries [..., heads, n, width].
        keys: [..., n, width].
        values: [..., width, n].
        out: f32[..., heads, n, width], to be filled.
        product: of [..., rows, k] by the transpose of [..., columns, k].
        queries: at a time.
    """
    n, width = grouped.shape[-2:]
    later = torch.full((queries, queries), float("-inf"), dtype=grouped.dtype, device=grouped.device).triu(1)
    for start in range(0, n, queries):
        stop = min(start + queries, n)
        some = grouped[..., start:stop, :]
        scores = product(some.reshape(*some.shape[:-3], -1, width), keys[..., :stop, :]).view(*some.shape[:-1], stop)
        scores[..., start:] += later[: stop - start, : stop - start]
        shares = torch.softmax(scores, -1).view(*some.shape[:-3], -1, stop)
        out[..., start:stop, :] = product(shares, values[..., :stop]).view_as(some)


@contextmanager
def products(*, half: bool) -> Iterator[None]:
    """Products of linear layers and attention in bfloat16, or in f32 as is fastest; where autograd watches, those of
    gradients are in bfloat16, too."""
    with _HalfProducts() if half else _FastProducts() if one_dnn_pays() else nullcontext():
        yield


def wants_half_products(asked: bool | None, device: str) -> bool:
    """What was asked for; where nothing was, whether it pays on this processor."""
    return device == "cpu" and half_products_pay() if asked is None else asked


def half_for(executor: Executor | None) -> bool | None:
    """For ``wants_half_products``: what an executor's devices want; None without one."""
    return None if executor is None else wants_half_products(None, executor.device)


@cache
def half_products_pay() -> bool:
    """Whether this processor multiplies in bfloat16 faster than in f32: with AMX, or with AVX512_BF16 where that is no
    Intel's. Intel's vector units are slower at it (81 GF/s a core against 135, torch 2.13, matrices of the demo model),
    AMD's twice as fast; others would imitate the instructions."""
    found = _capabilities()
    return bool(found.get("amx_bf16") or (found.get("avx512_bf16") and not _is_intels(found)))


@cache
def one_dnn_pays() -> bool:
    """Whether oneDNN multiplies in f32 faster than torch does by itself: on x86 processors that are no Intel's, which
    MKL gives code for AVX2 at best. AMD EPYC with AVX-512, GF/s a core with torch 2.13, matrices of the demo model: 105
    and 240; with oneDNN held to AVX2 118. A rule and no measurement, so that results can be repeated."""
    found = _capabilities()
    slow = found.get("avx2") and torch._C.has_mkl and not _is_intels(found)
    return bool(slow and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def _capabilities() -> dict[str, object]:
    """Of this processor; nothing where torch is too old to tell."""
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def _is_intels(capabilities: Mapping[str, object]) -> bool:
    return str(capabilities.get("cpu_name", "")).startswith("Intel")
