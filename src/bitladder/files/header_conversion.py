"""The header of the GGUF file that a checkpoint would become, without its weights: sizes to the byte for every class
that llama.cpp's converter knows.

The converter works on lazy tensors, so its own mapping can run on config.json and the headers of the safetensors files
alone: weights are holes of their true sizes, and what it writes is a header before a hole. Where there are not even
safetensors headers, the parameters of transformers' class, on the meta device, take their place. It is the same
converter behind the same fence as for a conversion (``files/convert.py``).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitladder.describe.model import Model
from bitladder.errors import BadFile, BadInput, BitladderError, OutputError
from bitladder.files import converter_child
from bitladder.files.atomic import write_whole
from bitladder.files.checkpoint import Checkpoint, CheckpointTensor
from bitladder.files.convert import converter_failure, lacks_mtp, outtype_of, unused_head
from bitladder.files.converter import Converter
from bitladder.files.fence import ended_after, environment, fenced, memory_bound, package_folders
from bitladder.files.folders import cache_folder
from bitladder.files.gguf import read_header
from bitladder.files.staging import clean_config, data_files, stage_tokenizer
from bitladder.progress import Progress, silent
from bitladder.units import GiB

_VERSION = "4"
"""Changes when other headers are made of the same files."""
_SECONDS = 900.0
"""Imports take ten on a busy machine, a hundred thousand tensors minutes."""
_MEMORY = 6 * GiB
_LARGEST_FILE = 1 << 44
"""Bound of files that are holes, in bytes."""
_MAX_TENSORS = 1_000_000


@dataclass(frozen=True)
class Converted:
    """What a conversion would make."""

    model: Model
    exact: bool
    """The file's header is whole; else its tokenizer is left out, and its bytes are an estimate."""
    tokenizer: str = ""
    """Why the converter could not read the folder's tokenizer; "" where it could, or where no folder was given."""


def header_of(
    label: str,
    config: Mapping[str, Any],
    tensors: Sequence[CheckpointTensor],
    converter: Converter,
    *,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Converted:
    """The converted model from headers alone.

    Args:
        label: How to call it.
        config: config.json.
        tensors: The checkpoint's, in any order; none: those of transformers' class.
        converter: See ``converter_at_hand``.
        folder: Holds the tokenizer's files; without it the header's size is an estimate.
        progress: Called at the beginning.

    Raises:
        BadInput, UnknownArchitecture: the converter, or transformers, cannot read it; the message has its last words.
        OutputError: no space for the header.
    """
    if len(tensors) > _MAX_TENSORS:
        raise BadInput(f"{label} has {len(tensors)} tensors.", means=f"At most {_MAX_TENSORS} are read.")
    key = _key(label, config, tensors, converter, folder)
    kept = _kept(key)
    if kept is None:
        progress("asking llama.cpp's converter for the file's header", 0, 1)
        kept = _made(label, config, tensors, converter, folder)
        _keep(key, *kept)
    header, size, tokenizer = kept
    model = _read(header, size, label)
    if not tokenizer:
        return Converted(model, exact=True)
    estimate = 40 * model.dims.n_vocab + len(header)
    unread = tokenizer if tokenizer != "none" else "there is none" if folder else ""
    return Converted(replace(model, raw_metadata={}, header_bytes=estimate), exact=False, tokenizer=unread)


_Made = tuple[bytes, int, str]
"""The header's bytes, the size of the whole file, why there is no tokenizer in it."""


def _made(
    label: str,
    config: Mapping[str, Any],
    tensors: Sequence[CheckpointTensor],
    converter: Converter,
    folder: Path | None,
) -> _Made:
    """Stage, run the converter, take its header."""
    try:
        with tempfile.TemporaryDirectory(prefix="bitladder-header-") as name:
            work = Path(name)
            stage = work / label.replace("/", "-")
            if folder is None:
                stage.mkdir()
            else:
                stage_tokenizer(folder, stage)
            (stage / "config.json").write_text(json.dumps(clean_config(dict(config))))
            if tensors:
                _write_holes(stage / "model.safetensors", tensors)
            return _run(stage, Checkpoint(stage, dict(config), (), tuple(tensors)), converter, work)
    except OSError as error:
        raise OutputError(
            f"The header of {label} cannot be made: {error.strerror or error}",
            do="Free some space for temporary files, or set TMPDIR.",
        ) from error


def _write_holes(path: Path, tensors: Sequence[CheckpointTensor]) -> None:
    table: dict[str, object] = {}
    at = 0
    for tensor in tensors:
        table[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    raw = json.dumps(table).encode()
    if at > _LARGEST_FILE:
        raise BadFile(f"The headers of {path.parent.name} promise {at} bytes of weights.", means="No model has them.")
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)


def _run(stage: Path, checkpoint: Checkpoint, converter: Converter, work: Path) -> _Made:
    made = work / "header.gguf"
    job: converter_child.ChildJob = {
        "converter": converter.search_path,
        "packages": package_folders(),
        "work": str(work),
        "task": "header",
        "arguments": [
            str(stage),
            "--outfile",
            str(made),
            "--outtype",
            outtype_of(checkpoint) if checkpoint.tensors else "auto",
        ],
        "without_mtp": lacks_mtp(checkpoint),
        "left_out": unused_head(checkpoint.config, checkpoint.tensors),
        "data_bytes": memory_bound(_MEMORY),
        "file_bytes": 2 * _LARGEST_FILE,
        "cpu_seconds": int(_SECONDS),
    }
    lines: list[str] = []
    with fenced(job, environment(work), work) as child, ended_after(child, _SECONDS) as late:
        for line in child.stdout or ():
            lines = [*lines[-199:], line.rstrip()[:400]]
        child.wait()
        if not late.is_alive():
            lines.append(f"ended after {_SECONDS:.0f} seconds without a result")
    if child.returncode != 0 or not made.is_file():
        raise converter_failure(stage.name, lines, child.returncode, converter)
    start = read_header(made).header_bytes
    note = work / converter_child.UNREAD
    with made.open("rb") as file:
        return file.read(start), made.stat().st_size, note.read_text() if note.is_file() else ""


def _read(header: bytes, size: int, label: str) -> Model:
    """The model that a header before a hole describes."""
    with tempfile.TemporaryDirectory(prefix="bitladder-header-") as folder:
        path = Path(folder) / "header.gguf"
        with path.open("wb") as file:
            file.write(header)
            file.truncate(size)
        return replace(read_header(path), name=label, file_name="")


def _key(
    label: str,
    config: Mapping[str, Any],
    tensors: Sequence[CheckpointTensor],
    converter: Converter,
    folder: Path | None,
) -> str:
    """Over everything that the header depends on."""
    shapes = sorted((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
    parts = [_VERSION, label, converter.identity(), config, shapes, *unused_head(config, tensors)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for path in data_files(folder) if folder else ():
        stat = path.stat()
        digest.update(f"\n{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode())
    return digest.hexdigest()[:32]


def _kept(key: str) -> _Made | None:
    """What an earlier plan kept; None where it kept nothing, or something else wrote there."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        note = json.loads(cache_folder("headers", key + ".json").read_bytes())
        header = cache_folder("headers", key + ".gguf-header").read_bytes()
        if hashlib.sha256(header).hexdigest() == note["sha256"]:
            return header, int(note["size"]), str(note["tokenizer"])
    return None


def _keep(key: str, header: bytes, size: int, tokenizer: str) -> None:
    """Without a cache it is made again next time."""
    note = {"size": size, "tokenizer": tokenizer, "sha256": hashlib.sha256(header).hexdigest()}
    with suppress(BitladderError, OSError):
        write_whole(cache_folder("headers", key + ".gguf-header"), header)
        write_whole(cache_folder("headers", key + ".json"), json.dumps(note))
