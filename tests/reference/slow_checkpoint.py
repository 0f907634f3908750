"""Checkpoint layouts decoded one code at a time, with Python integers, from their description alone.

Nothing of bitladder is used. Layouts: ``y = W x``, ``W[n][k] = (code - zero) * scale``; see the module docstrings in
bitladder/levels/checkpoints/ for shapes, and the config keys each file format carries.
"""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open


def bits_at(words, position, bits):
    """``bits`` bits that start at bit ``position`` of a little-endian stream of 32-bit words."""
    value = 0
    for bit in range(bits):
        word = int(words[(position + bit) // 32]) & 0xFFFFFFFF
        value |= ((word >> ((position + bit) % 32)) & 1) << bit
    return value


def gptq(arrays, bits, v1=True):
    qweight, qzeros, scales, g_idx = (arrays[key] for key in ("qweight", "qzeros", "scales", "g_idx"))
    inputs, outputs = len(g_idx), qweight.shape[1]
    weights = np.empty((outputs, inputs), np.float32)
    for n in range(outputs):
        for k in range(inputs):
            group = int(g_idx[k])
            zero = bits_at(qzeros[group], n * bits, bits) + (1 if v1 else 0)
            weights[n, k] = np.float32(bits_at(qweight[:, n], k * bits, bits) - zero) * np.float32(scales[group, n])
    return weights


def awq(arrays, group_size):
    place = [0, 2, 4, 6, 1, 3, 5, 7]  # slot i of a word holds output column 8 c + place[i]
    qweight, qzeros, scales = (arrays[key] for key in ("qweight", "qzeros", "scales"))
    inputs, outputs = qweight.shape[0], qweight.shape[1] * 8
    weights = np.empty((outputs, inputs), np.float32)
    for n in range(outputs):
        word, slot = n // 8, place.index(n % 8)
        for k in range(inputs):
            code = (int(qweight[k, word]) >> (4 * slot)) & 15
            zero = (int(qzeros[k // group_size, word]) >> (4 * slot)) & 15
            weights[n, k] = np.float32(code - zero) * np.float32(scales[k // group_size, n])
    return weights


def pack_quantized(arrays, bits, group_size):
    packed, scales = arrays["weight_packed"], arrays["weight_scale"]
    outputs, inputs = (int(size) for size in arrays["weight_shape"])
    half = 2 ** (bits - 1)
    weights = np.empty((outputs, inputs), np.float32)
    for n in range(outputs):
        for k in range(inputs):
            group = k // (group_size or inputs)
            zero = 0
            if "weight_zero_point" in arrays:
                zero = bits_at(arrays["weight_zero_point"][:, group], n * bits, bits) - half
            signed = bits_at(packed[n], k * bits, bits) - half
            weights[n, k] = np.float32(signed - zero) * np.float32(scales[n, group])
    return weights


def int_quantized(arrays):
    return arrays["weight"].astype(np.float32) * arrays["weight_scale"].astype(np.float32)


def read_folder(folder: Path):
    """Every tensor of a checkpoint folder as float32 weights by name, decoded as its own config.json says."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    raw = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                raw[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    decoded = {}
    for name, value in raw.items():
        prefix, _, suffix = name.rpartition(".")
        arrays = {key.rpartition(".")[2]: own for key, own in raw.items() if key.rpartition(".")[0] == prefix}
        if suffix == "qweight" and config["quant_method"] == "gptq":
            decoded[f"{prefix}.weight"] = gptq(arrays, config["bits"], config["checkpoint_format"] == "gptq")
        elif suffix == "qweight":
            decoded[f"{prefix}.weight"] = awq(arrays, config["group_size"])
        elif suffix == "weight_packed":
            weights = config["config_groups"]["group_0"]["weights"]
            decoded[name.replace("weight_packed", "weight")] = pack_quantized(
                arrays, weights["num_bits"], weights["group_size"]
            )
        elif suffix == "weight" and "weight_scale" in arrays:
            decoded[name] = int_quantized(arrays)
        elif suffix in ("weight", "bias"):
            decoded[name] = value
    return decoded
