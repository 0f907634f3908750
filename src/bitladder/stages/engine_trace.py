"""What llama.cpp computes inside: hidden states after each layer, through its own library in a process of its own."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.engines.library_process import answers, numbers_of
from bitladder.files.gguf import GgufFile
from bitladder.progress import Progress
from bitladder.walk.trace import Trace


def engine_trace(source: GgufFile, tokens: NDArray[np.int64], progress: Progress, *, last: int, threads: int) -> Trace:
    """The engine's pass over ids int64[windows, n]; ``last``: tokens of each window whose logits are kept. Layers whose
    states its graph does not name, or not in the shape of hidden states, are left out.

    Raises:
        EngineError: the engine did not load the file, or died.
    """
    dims = source.model.dims
    windows, n = tokens.shape
    size, width = n * dims.n_embd, (n, dims.n_embd)
    request = {
        "kind": "states",
        "file": str(source.path),
        "n_vocab": dims.n_vocab,
        "n_layer": dims.n_layer,
        "n_embd": dims.n_embd,
        "windows": tokens.tolist(),
        "last": last,
        "threads": threads,
    }
    kept: list[list[torch.Tensor | None]] = [[]]
    logits: list[torch.Tensor] = []
    progress("engine: reading the model", 0, windows)
    for message in answers(request, source.path, most=max(size, last * dims.n_vocab)):
        if len(logits) == windows:
            continue
        if message.kind == "layer" and len(kept[-1]) < dims.n_layer:
            numbers = message.numbers if message.numbers.size == 0 else numbers_of(message, size, source.path)
            kept[-1].append(_tensor(numbers, width) if numbers.size else None)
        if message.kind == "logits":
            shape = (last, dims.n_vocab)
            logits.append(_tensor(numbers_of(message, math.prod(shape), source.path), shape))
            progress("engine: its own forward pass", len(logits), windows)
            kept.append([])
    states = {}
    for layer in range(dims.n_layer):
        found = [own[layer] for own in kept[:windows] if len(own) > layer and own[layer] is not None]
        if len(found) == windows:
            states[layer] = torch.stack([one for one in found if one is not None])
    return Trace(states, torch.stack(logits))


def _tensor(numbers: NDArray[np.float64], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(numbers.astype(np.float32).reshape(shape))
