"""A model as its header describes it: dimensions, tensors, and the memory its context takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bitladder.formats.tensors import TensorInfo


@dataclass(frozen=True)
class ModelDims:
    """Dimensions in llama.cpp's words. ``n_expert`` is 0 for dense models; ``sliding_window`` 0 when there is
    none.
    """

    architecture: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    n_vocab: int
    n_ctx_train: int
    """Tokens of context that the model was trained for; 0 where nothing says so."""
    n_expert: int = 0
    n_expert_used: int = 0
    sliding_window: int = 0

    def context(self, n: int) -> int:
        """So many tokens, or as many as the model was trained for where those are fewer."""
        return min(n, self.n_ctx_train or n)

    @property
    def n_gqa(self) -> int:
        """Query heads that share a key/value head."""
        return self.n_head // max(1, self.n_head_kv)


@dataclass(frozen=True)
class Model:
    """A model in a GGUF file (or in several shards of one), described from headers alone."""

    name: str
    dims: ModelDims
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, Any] = field(repr=False)
    """Every key of the header, values as Python numbers, strings, bools and lists."""
    header_bytes: int = 0
    """Bytes before the tensor data."""
    file_name: str = ""
    """Name of the (first) file, without its folder."""
    raw_metadata: dict[str, bytes] = field(default_factory=dict, repr=False)
    """Every key of the header with its value's own bytes, the type in front: what another file copies."""
    alignment: int = 32
    """Tensor data starts at multiples of this many bytes."""

    @property
    def elements(self) -> int:
        """Number of weights."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors, scales included."""
        return 8 * self.tensor_bytes / self.elements
