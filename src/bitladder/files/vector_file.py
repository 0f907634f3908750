"""Vectors gathered by a calibrating walk, kept in the cache: scales of folded levels, sums of squares.

They are small (a few megabytes for a model of eight billion weights) and hours of work: a file per model, text and
level, so that a second call need not walk again. Partial work is kept layer by layer as for checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitladder import __version__
from bitladder.errors import OutputError
from bitladder.files.folders import cache_folder, cache_key
from bitladder.files.imatrix import ImportanceMatrix
from bitladder.files.layer_store import LayerStore, writing
from bitladder.files.safetensors_writer import stored_tensors, write_safetensors
from bitladder.kernels import REVISION
from bitladder.kernels.awq import Fold
from bitladder.levels.products import COUNT, SQUARES

Vectors = Mapping[str, NDArray[np.floating]]
_MANIFEST = "bitladder"


class VectorFile(LayerStore):
    """One such file of a model and a text, in the cache."""

    while_in_use = "Wait for it to end."

    def __init__(self, level: str, source_sha256: str, text_hash: str, settings: str = "") -> None:
        """``level`` and ``settings`` say what is gathered and how. Nothing is written yet.

        Raises:
            OutputError: the cache cannot be written.
        """
        fingerprint = cache_key(__version__, REVISION, level, source_sha256, text_hash, settings)
        target = cache_folder("vectors", f"{level}-{fingerprint[:24]}.safetensors")
        if target.is_file():
            self.target, self.fingerprint, self.partial = target, fingerprint, target
        else:
            super().__init__(target, fingerprint)

    def is_complete(self) -> bool:
        """Whether the file is there. Only complete files ever get their name."""
        return self.target.is_file()

    def manifest(self) -> dict[str, Any]:
        """What the finished file says of itself."""
        from safetensors import safe_open

        with safe_open(self.target, "np") as file:
            return dict(json.loads((file.metadata() or {}).get(_MANIFEST, "{}")))

    def vectors(self) -> dict[str, NDArray[np.floating]]:
        """What the finished file holds, by tensor and kind.

        Raises:
            OutputError: the file was damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return dict(load_file(self.target))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{self.target} cannot be read: {error}.", do="Delete it and run again.") from error

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Join the layers into the file.

        Raises:
            OutputError: no room.
        """
        with writing(self.partial):
            parts = [stored_tensors(self.layer_file(entry.layer)) for entry in self.finished()]
            tensors = [one for part in parts for one in part]
            write_safetensors(self.target, tensors, {_MANIFEST: json.dumps(dict(manifest))})
            self.discard()


def folds_of(vectors: Vectors) -> dict[str, Fold]:
    """Folds by tensor name, from vectors named ``TENSOR.columns`` and ``TENSOR.rows``."""
    kinds: dict[str, dict[str, NDArray[np.float32]]] = {}
    for key, value in vectors.items():
        name, _, kind = key.rpartition(".")
        kinds.setdefault(name, {})[kind] = np.asarray(value, np.float32)
    return {name: Fold(**found) for name, found in kinds.items()}


def importance_of_vectors(vectors: Vectors, *, dataset: str = "") -> ImportanceMatrix:
    """Means of squares, from sums and counts; 1, which is neutral, for experts that no token reached."""
    means, counts = {}, {}
    for key, sums in vectors.items():
        name, _, kind = key.rpartition(".")
        if kind == SQUARES:
            counts[name] = vectors[f"{name}.{COUNT}"].astype(np.float32)
            used = counts[name] > 0
            means[name] = np.ones(sums.shape, np.float32)
            means[name][used] = sums[used] / counts[name][used, None]
    return ImportanceMatrix(means, counts, datasets=(dataset,) if dataset else ())
