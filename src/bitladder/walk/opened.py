"""A GGUF file as layers to walk: by its family's row where there is one, else by transformers' whole forward."""

from __future__ import annotations

from pathlib import Path

from bitladder.errors import UnknownArchitecture
from bitladder.files.checkpoint import list_shards
from bitladder.files.convert import checkpoint_of
from bitladder.files.folders import cache_key
from bitladder.files.gguf import GgufFile
from bitladder.files.staging import data_files
from bitladder.formats.families import family_of
from bitladder.walk.layers import LayeredModel
from bitladder.walk.weights import FileWeights
from bitladder.walk.whole import Findings, WholeModel

_KEPT: dict[str, Findings] = {}
_MOST = 2
"""Models whose findings are kept: a job has one source, and maybe a reference."""


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
        return _whole(source, weights, folder, device)
    try:
        return LayeredModel(source.model, weights, device=device)
    except UnknownArchitecture:  # a variant that the row does not describe
        return _whole(source, weights, folder, device)


def _whole(source: GgufFile, weights: FileWeights, folder: Path, device: str) -> WholeModel:
    """The derived walk, which looks at layers once as long as neither file nor checkpoint change: a job opens its model
    for importance, for each level that it reads back, for recipes."""
    key = _state_of([*(header.path for header in source.headers), *data_files(folder), *list_shards(folder)], device)
    model = WholeModel(source.model, weights, folder, device=device, findings=_KEPT.get(key))
    while len(_KEPT) >= _MOST and key not in _KEPT:
        del _KEPT[next(iter(_KEPT))]
    _KEPT[key] = model.findings
    return model


def _state_of(paths: list[Path], device: str) -> str:
    """Changes when a file does, by its place, its length and its time."""
    states = [(str(path.resolve()), path.stat()) for path in paths]
    return cache_key(device, *(f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states))
