"""Cleaned copies of a checkpoint's files: all that the converter and transformers get to see, and all that is written
beside a level.

Every text file is parsed and written anew, so that it means to the converter what it means here (a duplicate key, an
escape, an encoding are read once, by us). Only names on the lists below are staged; whatever else lies in the folder,
Python files, pickles and folders above all, is not there for the converter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitladder.errors import BadFile
from bitladder.files.checkpoint import Checkpoint, read_json_text
from bitladder.files.regular import read_regular
from bitladder.system import refer_to

CONFIGURATIONS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "hf_quant_config.json",
)  # fmt: skip
QUANTIZATIONS = ("hf_quant_config.json",)
"""Of these, those that speak of a quantization alone."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tekken.json")
"""JSON whose keys may be tokens."""
TEXTS = ("merges.txt", "vocab.txt", "chat_template.jinja", "rwkv_vocab_v20230424.txt", "README.md")
PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Models of sentencepiece: a protocol buffer."""
INDEX = "model.safetensors.index.json"

CODE_KEYS = frozenset({
    "auto_map", "custom_pipelines", "custom_generate", "custom_object", "custom_code", "trust_remote_code",
    "code_revision", "code_paths", "kernel_config", "_name_or_path", "name_or_path", "base_model_name_or_path",
    "_commit_hash", "repo_id", "_attn_implementation", "attn_implementation", "_attn_implementation_internal",
    "_experts_implementation", "experts_implementation",
})  # fmt: skip
"""Keys by which transformers finds code or another repository; at any depth."""


@dataclass(frozen=True)
class Staged:
    """A staged checkpoint. ``config``: its cleaned configuration."""

    folder: Path
    config: dict[str, Any]


def data_files(folder: Path) -> list[Path]:
    """The files of a checkpoint, weights apart, that a conversion reads, in order of their names.

    Raises:
        BadFile: one of them is a link whose target is gone, or no regular file.
    """
    found = []
    for name in sorted((*CONFIGURATIONS, *VOCABULARIES, *TEXTS, *PIECES)):
        path = folder / name
        if path.is_file():
            found.append(path)
        elif path.is_symlink() or path.exists():
            raise BadFile(
                f"{path} is {_what(path)}.",
                means="Its cache was cleaned or moved, or the copy of the folder did not finish.",
                do="Fetch the file again.",
            )
    return found


def _what(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which is not there"  # noqa: PTH115  (the text of the link, unresolved)
    return "a folder" if path.is_dir() else "no regular file"


def stage_checkpoint(checkpoint: Checkpoint, stage: Path, *, decoded: bool = False) -> Staged:
    """Write the cleaned copies into ``stage``, which must not exist, and links to the weights.

    ``decoded``: the weights are a twin with floats alone (``files/decoded.py``), and what the folder's files say of a
    quantization is left out.

    Weights are the one thing linked: copies would double the disk and the time of a model of a hundred gigabytes.
    A link leads to the resolved regular file, whose header was parsed as safetensors, under a name of ours that
    has the converter open it as nothing else.

    Raises:
        BadFile: a file is not what its name says, is absurdly large or deep, or is gone.
        OSError: ``stage`` cannot be written.
    """
    stage.mkdir(parents=True)
    config: dict[str, Any] = {}
    for path in data_files(checkpoint.folder):
        cleaned = _CLEANERS[path.name](path)
        if cleaned is None:
            continue
        if decoded and path.name in QUANTIZATIONS:
            continue
        if path.name == "config.json":
            cleaned = config = without_quantization(cleaned) if decoded else _translated(cleaned)
        content = cleaned if isinstance(cleaned, bytes) else json.dumps(cleaned).encode()
        (stage / path.name).write_bytes(content)
    _stage_weights(checkpoint, stage)
    return Staged(stage, config)


def _stage_weights(checkpoint: Checkpoint, stage: Path) -> None:
    """Links under the names that the converter looks for, and an index made from the headers."""
    count = len(checkpoint.shards)
    names = {}
    for number, shard in enumerate(checkpoint.shards, 1):
        names[shard.name] = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        refer_to(shard.resolve(strict=True), stage / names[shard.name])
    weight_map = {tensor.name: names[shard] for shard, tensor in checkpoint.placed()}
    (stage / INDEX).write_text(json.dumps({"metadata": {"total_size": checkpoint.nbytes}, "weight_map": weight_map}))


def stage_tokenizer(folder: Path, stage: Path) -> None:
    """Write the cleaned copies of all but the weights into ``stage``, which must not exist.

    Raises:
        BadFile: a file is not what its name says, is absurdly large or deep, or is gone.
        OSError: ``stage`` cannot be written.
    """
    stage.mkdir(parents=True)
    for path in data_files(folder):
        content = clean_bytes(path)
        if content is not None:
            (stage / path.name).write_bytes(content)


def clean_bytes(path: Path) -> bytes | None:
    """The cleaned content of one of ``data_files``; None for a file that has no place beside the others.

    Raises:
        BadFile: it is not what its name says, is absurdly large or deep, or is gone.
    """
    cleaned = _CLEANERS[path.name](path)
    return cleaned if cleaned is None or isinstance(cleaned, bytes) else json.dumps(cleaned).encode()


def clean_json(path: Path) -> Any:
    """A file's JSON without anything by which code or another repository is found.

    Raises:
        BadFile: no JSON, not UTF-8, too large or too deep.
    """
    return without_code(read_json_text(_bytes(path), str(path)))


def without_code(value: Any) -> Any:
    """A JSON value without the keys by which code or another repository is found, at any depth."""
    if isinstance(value, dict):
        return {key: without_code(item) for key, item in value.items() if not _is_code(key, item)}
    return [without_code(item) for item in value] if isinstance(value, list) else value


def _is_code(key: str, item: Any) -> bool:
    """What names code or files elsewhere. A number names nothing: it is a token's place in a vocabulary."""
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return False
    return key in CODE_KEYS or (key.endswith("_file") and isinstance(item, str))


def clean_config(config: dict[str, Any]) -> dict[str, Any]:
    """A parsed config.json as the converter gets to see it."""
    return _translated(dict(without_code(config)))


def _configuration(path: Path) -> dict[str, Any]:
    value = clean_json(path)
    if not isinstance(value, dict):
        raise BadFile(f"{path} holds a {type(value).__name__}, not an object.", do="Copy the file again.")
    return value


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of float weights."""
    return {
        key: without_quantization(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config", "quantization")
    }


def _translated(config: dict[str, Any]) -> dict[str, Any]:
    """A scale per tensor spelled as a scale per channel: it broadcasts alike, and the converter has only that."""
    quantization = config.get("quantization_config")
    groups = quantization.get("config_groups") if isinstance(quantization, dict) else None
    if not isinstance(quantization, dict) or not isinstance(groups, dict):
        return config
    changed = {}
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("strategy") == "tensor":
            changed[name] = {**group, "weights": {**weights, "strategy": "channel"}}
        else:
            changed[name] = group
    return {**config, "quantization_config": {**quantization, "config_groups": changed}}


def _text(path: Path) -> bytes:
    raw = _bytes(path)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if path.name == "README.md":  # nothing depends on it
            return b""
        raise BadFile(
            f"{path} is no text in UTF-8: {error.reason} at byte {error.start}.", do="Fetch it again."
        ) from error
    return raw


def _pieces(path: Path) -> bytes | None:
    """A sentencepiece model byte for byte; None for another tokenizer of that name beside a tokenizer.json."""
    raw = _bytes(path)
    if _is_sentencepiece(raw):
        return raw
    if (path.parent / "tokenizer.json").is_file():
        return None
    raise BadFile(
        f"{path} is no sentencepiece model.",
        means="It is a tokenizer of another kind, a Git LFS pointer, or was cut short.",
        do="Fetch it again, or put the model's tokenizer.json beside it.",
    )


def _is_sentencepiece(raw: bytes) -> bool:
    """The bytes are a whole ModelProto: fields 1 (pieces) to 5, each of a length that fits, pieces first."""
    at, fields = 0, 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        length, at = _varint(raw, at)
        if at < 0 or tag & 7 != 2 or not 1 <= tag >> 3 <= 5 or (fields == 0 and tag >> 3 != 1):
            return False
        at += length
        fields += 1
    return fields > 1 and at == len(raw)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte and where it ends; -1 when it does not."""
    value = 0
    for shift in range(0, 35, 7):
        if not 0 <= at < len(raw):
            break
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return 0, -1


def _bytes(path: Path) -> bytes:
    """A file's content, not more than the bound."""
    try:
        return read_regular(path)
    except FileNotFoundError as error:
        raise BadFile(f"{path} is gone.", do="Fetch it again.") from error


_CLEANERS: dict[str, Callable[[Path], Any]] = {
    **dict.fromkeys(CONFIGURATIONS, _configuration),
    **dict.fromkeys(VOCABULARIES, clean_json),
    **dict.fromkeys(TEXTS, _text),
    **dict.fromkeys(PIECES, _pieces),
}
