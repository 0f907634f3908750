"""GGUF files written by hand, so that a test can say exactly what is wrong with one."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

F32, F16, Q8_0, Q4_K = 0, 1, 8, 12
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def u32(name: str, value: int) -> bytes:
    return key(name, UINT32, struct.pack("<I", value))


def f32(name: str, value: float) -> bytes:
    return key(name, FLOAT32, struct.pack("<f", value))


def flag(name: str, *, value: bool) -> bytes:
    return key(name, BOOL, struct.pack("<?", value))


def ints(name: str, values: Sequence[int]) -> bytes:
    return key(name, ARRAY, struct.pack(f"<IQ{len(values)}i", INT32, len(values), *values))


def string(name: str, value: str) -> bytes:
    return key(name, STRING, text(value))


def strings(name: str, values: Sequence[str]) -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", STRING, len(values)) + b"".join(text(value) for value in values))


def tensor(name: str | bytes, sizes: Sequence[int], qtype: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, qtype, offset)


def header(
    keys: Sequence[bytes],
    tensors: Sequence[bytes],
    *,
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)


def padded(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)


LLAMA_KEYS = (
    string("general.architecture", "llama"),
    string("general.name", "Tiny"),
    u32("llama.block_count", 2),
    u32("llama.embedding_length", 64),
    u32("llama.feed_forward_length", 128),
    u32("llama.attention.head_count", 4),
    u32("llama.attention.head_count_kv", 2),
    u32("llama.context_length", 128),
)


def write_model(path: Path, weights: dict[str, np.ndarray], *, keys: Sequence[bytes] = LLAMA_KEYS) -> Path:
    """A file with these arrays (float16 or float32, numpy order) as tensors, in this order."""
    listed, data = [], b""
    for name, array in weights.items():
        listed.append(tensor(name, array.shape[::-1], F16 if array.dtype == np.float16 else F32, len(data)))
        data += padded(array.tobytes())
    path.write_bytes(padded(header(keys, listed)) + data)
    return path


def tiny_weights(
    width: int = 64, hidden: int = 128, vocabulary: int = 96, layers: int = 2, seed: int = 0
) -> dict[str, Any]:
    """A llama-shaped set of random float16 matrices and float32 vectors."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.05).astype(np.float16)

    weights: dict[str, Any] = {
        "token_embd.weight": matrix(vocabulary, width),
        "output_norm.weight": np.ones(width, np.float32),
    }
    for layer in range(layers):
        block = f"blk.{layer}."
        weights |= {
            block + "attn_norm.weight": np.ones(width, np.float32),
            block + "attn_q.weight": matrix(width, width),
            block + "attn_k.weight": matrix(width // 2, width),
            block + "attn_v.weight": matrix(width // 2, width),
            block + "attn_output.weight": matrix(width, width),
            block + "ffn_norm.weight": np.ones(width, np.float32),
            block + "ffn_gate.weight": matrix(hidden, width),
            block + "ffn_up.weight": matrix(hidden, width),
            block + "ffn_down.weight": matrix(width, hidden),
        }
    return weights
