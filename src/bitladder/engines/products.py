"""Matrix products of a calibrating pass in bfloat16, where the processor has instructions for them.

GPTQ reads two things off a pass: the Gram matrix of each input, and the states that go on to the next layer. Both are
sums over thousands of tokens of values that 4-bit weights have moved by several percent; rounding what enters a product
to 8 bits of mantissa moves them by 0.2% more, at twice the speed or better. Sums stay in f32. Nothing that is reported
about a level is measured this way, and importance matrices, AWQ and INT8 are not gathered this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bitladder.engines.layers import inference

_FEWEST = 2**16
"""Weights of a matrix below which nothing is won: routers, which should not be rounded either."""


class _HalfProducts(TorchFunctionMode):
    """Inside it, linear layers of f32 weights multiply in bfloat16, and still take and give f32."""

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
            out = functional.linear(x.bfloat16(), weight.bfloat16()).float()
            return out if not bias or bias[0] is None else out + bias[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def half_products() -> Iterator[None]:
    """No autograd, and linear layers that multiply in bfloat16."""
    with inference(), _HalfProducts():
        yield


@cache
def half_products_pay() -> bool:
    """Whether this processor has instructions for bfloat16 products; others would imitate them, and be slower."""
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
