"""A written GPTQ, AWQ or INT8 checkpoint as a level that the walk can measure: decoded tensors under their
GGUF names."""

from __future__ import annotations

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitladder.describe.model import Model
from bitladder.errors import BadFile, BadInput, BadWeights
from bitladder.files.checkpoint_check import CheckpointReader
from bitladder.files.checkpoint_folder import checkpoint_sha256
from bitladder.formats import disk_names, roles
from bitladder.formats.families.family import Layers
from bitladder.formats.roles import Parameter
from bitladder.kernels import first_nonfinite
from bitladder.levels.checkpoints import FolderFormat
from bitladder.walk.ends import ends_of
from bitladder.walk.matrices import as_module, in_turn
from bitladder.walk.opened import layered
from bitladder.walk.rounding import InputType
from bitladder.walk.transforms import stored
from bitladder.walk.weights import FileWeights, Rows

F32 = NDArray[np.float32]


class CheckpointWeights:
    """``LevelWeights`` of a checkpoint folder made from ``source``.

    What the folder does not hold differently (embedding, head) is the source's own.
    """

    def __init__(self, source: FileWeights, folder: Path, form: FolderFormat) -> None:
        """Raises BadFile or BadInput where the folder is no sound checkpoint of the source's family."""
        model: Model = source.file.model
        self._source, self._model = source, model
        own = layered(source.file, source)
        self._family = own.family
        self._ends = ends_of(own) if form.everywhere else {}
        self._reader = CheckpointReader(folder, form)
        self._folder = folder
        self._identity = checkpoint_sha256(folder)

    def __call__(self, name: str, rows: Rows = None) -> F32:
        """As ``LevelWeights``; a decoder layer's tensors are the folder's, embedding and head where the format
        quantizes them, all others the source's."""
        if name in self._ends:
            return self._of_the_ends(name, rows)
        if not name.startswith("blk."):
            return self._source(name, rows)
        _, layer, role = name.split(".", 2)
        parameter, part = _parameter_of(self._family, role)
        apart = isinstance(parameter.transform, str) and len(parameter.roles) > 1
        whole = self._decoded(int(layer), parameter, part if apart else None)
        shape = self._source.file.info(name).shape
        if not isinstance(parameter.transform, str):
            whole = parameter.transform.tensor(part, whole)
        if whole.size != math.prod(shape):
            raise _other_model(self._folder, self._source, name, shape, whole.shape)
        heads = self._model.dims.n_head if "q_proj" in parameter.path else self._model.dims.n_head_kv
        value = whole if not isinstance(parameter.transform, str) else stored(parameter.transform, 0, whole, heads)
        value = _finite(self._folder, name, value.reshape(shape))
        return value if rows is None else value.reshape(-1, value.shape[-1])[rows]

    def qtype(self, name: str) -> InputType:
        """What a matrix's inputs meet at run time: the rounding of the level's format where it has one, else ``F32``,
        nothing."""
        if not name.startswith("blk."):
            return "F32"
        _, layer, role = name.split(".", 2)
        parameter, _ = _parameter_of(self._family, role)
        expert = 0 if parameter.path in self._family.experts else None
        linear = disk_names.disk_linears(self._family, parameter.path, expert)[0]
        return self._reader.input_rounding(f"{self._family.disk.layers}{layer}.{linear.name}") or "F32"

    def identity(self, name: str) -> Hashable:
        """The folder's for what is its own, the source's for the rest."""
        own = name.startswith("blk.") or name in self._ends
        return (self._identity, name) if own else self._source.identity(name)

    def forget(self, name: str) -> None:
        """Nothing is kept here."""
        self._source.forget(name)

    def _of_the_ends(self, name: str, rows: Rows) -> F32:
        shape = self._source.file.info(name).shape
        value = self._reader.rows(self._ends[name], slice(0, shape[0]) if rows is None else rows)
        if value.shape[-1] != shape[-1] or (rows is None and value.shape != shape):
            raise _other_model(self._folder, self._source, name, shape, value.shape)
        return _finite(self._folder, name, value)

    def _decoded(self, layer: int, parameter: Parameter, part: int | None) -> F32:
        """A parameter (or the share of one role in it) as transformers' module holds it."""
        prefix = f"{self._family.disk.layers}{layer}."
        if parameter.path in self._family.experts:
            stacked: list[Any] = []
            for expert in range(self._model.dims.n_expert):
                linears = disk_names.disk_linears(self._family, parameter.path, expert)
                chosen = linears if part is None else linears[part : part + 1]
                own = [self._reader.weights(prefix + linear.tensor) for linear in chosen]
                stacked.append(own[0] if len(own) == 1 else np.concatenate(own))
            if len({one.shape for one in stacked}) > 1:
                raise BadFile(f"{self._folder}: the experts of layer {layer} differ in shape.", do="Copy it again.")
            value = np.stack(stacked)
        else:
            name = prefix + disk_names.disk_name(self._family, parameter.path)
            value = self._reader.weights(name)
            if not self._reader.is_quantized(name):
                return value
        if value.ndim < 3 and parameter.path in self._family.experts:
            return in_turn(self._family, parameter.path, value[..., None])[..., 0]
        return as_module(self._family, parameter, value) if part is None and value.ndim > 1 else value


def _other_model(
    folder: Path, source: FileWeights, name: str, shape: tuple[int, ...], found: tuple[int, ...]
) -> BadInput:
    return BadInput(
        f"{folder} is no checkpoint of {source.file.path}: {name} has the shape {shape} there, and {found} here.",
        means="The two hold different models.",
        do="Compare a checkpoint with the model that it was made from.",
    )


def _finite(folder: Path, name: str, value: F32) -> F32:
    """The same weights, all of them numbers."""
    if first_nonfinite(value.reshape(-1, value.shape[-1])) is not None:
        raise BadWeights(
            f"{folder}: {name} holds NaN or infinity.",
            means="The checkpoint was damaged while it was written or copied; every prediction would be NaN.",
            do="Write or download it again.",
        )
    return value


def _parameter_of(family: Layers, role: str) -> tuple[Parameter, int]:
    for parameter in family.parameters:
        if role in parameter.roles:
            return parameter, parameter.roles.index(role)
    raise BadFile(f"No row of '{family.model_type}' has a place for {roles.layer_tensor(0, role)}.")
