"""Models that other programs have downloaded, read in place: Ollama's manifests and blobs, LM Studio's folder.

ollama:name[:tag]              $OLLAMA_MODELS or ~/.ollama/models
lmstudio:publisher/repo[:file or level]       ~/.lmstudio/models or ~/.cache/lm-studio/models
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from bitladder.errors import BadFile, BadInput, UsageError
from bitladder.files.checkpoint import read_json
from bitladder.files.hub import group_shards, level_of

_MODEL_LAYER = "application/vnd.ollama.image.model"
_OLLAMA_NAME = re.compile(
    r"(?:(?P<host>[\w.-]+\.[\w.-]+)/)?(?:(?P<owner>[\w.-]+)/)?(?P<name>[\w.-]+)(?::(?P<tag>[\w.-]+))?"
)


def ollama_folder() -> Path:
    """Where Ollama keeps models."""
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models").expanduser()


def lmstudio_folders() -> tuple[Path, ...]:
    """Where LM Studio keeps models, newer place first."""
    home = Path.home()
    return (home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models")


def find_ollama(model: str) -> Path:
    """The GGUF blob of ``ollama:name[:tag]``.

    Raises:
        UsageError: not of this form.
        BadInput: Ollama has no such model, or its weights are missing.
        BadFile: a damaged manifest.
    """
    match = _OLLAMA_NAME.fullmatch(model.removeprefix("ollama:"))
    if match is None:
        raise UsageError(f"'{model}' is not the name of an Ollama model.", do="Write ollama:name or ollama:name:tag.")
    folder = ollama_folder()
    manifests = folder / "manifests" / (match["host"] or "registry.ollama.ai") / (match["owner"] or "library")
    manifest = manifests / match["name"] / (match["tag"] or "latest")
    if not manifest.is_file():
        raise _unknown("Ollama", model, folder, list_ollama(), f"ollama pull {model.removeprefix('ollama:')}")
    layers = read_json(manifest).get("layers")
    found = [
        layer.get("digest")
        for layer in layers if isinstance(layer, dict) and layer.get("mediaType") == _MODEL_LAYER
    ] if isinstance(layers, list) else []  # fmt: skip
    if len(found) != 1 or not isinstance(found[0], str) or not re.fullmatch(r"sha256:[0-9a-f]{64}", found[0]):
        raise BadFile(
            f"{manifest} names {len(found)} files of weights where one is expected.", do="Pull the model again."
        )
    blob = folder / "blobs" / found[0].replace(":", "-")
    if not blob.is_file():
        raise BadInput(
            f"Ollama lists {model.removeprefix('ollama:')}, but its weights {blob.name[:19]}... are not in "
            f"{blob.parent}.",
            means="The download did not finish, or the file was removed.",
            do=f"Run: ollama pull {model.removeprefix('ollama:')}",
        )
    return blob


def list_ollama() -> list[str]:
    """Names of Ollama's models, as ``ollama:name:tag``."""
    root = ollama_folder() / "manifests" / "registry.ollama.ai"
    names = []
    for manifest in sorted(root.glob("*/*/*")):
        owner, name, tag = manifest.relative_to(root).parts
        names.append(f"ollama:{'' if owner == 'library' else owner + '/'}{name}:{tag}")
    return names


def find_lmstudio(model: str) -> Path:
    """The GGUF file of ``lmstudio:publisher/repo[:file or level]``; the only one, if nothing more is said.

    Raises:
        BadInput: LM Studio has no such model, or several that fit.
    """
    name, _, wish = model.removeprefix("lmstudio:").partition(":")
    for root in lmstudio_folders():
        folder = root / name
        if not folder.is_dir() or not folder.resolve().is_relative_to(root.resolve()):
            continue
        groups = group_shards([path.name for path in folder.glob("*.gguf")])
        found = [
            files[0]
            for stem, files in groups.items()
            if not wish or wish in (stem, *files) or level_of(stem) == wish.upper()
        ]
        if len(found) == 1:
            return folder / found[0]
        offered = ", ".join(sorted(level_of(stem) or stem for stem in groups)) or "nothing"
        raise BadInput(
            f"{folder} has {len(found) or 'no'} files that match '{wish or 'any level'}'; it offers {offered}.",
            do=f"Choose one: lmstudio:{name}:LEVEL",
        )
    raise _unknown("LM Studio", model, lmstudio_folders()[0], list_lmstudio(), f"lms get {name}")


def list_lmstudio() -> list[str]:
    """LM Studio's repositories, as ``lmstudio:publisher/repo``."""
    folders = (folder for root in lmstudio_folders() for folder in sorted(root.glob("*/*")) if folder.is_dir())
    return [f"lmstudio:{folder.parent.name}/{folder.name}" for folder in folders]


def _unknown(program: str, model: str, folder: Path, known: list[str], command: str) -> BadInput:
    close = difflib.get_close_matches(model, known, n=3, cutoff=0.4)
    return BadInput(
        f"{program} has no model '{model.split(':', 1)[1]}' in {folder}.",
        means=f"It has {', '.join(close or known[:5])}." if known else "It has none at all, or keeps them elsewhere.",
        do=f"Run: {command}",
    )
