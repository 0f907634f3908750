"""An importance matrix from the engine itself (``engines/activation_sums.py``): for every architecture that llama.cpp
runs, what its own llama-imatrix gathers on the same tokens.

Sums of squares of what each stored matrix of the layers is multiplied with; a row and a count each for stacked experts,
over the tokens that were routed to them, and for the matrices per head of latent attention. Embedding and head are left
out, as there. What the graph never multiplies (next-token heads, convolutions) has no importance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitladder import __version__
from bitladder.describe.windows import Window, tokens_hash
from bitladder.engines.library_process import answers, numbers_of
from bitladder.errors import BadInput, BadWeights, EngineError
from bitladder.files.engine_package import engine_version
from bitladder.files.gguf import GgufFile
from bitladder.files.imatrix import ImportanceMatrix
from bitladder.files.kept_array import KeptArray
from bitladder.files.vector_file import importance_of_vectors
from bitladder.formats.roles import EMBEDDING, OUTPUT
from bitladder.levels.products import COUNT, SQUARES
from bitladder.progress import Progress, silent

SHARD = 8
"""Windows whose sums are handed over together; shards are added in their order, so a resumed sum is the same."""


def engine_importance(
    source: GgufFile,
    windows: Sequence[Window],
    *,
    dataset: str = "",
    threads: int,
    keep: Path | None = None,
    progress: Progress = silent,
) -> ImportanceMatrix:
    """Gather an importance matrix.

    Args:
        source: the model.
        windows: token windows of the calibration text.
        dataset: what the file says it was made from.
        threads: of the engine.
        keep: a folder in which a killed call leaves its sums; one over the same model and text goes on from there, and
            removes them at its end. None keeps nothing.
        progress: told after each shard of windows.

    Raises:
        BadInput: no windows.
        BadWeights: activations are not finite.
        EngineError: the engine did not load the model, died, or multiplied no matrix of the model.
        OutputError: what is kept cannot be written.
    """
    if not windows:
        raise BadInput(
            "There are no token windows to calibrate on.",
            means="The calibration text is empty or too short.",
            do="Give a text of several thousand tokens.",
        )
    extents = _extents(source)
    size = sum(matrices * (columns + 1) for matrices, columns in extents.values())
    sums = _Sums(keep, source, windows, size)
    shards = math.ceil(len(windows) / SHARD)
    request = {
        "kind": "sums",
        "file": str(source.path),
        "n_vocab": source.model.dims.n_vocab,
        "windows": [window.tokens.tolist() for window in windows],
        "shard": SHARD,
        "done": sums.shards,
        "tensors": extents,
        "threads": threads,
    }
    progress("engine: reading the model", sums.shards, shards)
    for message in answers(request, source.path, most=size) if sums.shards < shards else ():
        if message.kind != "shard":
            continue
        numbers = numbers_of(message, size, source.path)
        if not np.isfinite(numbers).all():
            raise BadWeights(
                f"Activations of {source.path} are not finite in the engine.",
                means="A tensor is damaged, or a sum overflows in the engine's arithmetic.",
                do="Look with `bitladder inspect` whether the file is sound.",
            )
        sums.add(numbers)
        progress("engine: importance", sums.shards, shards)
    vectors = _vectors(sums.total, extents)
    if not vectors:
        raise EngineError(
            f"The engine multiplied no matrix of {source.path} that its header names.",
            means="Its library may not be the build that is known here.",
            do="Report this with `bitladder --version`; quantize with --imatrix none until then.",
        )
    sums.kept.remove()
    found = importance_of_vectors(vectors, dataset=dataset)
    return replace(found, chunks=len(windows), chunk_size=max(len(one.tokens) for one in windows))


def _extents(source: GgufFile) -> dict[str, tuple[int, int]]:
    """Matrices and columns of each tensor that may be multiplied with."""
    return {
        tensor.name: (math.prod(tensor.shape[:-2]), tensor.shape[-1])
        for tensor in source.model.tensors
        if len(tensor.shape) > 1 and tensor.name.endswith(".weight") and tensor.name not in (EMBEDDING, OUTPUT)
    }


def _vectors(total: NDArray[np.float64], extents: dict[str, tuple[int, int]]) -> dict[str, NDArray[np.floating]]:
    """Sums and counts by tensor and kind, of those that were multiplied with at all."""
    vectors: dict[str, NDArray[np.floating]] = {}
    at = 0
    for name, (matrices, columns) in extents.items():
        squares = total[at : at + matrices * columns].reshape(matrices, columns)
        counts = total[at + matrices * columns : at + matrices * (columns + 1)]
        at += matrices * (columns + 1)
        if counts.any():
            vectors |= {f"{name}.{SQUARES}": squares, f"{name}.{COUNT}": counts}
    return vectors


class _Sums:
    """The sum of the first ``shards``; ``total`` f64[n]."""

    def __init__(self, folder: Path | None, source: GgufFile, windows: Sequence[Window], size: int) -> None:
        key = ("sums", __version__, engine_version(), source.sha256, tokens_hash(windows), str(SHARD)) if folder else ()
        self.kept = KeptArray(folder, *key)
        self.total, self.shards = np.zeros(size), 0
        found = self.kept.load()
        if found is not None and found.shape == (size + 1,):
            self.total, self.shards = found[:-1], int(found[-1])

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Take one more shard; raises OutputError where it is time to keep them and they cannot be."""
        self.total, self.shards = self.total + numbers, self.shards + 1
        if self.kept.due():
            self.kept.save(np.append(self.total, self.shards))
