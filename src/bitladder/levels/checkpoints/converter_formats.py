"""Which quantized checkpoints llama.cpp's converter decodes right, by its source (conversion/base.py of build 11549,
``dequant_model`` and ``prepare_tensors``).

It goes by the configuration: one method, one number of bits and one kind of scale for all layers. What it would read
wrongly (three bits of compressed-tensors, whose codes straddle words) or not at all is decoded here instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from bitladder.levels.checkpoints.stored import PackedMatrix, Tensors, named_block

Matrices = Mapping[str, PackedMatrix]
_NVFP4_BLOCK = 64


class ReadAs(StrEnum):
    """How the converter takes a checkpoint."""

    IT_IS = "it is"
    """It decodes or keeps the weights as they are meant."""
    SOME = "some"
    """It does for some families, and ends with an error for the rest."""
    FLOATS = "floats"
    """It has to be given floats."""


def converter_reads(method: str, configuration: Mapping[str, Any], matrices: Matrices, tensors: Tensors) -> ReadAs:
    """How the converter takes a checkpoint with these quantized matrices.

    Args:
        method: ``quant_method`` in lower case.
        configuration: ``quantization_config``.
        matrices: As ``levels/checkpoints/stored.py`` tells them, all of the checkpoint.
        tensors: All tensors of the checkpoint.
    """
    if any(matrix.kind == "NVFP4" and matrix.shape[1] % _NVFP4_BLOCK for matrix in matrices.values()):
        return ReadAs.FLOATS
    if _kinds(matrices) == {"MXFP4"} and method != "mxfp4":
        return ReadAs.SOME
    reads = _READS.get(method)
    return ReadAs.IT_IS if reads is not None and reads(configuration, matrices, tensors) else ReadAs.FLOATS


def _kinds(matrices: Matrices) -> set[str]:
    return {matrix.kind for matrix in matrices.values()}


def _bits(matrices: Matrices) -> set[int]:
    return {matrix.bits for matrix in matrices.values()}


def _gptq(configuration: Mapping[str, Any], matrices: Matrices, _tensors: Tensors) -> bool:
    ordered = all("g_idx" in matrix.arrays for matrix in matrices.values())
    return ordered and _bits(matrices) == {configuration.get("bits")} <= {2, 4, 8}


def _fp8(configuration: Mapping[str, Any], matrices: Matrices, tensors: Tensors) -> bool:
    """Scales of the size of ``weight_block_size``, or one for a matrix where it is absent."""
    block = named_block({"weight_block_size": configuration.get("weight_block_size")})
    if _kinds(matrices) != {"FP8"} or (block is None) != (configuration.get("weight_block_size") is None):
        return False
    for matrix in matrices.values():
        held = tensors[matrix.arrays["scale"]].shape
        whole = block or matrix.shape
        blocks = tuple(-(-size // step) for size, step in zip(matrix.shape, whole, strict=True))
        if not matrix.arrays["scale"].endswith("_scale_inv") or held not in (
            (blocks,) if block else ((), (1,), blocks)
        ):
            return False
    return True


def _compressed_tensors(configuration: Mapping[str, Any], matrices: Matrices, tensors: Tensors) -> bool:
    kinds = _kinds(matrices)
    if "NVFP4" in kinds:
        return _modelopt(configuration, matrices, tensors)
    weights = _only_group(configuration)
    if len(kinds) != 1 or any({"zero", "weight_g_idx"} & matrix.arrays.keys() for matrix in matrices.values()):
        return False
    if kinds == {"packed"}:
        grouped = weights.get("strategy") == "group" and type(weights.get("group_size")) is int
        return grouped and _bits(matrices) == {weights.get("num_bits")} <= {2, 4, 8}
    by_output = weights.get("strategy") in ("tensor", "channel") and not weights.get("group_size")
    return by_output and all(_by_output(matrix, tensors) for matrix in matrices.values())


def _modelopt(_configuration: Mapping[str, Any], matrices: Matrices, tensors: Tensors) -> bool:
    return all(
        matrix.kind == "NVFP4" or (matrix.kind == "FP8" and _by_output(matrix, tensors)) for matrix in matrices.values()
    )


def _mxfp4(_configuration: Mapping[str, Any], matrices: Matrices, _tensors: Tensors) -> bool:
    return all("blocks" in matrix.arrays for matrix in matrices.values())


def _only_group(configuration: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the one group of layers has its weights; empty where there are several."""
    groups = configuration.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return {}
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return weights if isinstance(weights, Mapping) else {}


def _by_output(matrix: PackedMatrix, tensors: Tensors) -> bool:
    """One scale for the matrix or for each output, under the name that is looked for."""
    scale, outputs = matrix.arrays["scale"], matrix.shape[0]
    return scale.endswith("_scale") and tensors[scale].shape in ((), (1,), (1, 1), (outputs,), (outputs, 1))


_READS: dict[str, Callable[[Mapping[str, Any], Matrices, Tensors], bool]] = {
    "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed_tensors, "modelopt": _modelopt, "mxfp4": _mxfp4,
}  # fmt: skip
