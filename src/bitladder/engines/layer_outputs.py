"""What every decoder layer gives, taken from the nodes of llama.cpp's graph that it names ``l_out-N``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitladder.engines.llama_library import F32, Library

_NAME = b"l_out-"


class LayerOutputs:
    """A ``llama_library.Watch`` that keeps hidden states f32[tokens, width] of each layer of one window."""

    def __init__(self, library: Library, n_layer: int, width: int) -> None:
        """Nodes of other layers or another width are passed over."""
        self._library, self._width = library, width
        self._layers = {_NAME + str(layer).encode(): layer for layer in range(n_layer)}
        self.fault = ""
        """Why nothing more is kept, when something went wrong; a callback cannot raise."""
        self._kept: dict[int, list[NDArray[np.float32]]] = {}

    def clear(self) -> None:
        """Begin a new window."""
        self._kept = {}

    def layer(self, layer: int, tokens: int) -> NDArray[np.float32] | None:
        """f32[tokens, width] of a layer; None where the graph has no such node, or one of other extents."""
        parts = self._kept.get(layer, [])
        return np.concatenate(parts) if sum(map(len, parts)) == tokens else None

    def __call__(self, node: Any, ask: bool) -> bool:
        """As ``llama_library.Watch``."""
        try:
            tensor = node.contents
            layer = self._layers.get(bytes(tensor.name))
            if layer is None:
                return not ask
            if not ask and tensor.type == F32 and tensor.ne[0] == self._width and tensor.ne[2] * tensor.ne[3] == 1:
                values = self._library.values(node, np.float32)
                if values is not None:
                    self._kept.setdefault(layer, []).append(values[0, 0].copy())
        except Exception as error:
            self.fault = self.fault or f"{type(error).__name__}: {error}"
            return False
        return True
