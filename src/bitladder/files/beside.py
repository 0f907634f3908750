"""What a checkpoint or a folder holds beside the decoder: towers for pictures and sounds, heads for further tokens.

Towers become a file of their own, the projector (``mmproj``), which serves every level of the model as it is. Heads for
further tokens (MTP, NextN) go into the model's GGUF as further blocks, where the converter knows them for the family.
Parts are told by the words in tensors' names, since no list of families would be whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitladder.describe.gguf_kinds import PROJECTOR, kind_of
from bitladder.describe.model import Model
from bitladder.errors import BitladderError
from bitladder.files import hub
from bitladder.files.checkpoint import CheckpointTensor
from bitladder.files.gguf import base_name
from bitladder.files.gguf_header import read_file_header
from bitladder.formats.parts import nextn_blocks
from bitladder.units import human_bytes

PICTURES, SOUNDS, FURTHER = "pictures", "sounds", "further tokens"
_SOUNDS = re.compile(r"audio|speech|sound|whisper|conformer|(?:^|[._])a2t")
_PICTURES = re.compile(
    r"vision|visual|image|siglip|(?:^|[._])(?:vit|clip|mm|multi_?modal|aligner|connector|projector|sam_model)(?:[._]|$)"
)
_FURTHER = re.compile(r"(?:^|\.)(?:mtp|nextn)(?:[._]|$)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class PartBeside:
    """The tensors of one part."""

    tensors: int = 0
    nbytes: int = 0

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {human_bytes(self.nbytes)}"


def parts_beside(tensors: Iterable[CheckpointTensor], config: Mapping[str, Any]) -> dict[str, PartBeside]:
    """What of a checkpoint is not its decoder, by what it is for: ``PICTURES``, ``SOUNDS``, ``FURTHER``."""
    layers = _layers(config)
    found: dict[str, PartBeside] = {}
    for tensor in tensors:
        what = _part_of(tensor.name, layers)
        if what:
            before = found.get(what, PartBeside())
            found[what] = PartBeside(before.tensors + 1, before.nbytes + tensor.nbytes)
    return found


def part_of(name: str, config: Mapping[str, Any]) -> str:
    """What a tensor of a checkpoint is for; empty for the decoder."""
    return _part_of(name, _layers(config))


def counts_layers(config: Mapping[str, Any]) -> bool:
    """Whether a configuration says how many layers the decoder has, so that further ones are known as such."""
    return _layers(config) is not None


def _layers(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    layers = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    return layers if isinstance(layers, int) else None


def is_beside(name: str) -> bool:
    """Whether a tensor belongs to a tower, by its name."""
    return _part_of(name, None) in (PICTURES, SOUNDS)


def towers(parts: Mapping[str, PartBeside]) -> PartBeside:
    """Pictures and sounds together: what a projector holds."""
    both = [parts[what] for what in (PICTURES, SOUNDS) if what in parts]
    return PartBeside(sum(part.tensors for part in both), sum(part.nbytes for part in both))


def _part_of(name: str, layers: int | None) -> str:
    """What a tensor is for; empty for the decoder. Words within a decoder's layer say nothing of it."""
    layer = _LAYER.search(name)
    before = name[: layer.start()] if layer else name
    if _SOUNDS.search(before):
        return SOUNDS
    if _PICTURES.search(before):
        return PICTURES
    numbered = layer is not None and layers is not None and int(layer[1]) >= layers and "encoder" not in before
    return FURTHER if numbered or _FURTHER.search(name) else ""


def left_out(parts: Mapping[str, PartBeside], model: Model) -> tuple[str, ...]:
    """Sentences about the parts of a checkpoint that its GGUF does not hold."""
    found = []
    seen = [what for what in (PICTURES, SOUNDS) if what in parts]
    if seen:
        found.append(
            f"The model also takes in {' and '.join(seen)} ({towers(parts)}): levels are of its language part, and "
            "`quantize` writes what belongs to these once, as mmproj-*.gguf."
        )
    if FURTHER in parts and not nextn_blocks(tensor.name for tensor in model.tensors):
        found.append(
            f"The head that predicts further tokens (MTP, {parts[FURTHER]}) is left out: the converter has no place "
            "for it in this family. It drafts; answers do not depend on it."
        )
    return tuple(found)


def beside_note(parts: Mapping[str, PartBeside]) -> str:
    """The sentence for a plan of a checkpoint that is not converted yet; "" where there is nothing beside the
    decoder."""
    seen = [what for what in (PICTURES, SOUNDS) if what in parts]
    words = []
    if seen:
        words.append(f"what takes in {' and '.join(seen)} ({towers(parts)}) is counted in memory")
    if FURTHER in parts:
        words.append(f"the head that predicts further tokens (MTP, {parts[FURTHER]}) is not in the files' sizes")
    return f"Beside the decoder: {'; '.join(words)}." if words else ""


def projector_note(path: Path) -> str:
    """The same for a GGUF file with a projector beside it."""
    return (
        f"Beside it lies what takes in pictures or sounds ({path.name}, {human_bytes(path.stat().st_size)}): counted."
    )


def projector_beside(path: Path) -> Path | None:
    """The projector that lies beside a model's GGUF file: the widest of up to 16 bits, F16 rather than BF16.

    Only where the folder leaves no doubt whose it is: all models in it are this one's levels, or the projector bears
    this model's name, and what it gives has the width that the model reads.
    """
    mine = base_name(path).lower()
    names = [one.name for one in path.parent.glob("*.gguf")]
    alone = {base_name(path.with_name(group[0])).lower() for group in hub.group_shards(names).values()} <= {mine}
    found = []
    for name in sorted(names):
        if PROJECTOR in name.lower() and (alone or mine in name.lower()):
            rank = _rank(path.with_name(name), path)
            if rank is not None:
                found.append((rank, path.with_name(name)))
    return max(found, key=lambda one: one[0])[1] if found else None


def _rank(projector: Path, model: Path) -> tuple[bool, int] | None:
    """How good a file is as the model's projector; None where it is none."""
    try:
        header, own = read_file_header(projector), read_file_header(model).metadata
    except BitladderError:
        return None
    infos = [tensor.info for tensor in header.tensors]
    widths = {header.metadata.get(f"clip.{sense}.projection_dim") for sense in ("vision", "audio")} - {None}
    width = own.get(f"{own.get('general.architecture')}.embedding_length")
    if kind_of(header.metadata, infos) != PROJECTOR or (widths and width not in widths):
        return None
    types = {info.qtype for info in infos if len(info.shape) > 1}
    half = types <= {"F32", "F16", "BF16"} and types != {"F32"}
    return half, sum(info.nbytes for info in infos) + ("F16" in types)
