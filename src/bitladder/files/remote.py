"""Headers of files on the hub by HTTP range requests: a model is described without its weights being downloaded."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from bitladder.describe.model import Model
from bitladder.errors import BadFile, BadInput, FetchError
from bitladder.files import hub
from bitladder.files.checkpoint import MAX_HEADER, CheckpointTensor, parse_safetensors_header
from bitladder.files.gguf import read_header
from bitladder.progress import Progress, silent
from bitladder.units import MiB, human_bytes

_STEP = 4 * MiB
"""Bytes of a GGUF header asked for at first; tokenizers make most headers 1 to 10 MiB long."""
_MOST = 256 * MiB
"""A header longer than this is a mistake or an attack."""
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Offer:
    """A ready-made level of a repository."""

    level: str
    name: str
    nbytes: int
    files: int


class RemoteFiles:
    """Ranges of a repository's files. Use as a context manager."""

    def __init__(self, repo: hub.HubRepo) -> None:

        from huggingface_hub import get_token

        self.repo = repo
        token = get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}  # httpx drops it when sent to another host
        self._client = httpx.Client(headers=headers, follow_redirects=True, timeout=_TIMEOUT_S)

    def __enter__(self) -> RemoteFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def read(self, file: hub.HubFile, start: int, length: int) -> bytes:
        """Bytes ``start`` to ``start + length`` of a file, fewer at its end.

        Raises:
            BadInput: the hub refuses.
            FetchError: the connection broke, or the server does not do ranges.
        """
        stop = min(start + length, file.size) - 1
        if stop < start:
            return b""
        name = self.repo.name
        url = f"{hub.endpoint()}/{name.repo}/resolve/{quote(self.repo.commit)}/{quote(file.name)}"
        try:
            with self._client.stream("GET", url, headers={"Range": f"bytes={start}-{stop}"}) as response:
                if response.status_code in (401, 403, 404):
                    raise BadInput(
                        f"The hub refuses {file.name} of {name.repo} (HTTP {response.status_code}).",
                        means="The repository is private or gated.",
                        do=f"Accept its conditions at {hub.endpoint()}/{name.repo}, then `hf auth login` or set "
                        "HF_TOKEN.",
                    )
                whole = response.status_code == 200 and start == 0
                if response.status_code != 206 and not whole:
                    raise FetchError(
                        f"{url} answered {response.status_code} to a request for a range.", do="Try later."
                    )
                raw = b""
                for chunk in response.iter_bytes():
                    raw += chunk
                    if len(raw) > stop - start:
                        break
        except httpx.HTTPError as error:
            raise FetchError(
                f"{file.name} of {name.repo} broke off in its header: {error or type(error).__name__}",
                means="The network or the hub went away.",
                do="Try again.",
            ) from error
        raw = raw[: stop - start + 1]
        if len(raw) <= stop - start:
            raise FetchError(
                f"{file.name} of {name.repo}: {len(raw)} of {stop - start + 1} header bytes arrived.", do="Try again."
            )
        return raw


def remote_config(files: RemoteFiles) -> dict[str, Any]:
    """The repository's config.json.

    Raises:
        BadInput: it has none. BadFile: it is no JSON object. FetchError: as ``RemoteFiles.read``.
    """
    file = next((file for file in files.repo.files if file.name == "config.json"), None)
    if file is None:
        raise BadInput(f"{files.repo.name.repo} has neither config.json nor GGUF files.", do="Name a language model.")
    try:
        value = json.loads(files.read(file, 0, min(file.size, 16 * MiB)))
    except ValueError as error:
        raise BadFile(
            f"config.json of {files.repo.name.repo} is no JSON: {error}", do="Try another revision."
        ) from error
    if not isinstance(value, dict):
        raise BadFile(f"config.json of {files.repo.name.repo} is no object.", do="Try another revision.")
    return value


def remote_safetensors(files: RemoteFiles, progress: Progress = silent) -> list[CheckpointTensor]:
    """Every tensor of the repository's checkpoint, from the headers of its shards.

    Raises:
        BadInput: no safetensors. BadFile: a header contradicts itself. FetchError: as ``RemoteFiles.read``.
    """
    shards = [file for file in hub.checkpoint_files(files.repo) if file.name.endswith(".safetensors")]
    tensors: list[CheckpointTensor] = []
    for number, shard in enumerate(shards):
        progress(f"reading the header of {shard.name}", number, len(shards))
        length = int.from_bytes(files.read(shard, 0, 8), "little")
        if length > min(shard.size - 8, MAX_HEADER):
            raise BadFile(
                f"{shard.name}: a header of {length} bytes in a file of {shard.size}.", do="Try another revision."
            )
        tensors += parse_safetensors_header(files.read(shard, 8, length), shard.name, shard.size - 8 - length)
    progress("headers read", len(shards), len(shards))
    return tensors


def remote_gguf(files: RemoteFiles, ggufs: tuple[hub.HubFile, ...], progress: Progress = silent) -> Model:
    """A model from the headers of its GGUF file or shards.

    Each header is put before a hole of the file's true size and read by the code that reads any file, so it is checked
    as strictly.

    Raises:
        BadFile: a header that contradicts itself. FetchError: as ``RemoteFiles.read``.
    """
    with tempfile.TemporaryDirectory(prefix="bitladder-header-") as folder:
        paths = [Path(folder) / file.name.split("/")[-1] for file in ggufs]
        got = 0
        while True:
            wanted = max(_STEP, 2 * got)
            for number, (file, path) in enumerate(zip(ggufs, paths, strict=True)):
                progress(f"reading the header of {file.name}", number, len(ggufs))
                have = min(got, file.size)
                raw = files.read(file, have, wanted - have)
                with path.open("r+b" if got else "wb") as sink:
                    sink.seek(have)
                    sink.write(raw)
                    sink.truncate(file.size)
            got = wanted
            try:
                model = read_header(paths[0])
            except BadFile:
                if got >= min(_MOST, max(file.size for file in ggufs)):
                    raise
                continue
            if model.header_bytes <= got * len(ggufs):
                progress("header read", 1, 1)
                return model


def offers(repo: hub.HubRepo) -> tuple[Offer, ...]:
    """The levels a repository has ready, largest first."""
    found = [
        Offer(hub.level_of(stem) or "?", stem.split("/")[-1], sum(file.size for file in files), len(files))
        for stem, files in hub.gguf_models(repo).items()
    ]
    return tuple(sorted(found, key=lambda offer: -offer.nbytes))


def offer_line(offer: Offer) -> str:
    """An offer for people."""
    parts = f" in {offer.files} files" if offer.files > 1 else ""
    return f"{offer.level}: {human_bytes(offer.nbytes)}{parts}"
