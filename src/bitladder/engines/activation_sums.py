"""Sums of squares of what stored matrices are multiplied with, taken from the nodes of llama.cpp's graph.

The numbers of llama.cpp's llama-imatrix: a row of sums and a count for each matrix of a tensor. Stacked experts
(``MUL_MAT_ID``) count the tokens that were routed to them; matrices that each see a share of the heads (latent
attention's attn_k_b and attn_v_b) are kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitladder.engines.llama_library import F32, I32, Library

Extents = Mapping[str, tuple[int, int]]
"""Tensor to its matrices and columns."""


class ActivationSums:
    """A ``llama_library.Watch`` that fills ``squares`` f64[matrices, columns] and ``counts`` f64[matrices]."""

    def __init__(self, library: Library, extents: Extents) -> None:
        """``extents``: the tensors to look at; nodes of others, or of other extents, are passed over."""
        self._library, self._extents = library, {name.encode(): sizes for name, sizes in extents.items()}
        self.fault = ""
        """Why nothing more is summed, when something went wrong; a callback cannot raise."""
        self.squares: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, NDArray[np.float64]] = {}
        self.clear()

    def clear(self) -> None:
        """Begin new sums."""
        self.squares = {name.decode(): np.zeros(sizes) for name, sizes in self._extents.items()}
        self.counts = {name.decode(): np.zeros(sizes[0]) for name, sizes in self._extents.items()}

    def __call__(self, node: Any, ask: bool) -> bool:
        """As ``llama_library.Watch``."""
        try:
            kind = self._library.is_product(node)
            name = bytes(node.contents.src[0].contents.name) if kind else b""
            if name not in self._extents:
                return not ask
            if not ask:
                self._take(node.contents, kind, name)
        except Exception as error:
            self.fault = self.fault or f"{type(error).__name__}: {error}"
            return False
        return True

    def _take(self, node: Any, kind: str, name: bytes) -> None:
        weight, read = node.src[0].contents, node.src[1]
        matrices, columns = self._extents[name]
        if weight.ne[0] != columns or weight.ne[2] * weight.ne[3] != matrices or read.contents.type != F32:
            return
        x = self._library.values(read, np.float32)
        if x is None:
            return
        squares, counts = self.squares[name.decode()], self.counts[name.decode()]
        if kind == "MUL_MAT_ID":
            if node.src[2].contents.type == I32:
                chosen = self._library.values(node.src[2], np.int32)
                if chosen is not None:
                    _add_experts(squares, counts, x[0], chosen[0, 0])
        elif matrices == 1:
            _add(squares, counts, 0, x.reshape(-1, columns))
        elif matrices == weight.ne[2]:
            share = max(1, x.shape[1] // matrices)  # several groups of rows may be multiplied with one matrix
            for group in range(x.shape[1]):
                _add(squares, counts, group // share, x[:, group].reshape(-1, columns))


def _add(squares: NDArray[np.float64], counts: NDArray[np.float64], matrix: int, x: NDArray[np.float32]) -> None:
    squares[matrix] += np.square(x).sum(axis=0, dtype=np.float64)
    counts[matrix] += len(x)


def _add_experts(
    squares: NDArray[np.float64], counts: NDArray[np.float64], x: NDArray[np.float32], chosen: NDArray[np.int32]
) -> None:
    """``x`` f32[tokens, slots or 1, columns]; ``chosen`` i32[tokens, slots]: the expert of each token's slot."""
    for expert in np.unique(chosen):
        if 0 <= expert < len(counts):
            tokens, slots = np.nonzero(chosen == expert)
            _add(squares, counts, int(expert), x[tokens, slots if x.shape[1] > 1 else 0])
