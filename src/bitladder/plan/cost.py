"""What a level costs in bytes, from the recipe tables: the same bytes the writer writes, split by what they
are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitladder.describe.model import Model
from bitladder.files.level_files import draft_level
from bitladder.formats.blocks import QTYPES
from bitladder.formats.parts import PARTS, parts_of
from bitladder.formats.recipes import RECIPES, is_quantizable
from bitladder.formats.tensors import TensorInfo


@dataclass(frozen=True)
class LevelBytes:
    """Bytes of a level's weights: part -> qtype -> bytes. A tied model has no ``output``; its embedding
    serves as one.
    """

    level: str
    parts: Mapping[str, Mapping[str, int]]

    def of(self, part: str) -> int:
        """Bytes of one part."""
        return sum(self.parts.get(part, {}).values())

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.of(part) for part in PARTS)

    @property
    def tied(self) -> bool:
        """The embedding is the output matrix too."""
        return not any(QTYPES[qtype].bpw < 32 for qtype in self.parts.get("output", {}))

    @property
    def head(self) -> Mapping[str, int]:
        """qtype -> bytes of what turns states into logits."""
        output = dict(self.parts.get("output", {}))
        if self.tied:
            for qtype, size in self.parts.get("embedding", {}).items():
                output[qtype] = output.get(qtype, 0) + size
        return output


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

    @property
    def by_part(self) -> LevelBytes:
        """The same bytes by what they are for."""
        return LevelBytes(self.level, parts_of(self.tensors))


def level_size(model: Model, level: str, *, has_importance: bool = False) -> LevelSize:
    """The tensors and bytes of ``model`` at ``level``, laid out by the code that writes the file.

    For a model whose header is not at hand (a row of the catalogue, a checkpoint not yet converted) the
    header's bytes are
    an estimate, the tensors' are exact.

    Raises:
        UnknownLevel: no such level.
    """
    draft = draft_level(model, level, has_importance=has_importance)
    label = RECIPES[draft.level].qtype
    quantizable = [tensor for tensor in draft.tensors if is_quantizable(tensor)]
    weights = sum(tensor.elements for tensor in quantizable)
    on_label = sum(tensor.elements for tensor in quantizable if tensor.qtype == label)
    return LevelSize(
        level=draft.level,
        tensors=draft.tensors,
        tensor_bytes=sum(tensor.nbytes for tensor in draft.tensors),
        file_bytes=draft.file_bytes + (0 if model.raw_metadata else model.header_bytes),
        on_label_share=on_label / weights if weights else 1.0,
        fallbacks=sum(tensor.shape[-1] % QTYPES[label].block_size != 0 for tensor in quantizable),
    )
