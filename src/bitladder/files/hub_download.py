"""Large files from the hub into its client's cache, going on where a broken download stopped.

The client (huggingface_hub 2) throws a partial file away when a download fails or the process ends: twenty gigabytes
on a slow line would begin again. So large files are fetched here by HTTP ranges into a partial file beside the place
where the client looks for a finished one, checked against the hash that the hub names, and renamed; the client then
finds the file and fetches nothing.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from io import BufferedRandom
from pathlib import Path
from typing import Any

import httpx

from bitladder.errors import FetchError, OutputError
from bitladder.files.atomic import put_in_place
from bitladder.files.hub import HubFile, HubRepo, endpoint, hub_errors
from bitladder.progress import Progress
from bitladder.system import lock_alone
from bitladder.units import human_bytes

RESUMED_FROM = 1_000_000
"""Bytes from which a file is worth going on with."""
_TRIES = 5
"""In a row without a single new byte."""
_TIMEOUT_S = 30.0


def fetch(repo: HubRepo, files: tuple[HubFile, ...], progress: Progress) -> list[Path]:
    """Bring files into the hub's own cache (resuming what is there in part) and return their paths.

    Raises:
        BadInput: as ``list_repo``.
        FetchError: the connection broke; what has arrived is kept and the next try goes on from there.
        OutputError: the cache cannot be written.
    """
    from huggingface_hub import hf_hub_download

    total = sum(file.size for file in files)
    done, paths = 0, []
    for file in files:
        what = f"fetching {file.name} ({human_bytes(file.size)})"
        progress(what, done, total)
        _prepare(repo, file, _shifted(progress, what, done, total))
        with hub_errors(repo.name):
            path = hf_hub_download(
                repo.name.repo,
                file.name,
                revision=repo.commit,
                endpoint=endpoint(),
                tqdm_class=_bar(progress, what, done, total),
            )
        done += file.size
        paths.append(Path(path))
    progress(f"fetched {repo.name.repo}", total, total)
    return paths


def _shifted(progress: Progress, what: str, before: int, total: int) -> Callable[[int], None]:
    """Bytes of one file as a part of all."""
    return lambda have: progress(what, before + have, total)


def _prepare(repo: HubRepo, file: HubFile, arrived: Callable[[int], None]) -> None:
    """Look at what the hub calls a file, and fetch it if it is large, unless the client has it already; without a
    network the client says what there is to say.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cache = Path(constants.HF_HUB_CACHE)
    cached = try_to_load_from_cache(repo.name.repo, file.name, revision=repo.commit, cache_dir=cache)
    if isinstance(cached, str) or constants.HF_HUB_OFFLINE:
        return
    try:
        fetch_blob(repo, file, cache, arrived)
    except OSError as error:
        raise OutputError(
            f"{cache} cannot be written: {error.strerror or error}.",
            do="Put the hub's cache elsewhere: HF_HUB_CACHE=/path.",
        ) from error


def fetch_blob(repo: HubRepo, file: HubFile, cache: Path, arrived: Callable[[int], None]) -> None:
    """Bring a file, if it is large, into the client's cache, under the name by which the client will find it.

    Args:
        repo: at its commit.
        file: one of its files, of ``RESUMED_FROM`` bytes or more; of a smaller one the hash's spelling alone is
            checked, since the client makes a file's name of whatever is sent as its hash.
        cache: the client's cache folder.
        arrived: told how many bytes of the file are here.

    Raises:
        BadInput: the hub refuses. FetchError: the connection broke, and what has arrived is kept; or the file arrived
            with another hash, and was removed.
        OSError: the cache cannot be written.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name

    with hub_errors(repo.name):
        url = hf_hub_url(repo.name.repo, file.name, revision=repo.commit, endpoint=endpoint())
        told = get_hf_file_metadata(url, endpoint=endpoint())
    etag, size = str(told.etag or ""), told.size
    if not re.fullmatch(r"[A-Za-z0-9_-]{8,128}", etag):
        raise FetchError(f"{endpoint()} names {file.name} by what is no hash: '{etag[:80]}'.", do="Use another mirror.")
    if size != file.size or size < RESUMED_FROM:
        return  # the client fetches it
    blob = cache / repo_folder_name(repo_id=repo.name.repo, repo_type="model") / "blobs" / etag
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}  # httpx drops it when sent to another host
    part = blob.with_name(f"{etag}.part")
    with part.open("a+b") as sink, httpx.Client(headers=headers, follow_redirects=True, timeout=_TIMEOUT_S) as client:
        _claim(sink, file.name)
        _all_ranges(client, url, sink, size, arrived)
        _check(sink, part, etag, file.name)
    put_in_place(part, blob)


def _claim(sink: BufferedRandom, name: str) -> None:
    """This process alone writes the partial file; raises FetchError where another one does."""
    if not lock_alone(sink.fileno()):
        raise FetchError(f"Another process is fetching {name} just now.", do="Wait for it, or end it.")


def _all_ranges(
    client: httpx.Client, url: str, sink: BufferedRandom, size: int, arrived: Callable[[int], None]
) -> None:
    """Ask for what is missing until nothing is."""
    idle = 0
    sink.seek(0, 2)
    if sink.tell() > size:
        sink.truncate(0)
    while (have := sink.seek(0, 2)) < size:
        arrived(have)
        try:
            _one_range(client, url, sink, have, size, arrived)
            problem = "it ended early"
        except httpx.HTTPError as error:
            problem = str(error) or type(error).__name__
        if sink.seek(0, 2) > have:
            idle = 0
            continue
        idle += 1
        if idle >= _TRIES:
            raise FetchError(
                f"The download of {url} broke off at {have} of {size} bytes: {problem}",
                means="The network is down, a proxy is in between, or the hub is another one (HF_ENDPOINT).",
                do="Try again: what has arrived is kept, and the same command goes on from there.",
            )
        time.sleep(1.0)
    arrived(size)


def _one_range(
    client: httpx.Client, url: str, sink: BufferedRandom, have: int, size: int, arrived: Callable[[int], None]
) -> None:
    """One request, written as it comes; what a server sends beyond the file is left aside."""
    wanted = {"Range": f"bytes={have}-{size - 1}", "Accept-Encoding": "identity"}
    with client.stream("GET", url, headers=wanted) as response:
        response.raise_for_status()
        if response.status_code == 200 and have:  # no ranges there: from the start
            sink.truncate(0)
            have = 0
        for chunk in response.iter_raw():
            sink.write(chunk[: size - have])
            have = min(size, have + len(chunk))
            arrived(have)
            if have == size:
                break
        sink.flush()


def _check(sink: BufferedRandom, part: Path, etag: str, name: str) -> None:
    """The file's hash is what the hub named, where it names one that can be computed from the file alone."""
    if not re.fullmatch(r"[0-9a-f]{64}", etag):
        return
    sink.flush()
    with part.open("rb") as written:
        found = hashlib.file_digest(written, "sha256").hexdigest()
    if found != etag:
        part.unlink(missing_ok=True)
        raise FetchError(
            f"{name} arrived with the hash {found[:16]}..., and the hub names {etag[:16]}...",
            means="It was damaged on the way, or changed there meanwhile.",
            do="Try again: it was removed.",
        )


def _bar(progress: Progress, what: str, before: int, total: int) -> type[Any]:
    """The hub client reports through a class like tqdm; this one passes each step on to ``progress``."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """Draws nothing; tells how many bytes of all have arrived."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)
            self._arrived = float(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self._arrived += n or 0
            progress(what, before + self._arrived, total)
            return None

    return Bar
