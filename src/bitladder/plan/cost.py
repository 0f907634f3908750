"""What a level costs in bytes, from the recipe tables: the same bytes the writer writes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitladder.describe.model import Model
from bitladder.formats.blocks import QTYPES
from bitladder.formats.gguf import DEFAULT_ALIGNMENT, KEY_ALIGNMENT, padded
from bitladder.formats.recipes import RECIPES, assign, is_quantizable
from bitladder.formats.tensors import TensorInfo


@dataclass(frozen=True)
class LevelSize:
    """Bytes of one level of one model."""

    level: str
    tensors: tuple[TensorInfo, ...]
    """The model's tensors with the types this level gives them."""
    tensor_bytes: int
    file_bytes: int
    on_label_share: float
    fallbacks: int

    @property
    def bpw(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.tensor_bytes / sum(tensor.elements for tensor in self.tensors)


def level_size(model: Model, level: str, *, has_importance: bool = False) -> LevelSize:
    """The tensors and bytes of ``model`` at ``level``.

    Raises:
        UnknownLevel: no such level.
    """
    chosen = assign(level, model.tensors, model.dims, has_importance=has_importance)
    tensors = tuple(replace(tensor, qtype=chosen[tensor.name]) for tensor in model.tensors)
    alignment = model.metadata.get(KEY_ALIGNMENT, DEFAULT_ALIGNMENT)
    label = RECIPES[level].qtype
    quantizable = [tensor for tensor in tensors if is_quantizable(tensor)]
    weights = sum(tensor.elements for tensor in quantizable)
    on_label = sum(tensor.elements for tensor in quantizable if tensor.qtype == label)
    return LevelSize(
        level=level,
        tensors=tensors,
        tensor_bytes=sum(tensor.nbytes for tensor in tensors),
        file_bytes=model.header_bytes + sum(padded(tensor.nbytes, alignment) for tensor in tensors),
        on_label_share=on_label / weights if weights else 1.0,
        fallbacks=sum(tensor.shape[-1] % QTYPES[label].block_size != 0 for tensor in quantizable),
    )
