"""Checkpoints of tiny models in the formats that quantizers publish, and what an independent reader makes of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, np.ndarray]
"""Arrays by suffix of the layer's name, and the weights that they mean."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def stream(rows: np.ndarray, bits: int) -> np.ndarray:
    """Codes of each row as 32-bit words, low bits first, bit by bit."""
    flat = (rows[..., None] >> np.arange(bits) & 1).reshape(len(rows), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    words = (flat.reshape(len(rows), -1, 32) << np.arange(32, dtype=np.int64)).sum(-1)
    return words.astype(np.uint32).view(np.int32)


def _grid(weights: np.ndarray, bits: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes, zeros, float16 scales of a plain rounding, and what they mean."""
    rows, columns = weights.shape
    grouped = weights.reshape(rows, -1, size)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16)
    zeros = np.clip(np.round(-low / scales.astype(np.float32)), 1, 2**bits - 1).astype(np.int64)
    steps = np.round(grouped / scales[..., None].astype(np.float32))
    codes = np.clip(steps + zeros[..., None], 0, 2**bits - 1).astype(np.int64)
    means = ((codes - zeros[..., None]).astype(np.float32) * scales[..., None].astype(np.float32)).reshape(
        rows, columns
    )
    return codes.reshape(rows, columns), zeros, scales, means


def gptq(weights: np.ndarray, bits: int = 4, size: int = 32, *, indexed: bool = True, version: int = 1) -> Made:
    codes, zeros, scales, means = _grid(weights, bits, size)
    kept = zeros - (version == 1)
    arrays = {
        "qweight": stream(codes, bits).T, "qzeros": stream(kept.T, bits), "scales": scales.T,
    }  # fmt: skip
    if indexed:
        arrays["g_idx"] = (np.arange(weights.shape[1]) // size).astype(np.int32)
    return _torch(arrays), means


def awq(weights: np.ndarray, size: int = 32) -> Made:
    codes, zeros, scales, means = _grid(weights, 4, size)

    def packed(matrix: np.ndarray) -> np.ndarray:
        return stream(matrix.reshape(len(matrix), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(matrix.shape), 4)

    return _torch({"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T}), means


def packed(weights: np.ndarray, bits: int, size: int, *, symmetric: bool = True) -> Made:
    """compressed-tensors, scales in bfloat16."""
    codes, zeros, scales, _ = _grid(weights, bits, size)
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    kept = torch.from_numpy(scales).to(torch.bfloat16)
    group = np.arange(weights.shape[1]) // size
    means = (codes - zeros[:, group]).astype(np.float32) * kept.float().numpy()[:, group]
    arrays = {"weight_packed": stream(codes, bits), "weight_shape": np.array(weights.shape)}
    if not symmetric:
        arrays["weight_zero_point"] = stream(zeros.T, bits).T
    return {**_torch(arrays), "weight_scale": kept}, means


def int8(weights: np.ndarray) -> Made:
    scale = np.abs(weights).max(-1, keepdims=True) / 127
    codes = np.round(weights / scale).astype(np.int8)
    return _torch({"weight": codes, "weight_scale": scale.astype(np.float32)}), codes * scale.astype(np.float32)


def fp8(weights: np.ndarray, block: tuple[int, int], suffix: str = "weight_scale_inv") -> Made:
    rows, columns = weights.shape
    across = -(-rows // block[0]), -(-columns // block[1])
    at = np.ix_(np.arange(rows) // block[0], np.arange(columns) // block[1])
    largest = np.zeros(across, np.float32)
    for row, column in np.ndindex(across):
        part = weights[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
        largest[row, column] = np.abs(part).max() / 448
    codes = torch.from_numpy(weights / largest[at]).to(torch.float8_e4m3fn)
    scale = torch.from_numpy(largest.reshape(()) if largest.size == 1 else largest)
    return {"weight": codes, suffix: scale}, codes.float().numpy() * largest[at]


def nvfp4(weights: np.ndarray, *, divided: bool) -> Made:
    """Codes of 4 bits, FP8 scales of 16 weights, one factor: divided by (compressed-tensors) or multiplied with."""
    factor = np.float32(np.abs(weights).max() / (6 * 448))
    grouped = weights.reshape(len(weights), -1, 16)
    scales = torch.from_numpy(np.abs(grouped).max(-1) / 6 / factor).to(torch.float8_e4m3fn)
    one = np.float32(1) / factor
    steps = scales.float().numpy() / one if divided else scales.float().numpy() * factor
    codes = np.abs((grouped / np.maximum(steps, 1e-30)[..., None])[..., None] - E2M1).argmin(-1)
    means = (E2M1[codes] * steps[..., None]).reshape(weights.shape)
    flat = codes.reshape(weights.shape)
    bytes_ = (flat[:, ::2] | flat[:, 1::2] << 4).astype(np.uint8)
    if divided:
        arrays = {"weight_packed": bytes_, "weight_global_scale": np.array([one])}
    else:
        arrays = {"weight": bytes_, "weight_scale_2": np.array(factor)}
    return {**_torch(arrays), "weight_scale": scales}, means


def mxfp4(weights: np.ndarray) -> Made:
    grouped = weights.reshape(len(weights), -1, 32)
    exponents = np.ceil(np.log2(np.abs(grouped).max(-1) / 6)).astype(int)
    codes = np.abs((grouped / 2.0 ** exponents[..., None])[..., None] - E2M1).argmin(-1)
    means = (E2M1[codes] * 2.0 ** exponents[..., None]).astype(np.float32).reshape(weights.shape)
    flat = codes.reshape(weights.shape)
    bytes_ = (flat[:, ::2] | flat[:, 1::2] << 4).astype(np.uint8)
    return _torch({"weight_packed": bytes_, "weight_scale": (exponents + 127).astype(np.uint8)}), means


def mlx(weights: np.ndarray, bits: int, size: int) -> Made:
    """mlx-lm's affine groups: a scale and a bias in bfloat16, plain rounding."""
    grouped = weights.reshape(len(weights), -1, size)
    low, high = grouped.min(-1), grouped.max(-1)
    kept = [torch.from_numpy(one).to(torch.bfloat16) for one in ((high - low) / (2**bits - 1), low)]
    scale, bias = (one.float().numpy()[..., None] for one in kept)
    codes = np.clip(np.round((grouped - bias) / scale), 0, 2**bits - 1).astype(np.int64)
    packed_codes = stream(codes.reshape(weights.shape), bits).view(np.uint32)
    means = (codes.astype(np.float32) * scale + bias).reshape(weights.shape)
    return {**_torch({"weight": packed_codes}), "scales": kept[0], "biases": kept[1]}, means


def mlx_mxfp4(weights: np.ndarray) -> Made:
    """The same weights as ``mxfp4``, as MLX lays them out."""
    arrays, means = mxfp4(weights)
    codes = arrays["weight_packed"].numpy().view(np.uint32)
    return {**_torch({"weight": codes}), "scales": arrays["weight_scale"]}, means


def groups(*weights: dict[str, Any], layout: str) -> dict[str, Any]:
    """A configuration of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            f"group_{number}": {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **one}}
            for number, one in enumerate(weights)
        },
    }


def repack(
    plain: Path, folder: Path, configuration: dict[str, Any] | None, make: Callable[[str, np.ndarray], Made]
) -> dict[str, np.ndarray]:
    """Write ``folder``, the checkpoint ``plain`` with every projection of its layers made by ``make``; returns what
    the projections mean."""
    folder.mkdir()
    stored: Tensors = {}
    truth = {}
    for path in plain.iterdir():
        if path.suffix == ".safetensors":
            for name, tensor in load_file(path).items():
                if not name.endswith("proj.weight"):
                    stored[name] = tensor
                    continue
                layer = name.removesuffix(".weight")
                arrays, truth[name] = make(layer, tensor.float().numpy())
                stored |= {f"{layer}.{suffix}": array for suffix, array in arrays.items()}
        elif path.name != "model.safetensors.index.json":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    if configuration is not None:
        config["quantization_config"] = configuration
    (folder / "config.json").write_text(json.dumps(config))
    return truth


def _torch(arrays: dict[str, np.ndarray]) -> Tensors:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def alternating(*makers: Callable[[np.ndarray], Made]) -> Callable[[str, np.ndarray], Made]:
    """Layers in turn by one maker and the next."""
    turn: Iterator[int] = iter(range(1 << 30))
    return lambda _, weights: makers[next(turn) % len(makers)](weights)
