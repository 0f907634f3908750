"""Memory of a running model beside its weights: compute buffers and what the engine itself takes."""

from __future__ import annotations

from dataclasses import dataclass

from bitladder.describe.cache import padded_context
from bitladder.describe.model import Model
from bitladder.units import MiB

N_UBATCH = 512
"""Tokens the engine computes at once, llama.cpp's default."""
ENGINE_BYTES = 96 * MiB
"""What the engine's process takes besides model, cache and compute buffers: code, tokenizer, server."""


@dataclass(frozen=True)
class Buffers:
    """Bytes the engine allocates to compute in, for one micro-batch."""

    compute: int
    output: int

    @property
    def total(self) -> int:
        """Both."""
        return self.compute + self.output


def compute_buffers(model: Model, n_ctx: int, *, n_seq: int = 1, n_ubatch: int = N_UBATCH) -> Buffers:
    """An estimate of the engine's compute and output buffers with flash attention on, as is its default."""
    dims = model.dims
    tokens = min(n_ubatch, padded_context(n_ctx))
    width = max(3 * dims.n_embd + 3 * dims.n_ff, 4 * dims.n_embd)
    mask = 2 * tokens * padded_context(n_ctx)
    compute = 4 * tokens * width + mask
    return Buffers(compute, 4 * n_seq * dims.n_vocab)
