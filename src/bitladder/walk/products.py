"""Matrix products of a calibrating pass in bfloat16, where the processor has instructions for them.

Methods read two things off a pass: the Gram matrix of each input, or its squares, and the states that go on to the next
layer. Both are sums over thousands of tokens; rounding what enters a product to 8 bits of mantissa moves an importance
by 0.1% (median), and what is built from it errs as much on other text as before, at twice the speed or better
(``benchmarks/bfloat16_error.py``). Sums stay in f32. Nothing that is reported about a level is measured this way.
"""

from __future__ import annotations

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
_QUERIES = 64
"""Queries that attend at a time: what follows them is not computed, and products still run at full speed."""


class _HalfProducts(TorchFunctionMode):
    """Inside it, linear layers of f32 weights and causal attention multiply in bfloat16, and still take and give
    f32."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch instead of ``func``."""
        if func is functional.linear and not kwargs and args[1].numel() >= _FEWEST and args[1].dtype == torch.float32:
            x, weight, *bias = args
            out = functional.linear(self._rounded(x), weight.bfloat16()).float()
            return out if not bias or bias[0] is None else out + bias[0]
        if func is functional.scaled_dot_product_attention and _plainly_causal(*args, **(kwargs or {})):
            return _causal_attention(*args[:3], scale=(kwargs or {}).get("scale"))
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values read the same tensor, one after another."""
        if self._last is None or self._last[0] is not x:
            self._last = x, x.bfloat16()
        return self._last[1]


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


def _causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
) -> torch.Tensor:
    """Attention f32[windows, heads, n, width]; heads that share keys and values go through a product together."""
    windows, heads, n, width = query.shape
    shared = key.shape[1]
    grouped = (query * (width**-0.5 if scale is None else scale)).bfloat16().view(windows, shared, -1, n, width)
    keys, values = key.bfloat16().transpose(2, 3), value.bfloat16()
    out = torch.empty_like(grouped, dtype=torch.float32)
    later = torch.full((_QUERIES, _QUERIES), float("-inf"), dtype=torch.bfloat16, device=query.device).triu(1)
    for start in range(0, n, _QUERIES):
        stop = min(start + _QUERIES, n)
        some = grouped[:, :, :, start:stop]
        scores = (some.reshape(windows, shared, -1, width) @ keys[..., :stop]).view(*some.shape[:4], stop)
        scores[..., start:] += later[: stop - start, : stop - start]
        shares = torch.softmax(scores, -1).view(windows, shared, -1, stop)
        out[:, :, :, start:stop] = (shares @ values[:, :, :stop]).view_as(some)
    return out.view(windows, heads, n, width)


@contextmanager
def products(*, half: bool) -> Iterator[None]:
    """Products of linear layers and attention in bfloat16, or as they are; where autograd watches, those of gradients,
    too."""
    with _HalfProducts() if half else nullcontext():
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
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
    vectors = found.get("avx512_bf16") and not str(found.get("cpu_name", "")).startswith("Intel")
    return bool(found.get("amx_bf16") or vectors)
