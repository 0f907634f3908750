"""Quantized matrices of anybody's checkpoint, told by the arrays that they are stored as.

Configurations name layers by patterns and leave out what writers found obvious, so they are believed only where arrays
cannot tell: which method it is, how zero points are shifted, how large a block is. Bits and groups follow from shapes,
for every matrix by itself, so that layers may differ. A checkpoint of N outputs and K inputs may hold:

    GPTQ               P.qweight, P.qzeros, P.scales[, P.g_idx]                  checkpoints/gptq.py
    AWQ                P.qweight, P.qzeros, P.scales                             checkpoints/awq.py
    packed integers    W_packed i32, W_scale, W_shape[, W_zero_point, W_g_idx]   checkpoints/compressed_tensors.py
    plain integers     W i8 [N, K], W_scale[, W_zero_point]
    FP8                W f8 [N, K], W_scale or W_scale_inv
    MXFP4              W_packed u8 [N, K/2], W_scale u8 [N, K/32] (E8M0)
    NVFP4              W_packed u8 [N, K/2], W_scale f8 [N, K/16], W_global_scale (divides), or
                       W u8, W_scale f8, W_scale_2 (multiplies)
    MXFP4 in stacks    S_blocks u8 [E, N, K/32, 16], S_scales u8 [E, N, K/32] (gpt-oss), for S [E, K, N]
    MLX                W u32, P.scales[, P.biases]                                  checkpoints/mlx.py

P is a layer's path, W is ``P.weight``, and S a stack of the matrices of E experts. Scales of integers and FP8 are one
number, one for each output, one for each group of inputs, or one for each block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from bitladder.levels.checkpoints.awq import Awq
from bitladder.levels.checkpoints.compressed_tensors import PackQuantized
from bitladder.levels.checkpoints.gptq import Gptq
from bitladder.levels.checkpoints.integers import words
from bitladder.levels.checkpoints.mlx import format_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from bitladder.kernels.grid import F32
    from bitladder.levels.checkpoints.base import Stored

FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
"""Types of safetensors whose values are weights only together with scales."""
BESIDE = re.compile(
    r"\.(?:(?:input|output|activation|q|k|v)_(?:scale|zero_point|global_scale)|.*activation_scale|.*input_scale)"
)
"""Ends of the names of tensors about activations and caches: weights do not depend on them."""
_OF_WEIGHTS = (
    "_scale", "_scale_inv", "_scale_2", "_global_scale", "_zero_point", "_shape", "_g_idx", "_packed", "_blocks",
    "_scales",
)  # fmt: skip
_GROUPED = ("qweight", "qzeros", "scales", "g_idx")
_BESIDE_PATHS = (*_GROUPED, "biases")
"""Last words of names that go on from a layer's path."""
_MAX_BLOCK = 1 << 16


class Array(Protocol):
    """A tensor as a safetensors header names it."""

    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


Tensors = Mapping[str, Array]
Read = Callable[[str], "npt.NDArray[Any]"]
"""A tensor's values by name: FP8 and E8M0 as their codes, u8."""


@dataclass(frozen=True)
class PackedMatrix:
    """A quantized matrix."""

    name: str
    """Of the float matrix that it stands for."""
    kind: str
    """What it is stored as: ``GPTQ``, ``AWQ``, ``packed``, ``int8``, ``FP8``, ``MXFP4``, ``NVFP4``, ``MLX``."""
    bits: int
    """Of each code."""
    shape: tuple[int, ...]
    """Outputs and inputs; of a stack experts, inputs and outputs."""
    arrays: Mapping[str, str]
    """Its tensors by role."""
    decode: Callable[[Stored], F32] = field(compare=False)
    """Weights f32 of this shape of its tensors' values; raises ValueError where they contradict one another."""


def packed_matrices(configuration: Mapping[str, Any], tensors: Tensors, read: Read) -> list[PackedMatrix]:
    """Every matrix that is stored quantized in a way that is known here.

    Args:
        configuration: ``quantization_config``; empty where there is none.
        tensors: All tensors of the checkpoint.
        read: For the few that say a shape.

    Raises:
        ValueError: arrays contradict one another or the configuration; the text names the matrix.
    """
    method = _method(configuration)
    found: list[PackedMatrix] = []
    for name in sorted(tensors):
        for make in _MAKERS:
            try:
                matrix = make(name, method, configuration, tensors, read)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{name}: {error}") from error
            if matrix is not None:
                found.append(matrix)
    return found


def unscaled(tensors: Tensors) -> str | None:
    """The first FP8 matrix without a scale of any name; None where all have one.

    Such a file cannot be read: scales were lost on its way, or it was cast, and nobody says which.
    """
    modules = {name.rpartition(".")[0] for name in tensors if _is_scale(name) and not BESIDE.search(name)}
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype in FP8 and not _is_scale(name) and len(tensor.shape) > 1:
            own = any(name + end in tensors for end in _OF_WEIGHTS)
            if not own and name.rpartition(".")[0] not in modules:
                return name
    return None


def _is_scale(name: str) -> bool:
    return "scale" in name.rpartition(".")[2]


def belongs_to(name: str, matrices: Mapping[str, PackedMatrix]) -> bool:
    """Whether a tensor is an array of one of the matrices, by their names, or is about activations or caches."""
    if BESIDE.search(name):
        return True
    prefix, _, last = name.rpartition(".")
    if last in _BESIDE_PATHS and f"{prefix}.weight" in matrices:
        return True
    return name in matrices or any(name.endswith(end) and name[: -len(end)] in matrices for end in _OF_WEIGHTS)


def _method(configuration: Mapping[str, Any]) -> str:
    """``quant_method`` in lower case; AutoRound's by the layout that it writes."""
    method = str(configuration.get("quant_method", "")).lower()
    if method.endswith("auto-round"):
        layout = str(configuration.get("packing_format", "")).lower()
        return next((own for own in ("gptq", "awq") if layout.endswith(own)), method)
    return method


def _gptq(
    name: str, method: str, configuration: Mapping[str, Any], tensors: Tensors, _read: Read
) -> PackedMatrix | None:
    prefix, _, last = name.rpartition(".")
    if last != "qweight" or method != "gptq":
        return None
    arrays = _present(prefix, _GROUPED, tensors)
    rows, outputs = _matrix(tensors[name])
    groups, columns = _matrix(tensors[arrays["scales"]])
    if columns != outputs:
        raise ValueError(f"scales for {columns} outputs of {outputs}")
    _, across = _matrix(tensors[arrays["qzeros"]])
    bits = next((bits for bits in (2, 3, 4, 8) if words(outputs, bits) == across and rows * 32 % bits == 0), None)
    if bits is None:
        raise ValueError(f"zero points in {across} words for {outputs} outputs")
    layout = configuration.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise ValueError(f"a layout called {str(layout)[:40]!r}, which is not read")
    inputs = rows * 32 // bits
    form = Gptq(bits, _group(inputs, groups), sym=False, version=1 if layout == "gptq" else 2)
    return PackedMatrix(f"{prefix}.weight", "GPTQ", bits, (outputs, inputs), arrays, form.decode)


def _awq(
    name: str, method: str, configuration: Mapping[str, Any], tensors: Tensors, _read: Read
) -> PackedMatrix | None:
    prefix, _, last = name.rpartition(".")
    if last != "qweight" or method != "awq":
        return None
    version = str(configuration.get("version", "gemm")).lower()
    if version != "gemm":
        raise ValueError(f"AWQ in the layout {version[:40]!r}; only GEMM is read")
    arrays = _present(prefix, _GROUPED[:3], tensors)
    inputs, across = _matrix(tensors[name])
    groups, outputs = _matrix(tensors[arrays["scales"]])
    if across * 8 != outputs:
        raise ValueError(f"codes of 4 bits in {across} words for {outputs} outputs")
    form = Awq(4, _group(inputs, groups), sym=False)
    return PackedMatrix(f"{prefix}.weight", "AWQ", 4, (outputs, inputs), arrays, form.decode)


def _packed_integers(
    name: str, _method: str, configuration: Mapping[str, Any], tensors: Tensors, read: Read
) -> PackedMatrix | None:
    weight = name.removesuffix("_packed")
    if weight == name or tensors[name].dtype != "I32":
        return None
    arrays = {"weight_packed": name, "weight_scale": f"{weight}_scale", "weight_shape": f"{weight}_shape"}
    arrays |= {
        role: own
        for role, own in (("weight_zero_point", f"{weight}_zero_point"), ("weight_g_idx", f"{weight}_g_idx"))
        if own in tensors
    }
    if tensors[arrays["weight_shape"]].shape != (2,):
        raise ValueError(f"a shape of {tensors[arrays['weight_shape']].shape} numbers")
    outputs, inputs = (int(size) for size in read(arrays["weight_shape"]))
    rows, across = _matrix(tensors[name])
    named = {bits for bits in _named_bits(configuration) if inputs > 0 and words(inputs, bits) == across}
    if len(named) != 1 or rows != outputs:
        raise ValueError(f"{rows} rows of {across} words for {(outputs, inputs)}, which no number of bits of its fills")
    (bits,) = named
    _, groups = _matrix(tensors[arrays["weight_scale"]])
    form = PackQuantized(bits, _group(inputs, groups), sym="weight_zero_point" not in arrays)
    return PackedMatrix(weight, "packed", bits, (outputs, inputs), arrays, form.decode)


def _plain_integers(
    name: str, method: str, _configuration: Mapping[str, Any], tensors: Tensors, _read: Read
) -> PackedMatrix | None:
    scale, zero = f"{name}_scale", f"{name}_zero_point"
    if method != "compressed-tensors" or tensors[name].dtype != "I8" or scale not in tensors or _is_scale(name):
        return None
    shape = _matrix(tensors[name])
    arrays = {"weight": name, "scale": scale} | ({"zero": zero} if zero in tensors else {})
    block = _block(shape, tensors[scale].shape, None)

    def decode(stored: Stored) -> F32:
        import numpy as np

        values = stored["weight"].astype(np.float32)
        if "zero" in stored:
            values = values - _over(stored["zero"].astype(np.float32), shape, block)
        return values * _over(stored["scale"].astype(np.float32), shape, block)

    return PackedMatrix(name, "int8", 8, shape, arrays, decode)


def _eight_bit_floats(
    name: str, _method: str, configuration: Mapping[str, Any], tensors: Tensors, _read: Read
) -> PackedMatrix | None:
    tensor = tensors[name]
    if tensor.dtype not in FP8 or _is_scale(name) or len(tensor.shape) != 2:
        return None
    scale = next((own for own in (f"{name}_scale_inv", f"{name}_scale") if own in tensors), None)
    if scale is None:
        return None
    shape, held = _matrix(tensor), tensors[scale]
    block = _block(shape, held.shape, named_block(configuration))

    def decode(stored: Stored) -> F32:
        from bitladder.kernels import minifloats

        values = minifloats.e4m3(stored["weight"]) if tensor.dtype == "F8_E4M3" else minifloats.e5m2(stored["weight"])
        return values * _over(_scales(stored["scale"], held.dtype), shape, block)

    return PackedMatrix(name, "FP8", 8, shape, {"weight": name, "scale": scale}, decode)


def _four_bit_floats(
    name: str, _method: str, _configuration: Mapping[str, Any], tensors: Tensors, _read: Read
) -> PackedMatrix | None:
    weight = name.removesuffix("_packed")
    scale = f"{weight}_scale"
    if tensors[name].dtype != "U8" or scale not in tensors or _is_scale(name):
        return None
    factor = next((own for own in (f"{weight}_global_scale", f"{weight}_scale_2") if own in tensors), None)
    if weight == name and factor is None:
        return None
    outputs, half = _matrix(tensors[name])
    shape, held = (outputs, 2 * half), tensors[scale]
    nvidia = held.dtype == "F8_E4M3"
    if not nvidia and held.dtype not in ("U8", "F8_E8M0"):
        raise ValueError(f"scales of type {held.dtype} beside codes of 4 bits")
    block = (1, 16 if nvidia else 32)
    if held.shape != (outputs, -(-shape[1] // block[1])):
        raise ValueError(f"scales of shape {held.shape} for {shape} in groups of {block[1]}")
    if factor is not None and math.prod(tensors[factor].shape) != 1:
        raise ValueError(f"{factor} has the shape {tensors[factor].shape}, one number is expected")
    arrays = {"weight": name, "scale": scale} | ({"factor": factor} if factor is not None else {})
    divides = factor is not None and factor.endswith("_global_scale")

    def decode(stored: Stored) -> F32:
        import numpy as np

        from bitladder.kernels import minifloats

        scales = _scales(stored["scale"], "F8_E4M3" if nvidia else "F8_E8M0")
        if "factor" in stored:
            one = stored["factor"].astype(np.float32).reshape(())
            scales = scales / one if divides else scales * one
        return minifloats.e2m1_pairs(stored["weight"]) * minifloats.spread(scales, shape, block)

    return PackedMatrix(weight, "NVFP4" if nvidia else "MXFP4", 4, shape, arrays, decode)


def _mlx(
    name: str, _method: str, configuration: Mapping[str, Any], tensors: Tensors, _read: Read
) -> PackedMatrix | None:
    prefix, _, last = name.rpartition(".")
    scales, biases = f"{prefix}.scales", f"{prefix}.biases"
    if last != "weight" or tensors[name].dtype != "U32" or scales not in tensors:
        return None
    own = configuration.get(prefix)
    scheme = {**configuration, **own} if isinstance(own, Mapping) else configuration
    form = format_of(scheme, has_biases=biases in tensors)
    if form is None:
        raise ValueError(f"groups of {str(scheme.get('group_size'))[:20]} in the mode {str(scheme.get('mode'))[:20]!r}")
    arrays = {"weight": name, "scales": scales} | ({"biases": biases} if biases in tensors else {})
    outputs, across = _matrix(tensors[name])
    _, groups = _matrix(tensors[scales])
    inputs = groups * form.group_size
    if 32 * across % inputs:
        raise ValueError(f"{across} words for {groups} groups of {form.group_size}")
    return PackedMatrix(name, "MLX", 32 * across // inputs, (outputs, inputs), arrays, form.decode)


def _stacked_blocks(
    name: str, method: str, _configuration: Mapping[str, Any], tensors: Tensors, _read: Read
) -> PackedMatrix | None:
    stack, held = name.removesuffix("_blocks"), tensors[name]
    if method != "mxfp4" or stack == name or held.dtype != "U8" or len(held.shape) != 4:
        return None
    scale = f"{stack}_scales"
    if held.shape[-1] != 16 or 0 in held.shape or tensors[scale].shape != held.shape[:-1]:
        raise ValueError(f"scales of shape {tensors[scale].shape} for blocks of shape {held.shape}")
    experts, outputs, blocks, _ = held.shape

    def decode(stored: Stored) -> F32:
        from bitladder.kernels import minifloats

        weights = minifloats.e2m1_pairs(stored["blocks"]) * _scales(stored["scales"], "F8_E8M0")[..., None]
        return weights.reshape(experts, outputs, 32 * blocks).swapaxes(1, 2)

    return PackedMatrix(stack, "MXFP4", 4, (experts, 32 * blocks, outputs), {"blocks": name, "scales": scale}, decode)


_MAKERS = (
    _gptq, _awq, _packed_integers, _plain_integers, _eight_bit_floats, _four_bit_floats, _mlx, _stacked_blocks,
)  # fmt: skip


def _present(prefix: str, suffixes: tuple[str, ...], tensors: Tensors) -> dict[str, str]:
    """Names of a layer's arrays by suffix; the first three must be there."""
    found = {suffix: f"{prefix}.{suffix}" for suffix in suffixes if f"{prefix}.{suffix}" in tensors}
    missing = next((suffix for suffix in suffixes[:3] if suffix not in found), None)
    if missing is not None:
        raise ValueError(f"{prefix}.{missing} is missing")
    return found


def _matrix(tensor: Array) -> tuple[int, int]:
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise ValueError(f"an array of shape {tensor.shape} where a matrix is expected")
    return tensor.shape[0], tensor.shape[1]


def _group(inputs: int, groups: int) -> int:
    if inputs % groups:
        raise ValueError(f"{groups} groups do not divide rows of {inputs} weights")
    return inputs // groups


def _named_bits(configuration: Mapping[str, Any]) -> Iterator[int]:
    """Bits of all groups of a compressed-tensors configuration."""
    groups = configuration.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
        if type(bits) is int and 2 <= bits <= 8:
            yield bits


def named_block(configuration: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block of weights with one scale, where a configuration says any."""
    groups = configuration.get("config_groups")
    said = [configuration.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        said.append(weights.get("block_structure") if isinstance(weights, Mapping) else None)
    for block in said:
        if isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n <= _MAX_BLOCK for n in block):
            return block[0], block[1]
    return None


def _block(shape: tuple[int, int], held: tuple[int, ...], named: tuple[int, int] | None) -> tuple[int, int]:
    """The block of weights that each scale is for; ``held``: the shape of the scales."""
    rows, columns = shape
    if math.prod(held) == 1:
        return shape
    if held in ((rows,), (rows, 1)):
        return 1, columns
    if len(held) == 2 and named is not None and held == (-(-rows // named[0]), -(-columns // named[1])):
        return named
    if len(held) == 2 and 0 not in held and rows % held[0] == 0 and columns % held[1] == 0:
        block = rows // held[0], columns // held[1]
        # Blocks at the edge may be part empty, so other sizes might have as many; no other power of two has.
        if all(step & (step - 1) == 0 for step in block):
            return block
    raise ValueError(f"scales of shape {held} for a matrix of {shape}")


def _over(scales: F32, shape: tuple[int, int], block: tuple[int, int]) -> F32:
    """Scales in any of their shapes as what broadcasts to the matrix."""
    from bitladder.kernels.minifloats import spread

    across = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    return spread(scales.reshape(across), shape, block)


def _scales(stored: npt.NDArray[Any], dtype: str) -> F32:
    """Scales of any type as f32; those of MX formats are exponents, whatever safetensors calls their bytes."""
    import numpy as np

    from bitladder.kernels import minifloats

    if dtype in ("F8_E8M0", "U8"):
        return minifloats.e8m0(stored)
    return minifloats.e4m3(stored) if dtype == "F8_E4M3" else np.asarray(stored, np.float32)
