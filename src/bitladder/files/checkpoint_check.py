"""A written checkpoint opened again: every tensor there, every quantized layer decoding to what was
computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.describe.quantized import quantization_of
from bitladder.errors import BadFile, BadInput, OutputError
from bitladder.files.checkpoint import read_checkpoint, read_json
from bitladder.files.safetensors_writer import tensor_hashes
from bitladder.levels import CheckpointLevel
from bitladder.levels.checkpoints import CheckpointFormat, FolderFormat, digest, digest_of_rows, recognised

_ROWS_AT_ONCE = 4096


def verify_folder(folder: Path, level: CheckpointLevel, expected: Mapping[str, str]) -> None:
    """Compare a folder with the digests of the decoded linear layers, by name.

    Raises:
        OutputError: a layer is missing, or decodes to other weights.
    """
    reader = CheckpointReader(folder, level.format)
    if missing := {name for name in expected if not reader.is_quantized(name)}:
        raise OutputError(
            f"{folder} lacks {len(missing)} quantized layers, {min(missing)} first.",
            means="Files were removed while it was written.",
            do="Delete the folder and run again.",
        )
    for name in sorted(expected):
        if expected[name] != reader.digest(name):
            raise OutputError(
                f"{folder}: {name} does not decode to what was computed.",
                means="The disk or the memory of this machine made an error, or the file was changed meanwhile.",
                do="Delete the folder and run again; if it happens twice, check the disk.",
            )


def verify_stored(folder: Path, expected: Mapping[str, str]) -> None:
    """Compare a folder with hashes of the bytes of its tensors (``files.safetensors_writer.tensor_hashes``), by name.

    Raises:
        OutputError: a tensor is missing, or holds other bytes.
    """
    shards = read_checkpoint(folder).shards if expected else ()
    found = {name: one for shard in shards for name, one in tensor_hashes(shard) if name in expected}
    wrong = next((name for name, one in expected.items() if found.get(name) != one), None)
    if wrong is not None:
        raise OutputError(
            f"{folder}: {wrong} does not hold what was computed.",
            means="The disk or the memory of this machine made an error, or the file was changed meanwhile.",
            do="Delete the folder and run again; if it happens twice, check the disk.",
        )


class CheckpointReader:
    """A checkpoint folder's tensors, decoded one at a time."""

    def __init__(self, folder: Path, form: FolderFormat) -> None:
        """Raises BadInput where there are no safetensors, BadFile where their headers contradict their files."""
        self.folder, self.format = folder, form
        checkpoint = read_checkpoint(folder)
        self._where = {name: folder / shard for name, shard in checkpoint.shard_of.items()}

    def linears(self) -> list[str]:
        """Names of the quantized linear layers; of experts that lie together, one name for all."""
        split = [name.rpartition(".") for name in sorted(self._where)]
        return [
            prefix
            for prefix, _, suffix in split
            if (form := self.format_of(prefix)) is not None and suffix == form.suffixes[0]
        ]

    def format_of(self, linear: str) -> CheckpointFormat | None:
        """The format of a layer whose arrays are there; None where it is not quantized."""
        form = self.format.of(linear)
        place, _ = self.format.stacked(linear) or (linear, None)
        whole = form is not None and all(f"{place}.{suffix}" in self._where for suffix in form.suffixes[:2])
        return form if whole else None

    def weights(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor by its float name (``....weight``), decoded where it is quantized: with a dimension more where
        experts lie together and one is not named.

        Raises:
            BadFile: it is missing, or its arrays contradict each other.
        """
        prefix = name.removesuffix(".weight")
        form = self.format_of(prefix)
        if form is None:
            return np.asarray(self._read(name), np.float32)
        arrays = self._arrays(prefix, form.suffixes)
        if arrays[form.suffixes[0]].ndim == 3:
            count = min(len(array) for array in arrays.values())
            parts = [{suffix: array[at] for suffix, array in arrays.items()} for at in range(count)]
            return np.stack([self._decoded(form, prefix, part) for part in parts])
        return self._decoded(form, prefix, arrays)

    def rows(self, name: str, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Some rows of a matrix by its float name; of a quantized one where the format has a row of each array for each
        output.

        Raises:
            BadFile: as ``weights``.
        """
        prefix = name.removesuffix(".weight")
        form = self.format_of(prefix)
        if form is None:
            return np.asarray(self._read(name, rows), np.float32)
        return self._decoded(form, prefix, self._arrays(prefix, form.suffixes, rows))

    def digest(self, name: str) -> str:
        """The hash of a linear layer's weights (``levels.checkpoints.digest``); a few rows at a time where the format
        allows it, so that a large vocabulary does not lie in memory whole.

        Raises:
            BadFile: as ``weights``.
        """
        form = self.format_of(name)
        if form is None or not self.format.everywhere or self.format.stacked(name) is not None:
            return digest(self.weights(f"{name}.weight"))
        outputs = len(self._open(f"{name}.{form.suffixes[0]}"))
        starts = range(0, outputs, _ROWS_AT_ONCE)
        columns = self.rows(f"{name}.weight", slice(0, 1)).shape[1]
        parts = (self.rows(f"{name}.weight", slice(start, start + _ROWS_AT_ONCE)) for start in starts)
        return digest_of_rows((outputs, columns), parts)

    def _decoded(
        self, form: CheckpointFormat, prefix: str, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> npt.NDArray[np.float32]:
        try:
            return form.decode(arrays)
        except (ValueError, KeyError, TypeError) as error:
            raise BadFile(
                f"{self.folder}: {prefix} contradicts itself: {error}", do="Write the level again."
            ) from error

    def input_rounding(self, linear: str) -> Callable[[Any], Any] | None:
        """What engines do to the inputs of a layer; None where it is not quantized, or they do nothing.

        Raises:
            BadFile: an array that says so is damaged.
        """
        form = self.format_of(linear)
        if form is None:
            return None
        arrays = self._arrays(linear, form.input_arrays)
        try:
            return form.input_rounding(arrays)
        except (ValueError, KeyError, TypeError) as error:
            raise BadFile(
                f"{self.folder}: {linear} contradicts itself: {error}", do="Write the level again."
            ) from error

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor, by its float name, is stored quantized."""
        return self.format_of(name.removesuffix(".weight")) is not None

    def _arrays(
        self, prefix: str, suffixes: Sequence[str], rows: slice | npt.NDArray[np.int64] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Those of a layer that are there."""
        place, expert = self.format.stacked(prefix) or (prefix, rows)
        keys = {suffix: f"{place}.{suffix}" for suffix in suffixes}
        return {suffix: self._read(key, expert) for suffix, key in keys.items() if key in self._where}

    def _read(self, key: str, at: int | slice | npt.NDArray[np.int64] | None = None) -> npt.NDArray[Any]:
        """A tensor, or what of it lies ``at`` places of its first dimension."""
        tensor = self._open(key)
        if at is None:
            return _array(tensor)
        if isinstance(at, int) and at >= len(tensor):
            raise BadFile(f"{self.folder}: {key} holds {len(tensor)} experts, number {at} is wanted.")
        import torch

        place = torch.from_numpy(at) if isinstance(at, np.ndarray) else at
        if tensor.dtype == torch.uint32:  # torch knows few operations on unsigned integers
            return _array(tensor.view(torch.int32)[place].view(torch.uint32))
        return _array(tensor[place])

    def _open(self, key: str) -> Any:
        """A tensor of torch, mapped from its file."""
        from safetensors import safe_open

        if key not in self._where:
            raise BadFile(f"{self.folder} has no tensor '{key}'.", do="Write the level again.")
        with safe_open(self._where[key], "pt") as file:
            return file.get_tensor(key)


def format_of_folder(folder: Path) -> FolderFormat:
    """The format that a checkpoint folder's configuration names, whoever wrote it.

    Raises:
        BadInput: it is no checkpoint folder, not quantized, or in a format that is not read.
        BadFile: its configuration is damaged.
    """
    config = read_json(folder / "config.json")
    found = quantization_of(config)
    form = recognised(found)
    if form is None:
        what = "has no quantization_config" if not found else "is quantized in a format or with options not read here"
        raise BadInput(
            f"{folder} {what}.",
            means="GPTQ (both versions), AWQ (GEMM) and compressed-tensors (pack-quantized, int8, FP8, NVFP4, MXFP4, "
            "MXFP8; inputs rounded at run time or not at all; one scheme for all layers, or a mix of them) are read, "
            "and MLX's folders with one size of groups.",
            do="Give a folder in one of these formats, or a GGUF file.",
        )
    return form


def decoded_linears(folder: Path, level: CheckpointLevel) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Every quantized linear layer by name with its weights f32[outputs, inputs], one at a time.

    Raises:
        BadFile: an array of a layer is missing or has another shape than the others need.
    """
    reader = CheckpointReader(folder, level.format)
    for name in reader.linears():
        yield name, reader.weights(f"{name}.weight")


def _array(tensor: Any) -> npt.NDArray[Any]:
    import torch

    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        return np.asarray(tensor.view(torch.uint8).numpy())
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
