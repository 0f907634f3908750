"""GGUF files with a true header and a hole for weights: what an engine needs to be timed or sized without a
model.

The engine maps them like any file; every weight is zero, which changes neither memory nor the work that is
done.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

from bitladder.describe.shapes import Shape, metadata_of, tensors_of
from bitladder.files.gguf_writer import encoded, layout
from bitladder.formats import gguf

N_VOCAB = 512
"""Tokens of the smallest stand-in tokenizer: one per byte, the rest unused."""


def write_stub(path: Path, shape: Shape, qtype: str) -> int:
    """Write a model of this shape with all matrices of its layers in ``qtype``; returns the bytes of those
    matrices.

    ``shape.n_vocab`` must be at least ``N_VOCAB``.
    """
    tensors = []
    for tensor in tensors_of(shape):
        in_layer = tensor.name.startswith("blk.") and len(tensor.shape) > 1
        tensors.append(replace(tensor, qtype=qtype) if in_layer else tensor)
    entries = {key: _encoded(value) for key, value in metadata_of(shape).items()} | _tokenizer(shape.n_vocab)
    plan = layout(entries, tensors, gguf.DEFAULT_ALIGNMENT)
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.size)
    return sum(t.nbytes for t in tensors if t.qtype == qtype and t.name.startswith("blk.") and len(t.shape) > 1)


def _encoded(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return encoded(gguf.STRING, value)
    return encoded(gguf.FLOAT32, value) if isinstance(value, float) else encoded(gguf.UINT32, value)


def _tokenizer(n_vocab: int) -> dict[str, bytes]:
    """A byte-level tokenizer without merges."""
    tokens = ["<end>", *_byte_letters(), "ab", *(f"<{number}>" for number in range(n_vocab - 258))]
    kinds = [3] + [1] * (n_vocab - 1)
    return {
        "tokenizer.ggml.model": encoded(gguf.STRING, "gpt2"),
        "tokenizer.ggml.pre": encoded(gguf.STRING, "gpt-2"),
        "tokenizer.ggml.tokens": _strings(tokens),
        "tokenizer.ggml.token_type": _array(gguf.INT32, len(kinds)) + struct.pack(f"<{len(kinds)}i", *kinds),
        "tokenizer.ggml.merges": _strings(["a b"]),
        "tokenizer.ggml.bos_token_id": encoded(gguf.UINT32, 0),
        "tokenizer.ggml.eos_token_id": encoded(gguf.UINT32, 0),
    }


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for letters from 256
    up.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _array(kind: int, count: int) -> bytes:
    return struct.pack("<IIQ", gguf.ARRAY, kind, count)


def _strings(texts: list[str]) -> bytes:
    raw = [text.encode() for text in texts]
    return _array(gguf.STRING, len(raw)) + b"".join(struct.pack("<Q", len(text)) + text for text in raw)
