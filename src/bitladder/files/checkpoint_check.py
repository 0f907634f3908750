"""A written checkpoint opened again: every tensor there, every quantized layer decoding to what was
computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.errors import BadFile, OutputError
from bitladder.files.checkpoint import list_shards
from bitladder.formats.checkpoint import LAYOUTS, CheckpointLevel
from bitladder.kernels.encode import decode, digest


def verify_folder(folder: Path, level: CheckpointLevel, expected: Mapping[str, str]) -> None:
    """Compare a folder with the digests of the decoded linear layers, by name.

    Raises:
        OutputError: a layer is missing, or decodes to other weights.
    """
    seen = set()
    for name, weights in decoded_linears(folder, level):
        seen.add(name)
        if expected.get(name) != digest(weights):
            raise OutputError(
                f"{folder}: {name} does not decode to what was computed.",
                means="The disk or the memory of this machine made an error, or the file was changed meanwhile.",
                do="Delete the folder and run again; if it happens twice, check the disk.",
            )
    if missing := set(expected) - seen:
        raise OutputError(
            f"{folder} lacks {len(missing)} quantized layers, {min(missing)} first.",
            means="Files were removed while it was written.",
            do="Delete the folder and run again.",
        )


def decoded_linears(folder: Path, level: CheckpointLevel) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Every quantized linear layer by name with its weights f32[outputs, inputs], one at a time.

    Raises:
        BadFile: an array of a layer is missing or has another shape than the others need.
    """
    from safetensors import safe_open

    layout = LAYOUTS[level.layout]
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(shard, "pt")) for shard in list_shards(folder)]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        for key in sorted(where):
            prefix, _, suffix = key.rpartition(".")
            if suffix != layout.codes or f"{prefix}.{layout.scales}" not in where:
                continue
            arrays = {
                own: _array(where[f"{prefix}.{own}"].get_tensor(f"{prefix}.{own}"))
                for own in layout.suffixes
                if f"{prefix}.{own}" in where
            }
            try:
                yield prefix, decode(level, arrays, _shape(level, arrays))
            except (ValueError, KeyError) as error:
                raise BadFile(f"{folder}: {prefix} contradicts itself: {error}", do="Write the level again.") from error


def _array(tensor: Any) -> npt.NDArray[Any]:
    import torch

    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


def _shape(level: CheckpointLevel, arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[int, int]:
    """Outputs and inputs of a stored linear layer."""
    layout = LAYOUTS[level.layout]
    codes = arrays[layout.codes].shape
    if layout.name == "int-quantized":
        return codes[0], codes[1]
    if layout.name == "pack-quantized":
        rows, columns = arrays[layout.shape].tolist()
        return int(rows), int(columns)
    if layout.name == "awq":
        return codes[1] * 32 // level.bits, codes[0]
    return codes[1], codes[0] * 32 // level.bits
