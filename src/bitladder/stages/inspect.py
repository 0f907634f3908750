"""Say what a GGUF file (or a quantized checkpoint folder) really holds, and whether its name tells the truth.

A level's name promises a qtype, but a recipe gives some tensors more bits on purpose, and rows that do not
divide into blocks get another type whatever was asked: a ``Q2_K`` file of a narrow model may hold no Q2_K at
all. What is in the file is compared with the recipe of the level it claims, tensor by tensor.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitladder.describe.model import Model
from bitladder.describe.quantized import quantized
from bitladder.errors import BadFile
from bitladder.files.gguf import part_paths, read_header
from bitladder.formats import gguf
from bitladder.formats.recipes import LEVEL_BY_FILE_TYPE, RECIPES, assign, is_quantizable, without_blocks
from bitladder.formats.tensors import TensorInfo
from bitladder.kernels import first_nonfinite
from bitladder.levels.checkpoints.integers import IntegerFormat
from bitladder.progress import Progress, silent
from bitladder.records.inspection import FolderInspection, Inspection

_FLOATS = ("F64", "F32", "F16", "BF16")
_LIST_SHOWN = 8
_TEXT_SHOWN = 200


def inspect_file(path: Path) -> Inspection:
    """Describe a file from its header.

    Raises:
        BadInput, BadFile, UnknownArchitecture: the file cannot be read, lies, or is of no known family.
    """
    model = read_header(path)
    paths = part_paths(path)
    in_name, in_header = _level_in_name(path), _level_in_header(model)
    claimed = in_name or in_header
    quantizable = [tensor for tensor in model.tensors if is_quantizable(tensor)]
    off_recipe = _off_recipe(model, claimed) if claimed else None
    label = RECIPES[claimed].qtype if claimed else None
    on_label = [tensor for tensor in quantizable if tensor.qtype == label]
    fallbacks = without_blocks(model.tensors, label) if label else []
    truthful = None if off_recipe is None else not off_recipe and in_header in (None, claimed)
    weights = _weights(quantizable)
    share = _weights(on_label) / weights if label and weights else None
    source = quantized(model)
    before = source.before if source else ""
    return Inspection(
        file=str(path),
        name=model.name,
        architecture=model.dims.architecture,
        parts=len(paths),
        file_bytes=sum(part.stat().st_size for part in paths),
        tensor_bytes=model.tensor_bytes,
        header_bytes=model.header_bytes,
        weights=model.elements,
        bpw=model.bpw if model.elements else math.nan,
        type_share=type_share(model.tensors),
        level_in_name=in_name,
        level_in_header=in_header,
        on_label_share=share,
        promoted=None if label is None else len(quantizable) - len(on_label) - len(fallbacks),
        fallbacks=None if label is None else len(fallbacks),
        off_recipe=None if off_recipe is None else tuple(off_recipe),
        truthful=truthful,
        verdict=_verdict(in_name, in_header, off_recipe, share) + (f" It was made from {before}." if before else ""),
        made_from=before or None,
        quantized=source.sentence("This file") if source else None,
        tensors=model.tensors,
        metadata={key: _shortened(value) for key, value in model.metadata.items()},
    )


def inspect_folder(folder: Path, progress: Progress = silent) -> FolderInspection:
    """Describe a quantized checkpoint folder; every quantized layer is decoded, one at a time.

    Raises:
        BadInput, BadFile: it is no checkpoint folder, in no format that is read, or its files are damaged.
    """
    from bitladder.files.checkpoint import read_checkpoint
    from bitladder.files.checkpoint_check import CheckpointReader, format_of_folder
    from bitladder.files.checkpoint_folder import checkpoint_bytes, notes_of

    form = format_of_folder(folder)
    checkpoint = read_checkpoint(folder)
    reader = CheckpointReader(folder, form)
    linears, faults, packed = reader.linears(), [], 0
    for number, name in enumerate(linears):
        progress(f"decoding {name}", number, len(linears))
        try:
            found = reader.weights(f"{name}.weight")
        except BadFile as error:
            faults.append(error.found)
            continue
        packed += found.size
        if (bad := first_nonfinite(found)) is not None:
            faults.append(f"{name} decodes to {found[bad]} in row {bad[0]}, column {bad[1]}.")
    forms = {name: own for name in linears if (own := reader.format_of(name)) is not None}
    of_linears = {f"{name}.{suffix}" for name, own in forms.items() for suffix in own.suffixes}
    rest = [tensor for tensor in checkpoint.tensors if tensor.name not in of_linears]
    faults += [
        f"{tensor.name} belongs to a quantized layer whose other arrays are missing."
        for tensor in rest
        if (own := form.of(tensor.name.rpartition(".")[0])) and tensor.name.rpartition(".")[2] in own.marks
    ]
    faults += [
        f"{tensor.name} holds integers ({tensor.dtype}) that the configuration does not explain."
        for tensor in rest
        if tensor.name.endswith(".weight") and tensor.dtype not in _FLOATS
    ]
    if not linears:
        faults.append("No tensor is quantized as the configuration says.")
    floats = [tensor for tensor in rest if tensor.dtype in _FLOATS]
    weights = packed + sum(math.prod(tensor.shape) for tensor in floats)
    integers = form if isinstance(form, IntegerFormat) else None
    schemes = dict(Counter(own.scheme for own in forms.values()).most_common())
    return FolderInspection(
        folder=str(folder),
        architecture=str(checkpoint.config.get("model_type", "")),
        format=form.layout,
        bits=integers.bits if integers else None,
        group_size=None if len(schemes) > 1 else next((own.group_size for own in forms.values()), 0) or -1,
        symmetric=integers.sym if integers else None,
        file_bytes=checkpoint_bytes(folder),
        weights=weights,
        linears=len(linears),
        quantized_share=packed / weights if weights else 0.0,
        bpw=8 * checkpoint.nbytes / weights if weights else math.nan,
        stays_float=tuple(sorted(tensor.name for tensor in floats if len(tensor.shape) > 1)),
        faults=tuple(faults),
        truthful=not faults,
        verdict=faults[0] if faults else f"It is what its configuration says: {len(linears)} layers as {form.layout}.",
        schemes=schemes,
        notes=tuple(dict.fromkeys((*form.notes(), *notes_of(folder)))),
    )


def _weights(tensors: Sequence[TensorInfo]) -> int:
    return sum(tensor.elements for tensor in tensors)


def type_share(tensors: Sequence[TensorInfo]) -> dict[str, float]:
    """Per qtype its share of all weights, largest first."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.qtype] = counts.get(tensor.qtype, 0) + tensor.elements
    total = max(1, sum(counts.values()))
    return {qtype: counts[qtype] / total for qtype in sorted(counts, key=lambda qtype: -counts[qtype])}


def _level_in_name(path: Path) -> str | None:
    """The level that a file's name ends with: ``Model-Q4_K_M.gguf``, ``model.q8_0-00001-of-00002.gguf``."""
    split = gguf.parse_split_name(path.name)
    stem = (split.prefix if split else path.name.removesuffix(".gguf")).upper()
    matches = [level for level in RECIPES if re.search(rf"(^|[-._]){re.escape(level)}$", stem)]
    return max(matches, key=len, default=None)


def _level_in_header(model: Model) -> str | None:
    number = model.metadata.get(gguf.KEY_FILE_TYPE)
    return LEVEL_BY_FILE_TYPE.get(number) if isinstance(number, int) else None


def _off_recipe(model: Model, level: str) -> list[str]:
    """Tensors with a type that the recipe does not give, whether or not an importance matrix was used."""
    plain = assign(level, model.tensors, model.dims)
    weighted = assign(level, model.tensors, model.dims, has_importance=True)
    misses = [
        [tensor.name for tensor in model.tensors if tensor.qtype != wanted[tensor.name]] for wanted in (plain, weighted)
    ]
    return min(misses, key=len)


def _verdict(in_name: str | None, in_header: str | None, off_recipe: list[str] | None, share: float | None) -> str:
    claimed = in_name or in_header
    if claimed is None or off_recipe is None:
        return "Neither name nor header claims a level."
    if in_name and in_header and in_name != in_header:
        return f"The name says {in_name}, the header says {in_header}."
    if off_recipe:
        first = ", ".join(off_recipe[:3]) + (", ..." if len(off_recipe) > 3 else "")
        return f"Not llama.cpp's recipe for {claimed}: {len(off_recipe)} tensors have another type ({first})."
    if share is not None and share < 0.5:
        label = RECIPES[claimed].qtype
        return f"It follows the recipe for {claimed}, yet only {share:.0%} of its quantized weights are {label}."
    return f"It is what it says: {claimed}."


def _shortened(value: Any) -> Any:
    if isinstance(value, list) and len(value) > _LIST_SHOWN:
        return f"{len(value)} values"
    if isinstance(value, str) and len(value) > _TEXT_SHOWN:
        return f"{value[:_TEXT_SHOWN]}... ({len(value)} characters)"
    return value
