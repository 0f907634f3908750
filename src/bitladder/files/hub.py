"""Models on the Hugging Face hub, through its own client: its cache, its token, its resume, ``HF_ENDPOINT``
honoured.

A model is written ``hf:org/name``, ``hf:org/name@revision``, and for repositories of GGUF files
``hf:org/name:Q4_K_M`` or ``hf:org/name:file.gguf``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from bitladder.errors import BadInput, FetchError, UsageError
from bitladder.files.checkpoint import PICKLES

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_LEVEL = re.compile(r"(?<![A-Z0-9])((?:IQ|TQ|Q)\d+(?:_[A-Z0-9]+)*|BF16|F16|F32|MXFP4(?:_MOE)?)(?![A-Z0-9])")
_CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md")
"""What a checkpoint is converted from. Neither pickles nor Python code are ever fetched."""


@dataclass(frozen=True)
class HubName:
    """A parsed ``hf:`` name. ``file`` is a file name, a level, or empty."""

    repo: str
    revision: str = "main"
    file: str = ""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class HubRepo:
    """What a repository offers at one commit."""

    name: HubName
    commit: str
    licence: str
    files: tuple[HubFile, ...]

    def ending(self, suffix: str) -> tuple[HubFile, ...]:
        """Its files with this ending."""
        return tuple(file for file in self.files if file.name.endswith(suffix))


def parse_name(model: str) -> HubName:
    """``hf:org/name[@revision][:file or level]`` in parts.

    Raises:
        UsageError: not of this form.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([^:\s]+))?(?::(\S+))?", model)
    if match is None or not _is_repo(match[1]):
        raise UsageError(
            f"'{model}' is not the name of a model on the hub.",
            do="Write hf:org/name, hf:org/name@revision, or hf:org/name:Q4_K_M for a repository of GGUF files.",
        )
    return HubName(match[1], match[2] or "main", match[3] or "")


def _is_repo(name: str) -> bool:
    """Whether the hub's own client takes a name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def endpoint() -> str:
    """Where the hub is: ``$HF_ENDPOINT`` now, not as it was when the client was imported."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def list_repo(name: HubName) -> HubRepo:
    """Ask the hub what a repository holds.

    Raises:
        BadInput: no such repository or revision, or it is private or gated.
        FetchError: the hub does not answer.
    """
    from huggingface_hub import HfApi

    with hub_errors(name):
        info = HfApi(endpoint=endpoint()).model_info(name.repo, revision=name.revision, files_metadata=True, timeout=30)
    card: Any = info.card_data
    licence = str(card.get("license") or "") if card is not None else ""
    files = tuple(HubFile(file.rfilename, int(file.size or 0)) for file in info.siblings or ())
    return HubRepo(name, info.sha or name.revision, licence, files)


def choose_gguf(repo: HubRepo) -> tuple[HubFile, ...]:
    """The GGUF file a name asks for, all its shards in order; empty when the repository has none and none
    was asked for.

    Without a wish the least lossy one is taken when that is certain: a single model, or one at 32 or 16 bits.

    Raises:
        BadInput: nothing matches, or several do; the message lists what is there.
    """
    models = gguf_models(repo)
    wish = repo.name.file
    if not models and not wish:
        return ()
    if wish:
        exact = [stem for stem, files in models.items() if wish in (stem, *(file.name for file in files))]
        found = exact or [stem for stem in models if level_of(stem) == wish.upper().removesuffix(".GGUF")]
    else:
        found = list(models) if len(models) == 1 else []
        for level in ("F32", "BF16", "F16"):
            found = found or [stem for stem in models if level_of(stem) == level]
    if len(found) != 1:
        listed = ", ".join(sorted(level_of(stem) or stem for stem in models)) or "no GGUF file"
        raise BadInput(
            f"{repo.name.repo} has {len(found) or 'no'} GGUF files that match "
            f"'{wish or 'a 16-bit source'}'; it offers {listed}.",
            means="A repository of ready-made levels holds many models in one place." if models else "",
            do=f"Choose one: hf:{repo.name.repo}:LEVEL or hf:{repo.name.repo}:FILE.gguf",
        )
    return models[found[0]]


def gguf_models(repo: HubRepo) -> dict[str, tuple[HubFile, ...]]:
    """The repository's GGUF models by name without ending, shards together; projectors and importance
    matrices left out.
    """
    by_name = {file.name: file for file in repo.ending(".gguf")}
    return {stem: tuple(by_name[name] for name in names) for stem, names in group_shards(by_name).items()}


def projectors(repo: HubRepo) -> tuple[HubFile, ...]:
    """The repository's projectors (mmproj), those of 16 bits first, the smallest first."""
    found = [file for file in repo.ending(".gguf") if "mmproj" in PurePosixPath(file.name).name.lower()]
    return tuple(sorted(found, key=lambda file: ("16" not in PurePosixPath(file.name).name, file.size, file.name)))


def group_shards(names: Iterable[str]) -> dict[str, list[str]]:
    """GGUF file names by model (name without ending and shard number), each model's shards in order."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        plain = PurePosixPath(name).name.lower()
        if "mmproj" not in plain and "imatrix" not in plain:
            groups.setdefault(_SHARD.sub("", name).removesuffix(".gguf"), []).append(name)
    return groups


def checkpoint_files(repo: HubRepo) -> tuple[HubFile, ...]:
    """The files of a repository that its safetensors checkpoint consists of.

    Raises:
        BadInput: it has no config.json or no safetensors.
    """
    names = {file.name for file in repo.files}
    weights = [file for file in repo.ending(".safetensors") if "/" not in file.name]
    if "config.json" not in names or not weights:
        config = "a" if "config.json" in names else "no"
        pickles = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        raise BadInput(
            f"{repo.name.repo} holds {len(weights)} safetensors files and {config} config.json.",
            means=PICKLES if pickles else "It is no language model checkpoint, or only part of one.",
            do="Name a repository with safetensors or GGUF files (many models have a converted twin).",
        )
    consolidated = [file for file in weights if file.name.startswith("consolidated")]
    if 0 < len(consolidated) < len(weights):  # the same weights a second time, under the maker's own names
        weights = [file for file in weights if file not in consolidated]
    other = [
        file
        for file in repo.files
        if "/" not in file.name
        and not file.name.endswith(".safetensors")
        and any(PurePosixPath(file.name).match(pattern) for pattern in _CHECKPOINT_FILES)
    ]
    return (*other, *weights)


@contextmanager
def hub_errors(name: HubName) -> Iterator[None]:
    """Say what a hub error means and what to do about it."""
    from huggingface_hub import errors

    # the HTTP library's own root error: versions of the client use different libraries
    network_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]
    try:
        yield
    except errors.GatedRepoError as error:
        raise BadInput(
            f"{name.repo} is gated: the hub wants its conditions accepted first.",
            do=f"Open {endpoint()}/{name.repo}, accept the conditions, then log in with `hf auth login` "
            "or set HF_TOKEN.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BadInput(
            f"{name.repo} has no revision '{name.revision}'.",
            do=f"Branches and tags: {endpoint()}/{name.repo}/tree/main",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BadInput(
            f"The hub shows no model {name.repo}.",
            means="Its name is misspelled, or it is private and no token that may see it is set.",
            do="Check the name; for a private model log in with `hf auth login` or set HF_TOKEN.",
        ) from error
    except (errors.EntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise FetchError(f"{name.repo}: {_first_line(error)}", do="Check HF_HUB_OFFLINE and the connection.") from error
    except (network_error, OSError) as error:
        raise FetchError(
            f"The hub at {endpoint()} did not deliver {name.repo}: {_first_line(error)}",
            means="The network is down, a proxy is in between, or the hub is another one (HF_ENDPOINT).",
            do="Try again (what has arrived is kept), or copy the model here and name its path.",
        ) from error


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def level_of(stem: str) -> str:
    """The level a file's name claims (``Q4_K_M``, ``IQ3_XXS``, ``BF16``), or nothing."""
    found = re.findall(
        r"(?<![A-Za-z0-9])((?:IQ|TQ|Q)\d+(?:_[A-Z0-9]+)*|BF16|F16|F32|MXFP4(?:_MOE)?)(?![A-Za-z0-9])",
        stem.upper(),
    )
    return found[-1] if found else ""
