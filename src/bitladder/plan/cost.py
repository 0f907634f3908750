"""What a level costs in bytes, from the recipe tables: the same bytes the writer writes, split by what they
are for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bitladder.describe.model import Model
from bitladder.files.level_files import PLANNED_FIT, LevelDraft, draft_level
from bitladder.formats.blocks import QTYPES
from bitladder.formats.parts import PARTS, part_of, parts_of
from bitladder.formats.recipes import RECIPES, assign, is_quantizable, nearest_level, without_blocks
from bitladder.formats.roles import EMBEDDING, OUTPUT
from bitladder.formats.tensors import TensorInfo
from bitladder.levels import (
    MLX_ENGINES,
    CheckpointLevel,
    FeedbackLevel,
    FoldedLevel,
    Level,
    Needs,
    RecipeLevel,
    parse_level,
)
from bitladder.levels.checkpoints import offered_names


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

    level: Level
    by_part: LevelBytes
    """Bytes of its tensors by what they are for."""
    elements: int
    """Weights."""
    file_bytes: int
    on_label_share: float
    fallbacks: int
    tensors: tuple[TensorInfo, ...] = ()
    """The model's tensors with the types that a GGUF level gives them; none of a checkpoint."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.by_part.total

    @property
    def bpw(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.tensor_bytes / self.elements


def level_size(model: Model, level: Level, *, has_importance: bool = False) -> LevelSize:
    """The tensors and bytes of ``model`` at ``level``, laid out by the code that writes the file.

    For a model whose header is not at hand (a row of the catalogue, a checkpoint not yet converted) the
    header's bytes are an estimate, the tensors' are exact.

    Levels fitted with error feedback have llama.cpp's types, those made for an importance matrix, or, for bits per
    weight, types that are about as large as the ones that will be chosen once tensors have been weighed.

    A level of a checkpoint (``AWQ-4bit-g64``) has exact tensors, as `quantize` writes them.

    Raises:
        NothingFits, UsageError: no types make so few, or so many, bits per weight; groups that divide no row.
    """
    match level:
        case CheckpointLevel():
            return _checkpoint_size(model, level)
        case FeedbackLevel():
            draft = _with_feedback(model, level)
        case RecipeLevel() | FoldedLevel():
            draft = draft_level(
                model, level.recipe, label=level.name, has_importance=has_importance or level.needs is Needs.CALIBRATION
            )
    label = RECIPES[draft.level].qtype
    quantizable = [tensor for tensor in draft.tensors if is_quantizable(tensor)]
    weights = sum(tensor.elements for tensor in quantizable)
    on_label = sum(tensor.elements for tensor in quantizable if tensor.qtype == label)
    return LevelSize(
        level=level,
        by_part=LevelBytes(draft.label, parts_of(draft.tensors)),
        elements=sum(tensor.elements for tensor in draft.tensors),
        file_bytes=draft.file_bytes + (0 if model.raw_metadata else model.header_bytes),
        on_label_share=on_label / weights if weights else 1.0,
        fallbacks=len(without_blocks(draft.tensors, label)),
        tensors=draft.tensors,
    )


def _checkpoint_size(model: Model, level: CheckpointLevel) -> LevelSize:
    """Matrices of the layers as the format stores them, embedding and output where it does those, too; all else in
    float."""
    form = level.format
    packed = {tensor.name: tensor for tensor in _layer_matrices(model)}
    if form.everywhere:
        packed |= {tensor.name: tensor for tensor in model.tensors if tensor.name in (EMBEDDING, OUTPUT)}
    form.check_shapes(level.name, {name: (tensor.shape[-2], tensor.shape[-1]) for name, tensor in packed.items()})
    parts: dict[str, dict[str, int]] = {}
    for tensor in model.tensors:
        qtype = "F16" if len(tensor.shape) > 1 else "F32"  # vectors are no output matrix
        size = form.float_bytes * tensor.elements
        if tensor.name in packed:
            *experts, outputs, inputs = tensor.shape
            size, qtype = math.prod(experts) * form.stored_bytes(outputs, inputs), form.stand_in
        held = parts.setdefault(part_of(tensor.name), {})
        held[qtype] = held.get(qtype, 0) + size
    sizes = LevelBytes(level.name, parts)
    matrices = sum(tensor.elements for tensor in model.tensors if is_quantizable(tensor))
    return LevelSize(
        level=level,
        by_part=sizes,
        elements=sum(tensor.elements for tensor in model.tensors),
        file_bytes=sizes.total + model.header_bytes,
        on_label_share=sum(tensor.elements for tensor in packed.values()) / matrices if matrices else 1.0,
        fallbacks=0,
    )


def checkpoint_levels(model: Model, engine: str = "") -> tuple[Level, ...]:
    """The checkpoint levels to look at when none is named: what each format offers that ``engine`` serves (empty: those
    of GPU servers), and 16 bits where the source is a checkpoint itself.
    """
    offered = [parse_level(name) for name in offered_names({tensor.shape[-1] for tensor in _layer_matrices(model)})]
    whole = () if model.raw_metadata else (parse_level("F16"),)
    own = [
        level for level in offered if (engine in level.engines if engine else not {*level.engines} <= {*MLX_ENGINES})
    ]
    return (*whole, *own)


def _layer_matrices(model: Model) -> list[TensorInfo]:
    """What checkpoint levels quantize."""
    return [tensor for tensor in model.tensors if tensor.name.startswith("blk.") and is_quantizable(tensor)]


def _with_feedback(model: Model, level: FeedbackLevel) -> LevelDraft:
    from bitladder.plan.recipe import evenly  # it needs arrays, and few plans need it

    if level.recipe is not None:
        qtypes = assign(level.recipe, model.tensors, model.dims, has_importance=True)
    else:
        qtypes = evenly(model, level.bpw or 0.0)
    base = level.recipe or nearest_level(qtypes, model.tensors)
    return draft_level(model, base, label=level.name, method=PLANNED_FIT, qtypes=qtypes)
