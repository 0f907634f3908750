"""A GGUF file as layers to walk: by its family's row where there is one, else by transformers' whole forward."""

from __future__ import annotations

from pathlib import Path

from bitladder.errors import UnknownArchitecture
from bitladder.files.convert import checkpoint_of
from bitladder.files.gguf import GgufFile
from bitladder.formats.families import family_of
from bitladder.walk.layers import LayeredModel
from bitladder.walk.weights import FileWeights
from bitladder.walk.whole import WholeModel


def layered(
    source: GgufFile, weights: FileWeights, *, device: str = "cpu", checkpoint: Path | None = None
) -> LayeredModel:
    """The model's layers.

    Args:
        source: the file.
        weights: its own.
        device: where arithmetic happens.
        checkpoint: the folder that it was converted from; by default the one that Bitladder converted it from.

    Raises:
        UnknownArchitecture: no row describes the family, and there is no checkpoint that transformers runs.
        BadFile, BadInput: the file is damaged, or checkpoint and file are not of one model.
        UsageError: torch has no such device here.
    """
    folder = checkpoint or checkpoint_of(source.path)
    known = family_of(source.model.dims.architecture).layers_of(source.model.dims.n_expert) is not None
    if folder is None:
        return LayeredModel(source.model, weights, device=device)
    if not known:
        return WholeModel(source.model, weights, folder, device=device)
    try:
        return LayeredModel(source.model, weights, device=device)
    except UnknownArchitecture:  # a variant that the row does not describe
        return WholeModel(source.model, weights, folder, device=device)
