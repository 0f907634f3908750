"""One file of a package, from wherever this user's pip would look, without pip building or running anything of it.

``pip download`` of a source archive runs the archive's build script for its metadata. So pip is only asked for its
settings; the page of the package (PEP 503 in HTML, PEP 691 in JSON) or the folder is read here. Honoured are
``index-url``, ``extra-index-url``, ``find-links``, ``no-index``, ``cert``, ``client-cert``, ``proxy``,
``trusted-host``, ``timeout``, the proxy variables of the environment, names and passwords in addresses and in
``.netrc``; keyring is not.
"""

from __future__ import annotations

import ast
import hashlib
import html.parser
import json
import netrc
import os
import shutil
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder.errors import FetchError
from bitladder.progress import Progress, silent

if TYPE_CHECKING:
    import httpx

PUBLIC_INDEX = "https://pypi.org/simple"
MAX_PAGE = 64 << 20
"""Upper bound of a package's page in bytes."""


@dataclass(frozen=True)
class PipSettings:
    """The settings of pip that say where packages come from."""

    indexes: tuple[str, ...] = (PUBLIC_INDEX,)
    find_links: tuple[str, ...] = ()
    cert: str = ""
    client_cert: str = ""
    proxy: str = ""
    trusted: frozenset[str] = frozenset()
    timeout_s: float = 15.0


@dataclass(frozen=True)
class Link:
    """A file that an index or a folder offers; ``sha256`` as it states it, else empty; ``found_on`` for credentials."""

    url: str
    sha256: str
    found_on: str


def pip_settings() -> PipSettings:
    """What ``pip config list`` prints, the environment included; pip's own defaults where there is no pip."""
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return parse_settings(done.stdout if done.returncode == 0 else "")


def parse_settings(listed: str) -> PipSettings:
    """The settings in the output of ``pip config list``: lines ``section.key='value'``."""
    values: dict[tuple[str, str], str] = {}
    for line in listed.splitlines():
        name, _, text = line.partition("=")
        section, _, key = name.strip().rpartition(".")
        with suppress(ValueError, SyntaxError):
            values[section, key] = str(ast.literal_eval(text.strip()))

    def get(key: str) -> str:
        """The environment first, then the section of the command, then the general one."""
        return next(
            (values[section, key] for section in (":env:", "download", "global") if (section, key) in values), ""
        )

    indexes = (
        () if get("no-index").lower() in ("1", "true", "yes", "on") else _words(get("index-url")) or (PUBLIC_INDEX,)
    )
    extra = _words(get("extra-index-url")) if indexes else ()
    timeout = get("timeout") or get("default-timeout")
    return PipSettings(
        indexes=(*indexes, *extra),
        find_links=_words(get("find-links")),
        cert=get("cert") or os.environ.get("REQUESTS_CA_BUNDLE", "") or os.environ.get("CURL_CA_BUNDLE", ""),
        client_cert=get("client-cert"),
        proxy=get("proxy"),
        trusted=frozenset(_words(get("trusted-host"))),
        timeout_s=float(timeout) if timeout.replace(".", "", 1).isdigit() else 15.0,
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def fetch_file(
    package: str,
    name: str,
    folder: Path,
    *,
    sha256: str,
    limit: int,
    settings: PipSettings,
    progress: Progress = silent,
) -> Path:
    """Bring one file of a package into ``folder``; its hash is right, or it is not there.

    Args:
        package: Normalized name of the package.
        name: The file's name.
        folder: Where to put it.
        sha256: The hash it must have; empty: the one that the index states, which must state one then.
        limit: Upper bound in bytes.
        settings: Where to look.
        progress: Hears how many bytes have come.

    Raises:
        FetchError: it is nowhere, cannot be fetched, or its hash differs.
        OSError: ``folder`` cannot be written.
    """
    refused: list[str] = []
    for location, is_index in (*((at, False) for at in settings.find_links), *((at, True) for at in settings.indexes)):
        try:
            link = _find(location, is_index, package, name, settings)
            if link is None:
                refused.append(f"{_shown(location)} does not have it")
                continue
            expected = sha256 or link.sha256
            if not expected:
                refused.append(f"{_shown(location)} has it without a SHA-256")
                continue
            path = folder / name
            _bring(link, path, limit, settings, progress)
        except FetchError as error:
            refused.append(error.found)
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == expected:
            return path
        path.unlink()
        refused.append(f"{_shown(location)} has it with SHA-256 {found[:16]}..., expected {expected[:16]}...")
    raise FetchError(f"{name} was not found where pip looks: {'; '.join(refused) or 'no index is set'}.")


def _find(location: str, is_index: bool, package: str, name: str, settings: PipSettings) -> Link | None:
    """The file's link on a package's page, on a page of links, or in a folder."""
    if location.startswith(("http://", "https://")):
        url = f"{location.rstrip('/')}/{package}/" if is_index else location
        with _request(url, location, settings) as response:
            page = b"".join(_bounded(response.iter_bytes(), MAX_PAGE, url))
            return _on_page(page, response.headers.get("content-type", ""), str(response.url), name, location)
    folder = _local(location) / package if is_index else _local(location)
    if (folder / name).is_file() and not is_index:
        return Link((folder / name).absolute().as_uri(), "", location)
    page_file = folder / "index.html" if folder.is_dir() else folder
    if not page_file.is_file():
        return None
    try:
        return _on_page(page_file.read_bytes(), "text/html", page_file.absolute().as_uri(), name, location)
    except OSError as error:
        raise FetchError(f"{page_file} cannot be read: {error.strerror}") from error


def _on_page(page: bytes, content_type: str, url: str, name: str, location: str) -> Link | None:
    """The link to a file of this name on a page of an index."""
    if "json" in content_type:
        links = _json_links(page)
    else:
        reader = _Anchors()
        reader.feed(page.decode("utf-8", errors="replace"))
        links = reader.found
    for href, sha256 in links:
        target, fragment = urllib.parse.urldefrag(urllib.parse.urljoin(url, href))
        if urllib.parse.unquote(target.rpartition("/")[2]) != name:
            continue
        if url.startswith("http") and not target.startswith("http"):  # a page cannot name files of this machine
            continue
        algorithm, _, digest = fragment.partition("=")
        return Link(target, sha256 or (digest if algorithm == "sha256" else ""), location)
    return None


def _json_links(page: bytes) -> list[tuple[str, str]]:
    try:
        files = json.loads(page)["files"]
        return [(str(file["url"]), str(file.get("hashes", {}).get("sha256", ""))) for file in files]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FetchError(f"an index answered with a page that is none ({type(error).__name__})") from error


class _Anchors(html.parser.HTMLParser):
    """Every ``<a href>`` of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See ``HTMLParser``."""
        if tag == "a":
            self.found += [(value, "") for key, value in attrs if key == "href" and value]


def _bring(link: Link, path: Path, limit: int, settings: PipSettings, progress: Progress) -> None:
    """Copy or download what a link names."""
    if not link.url.startswith("http"):
        source = _local(link.url)
        try:
            size = source.stat().st_size
        except OSError as error:
            raise FetchError(f"{source} cannot be read: {error.strerror}") from error
        if size > limit:
            raise FetchError(f"{source} has {size} bytes, more than {limit}")
        shutil.copyfile(source, path)
        return
    with _request(link.url, link.found_on, settings) as response, path.open("wb") as file:
        total = int(response.headers.get("content-length") or 0)
        for chunk in _bounded(response.iter_bytes(), limit, link.url):
            file.write(chunk)
            progress(f"fetching {path.name}", file.tell(), max(total, file.tell()))


def _bounded(chunks: Iterator[bytes], limit: int, url: str) -> Iterator[bytes]:
    """The chunks of an answer, up to a limit."""
    count = 0
    for chunk in chunks:
        count += len(chunk)
        if count > limit:
            raise FetchError(f"{_shown(url)} sent more than {limit} bytes")
        yield chunk


@contextmanager
def _request(url: str, location: str, settings: PipSettings) -> Iterator[httpx.Response]:
    """An answer with status 200, with pip's certificates, proxy and credentials; every failure is a FetchError."""
    import httpx

    accept = (
        "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1, */*;q=0.01"
    )
    options: dict[str, Any] = {"proxy": settings.proxy} if settings.proxy else {}
    try:
        with (
            httpx.Client(
                verify=_verification(url, settings), follow_redirects=True, timeout=settings.timeout_s, **options
            ) as client,
            client.stream("GET", url, headers={"Accept": accept}, auth=_credentials(url, location)) as response,
        ):
            if response.status_code != 200:
                raise FetchError(f"{_shown(url)} answered {response.status_code}")
            yield response
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, ValueError) as error:
        raise FetchError(f"{_shown(url)}: {str(error) or type(error).__name__}") from error


def _verification(url: str, settings: PipSettings) -> ssl.SSLContext | bool:
    """Certificates: pip's own setting, else those of the HTTP client; none for hosts that pip is told to trust."""
    parts = urllib.parse.urlsplit(url)
    if settings.trusted & {parts.hostname, parts.netloc.rpartition("@")[2]}:
        return False
    if not settings.cert and not settings.client_cert:
        return True
    try:
        where = Path(settings.cert) if settings.cert else None
        context = ssl.create_default_context(
            cafile=str(where) if where and where.is_file() else None,
            capath=str(where) if where and where.is_dir() else None,
        )
        if settings.client_cert:
            context.load_cert_chain(settings.client_cert)
    except OSError as error:
        raise FetchError(f"pip's certificates cannot be read: {error}") from error
    return context


def _credentials(url: str, location: str) -> tuple[str, str] | None:
    """Name and password for an address: its own, those of the index on the same host, or those in .netrc."""
    parts, index = urllib.parse.urlsplit(url), urllib.parse.urlsplit(location)
    for part in (parts, index):
        if part.username is not None and part.hostname == parts.hostname:
            return urllib.parse.unquote(part.username), urllib.parse.unquote(part.password or "")
    with suppress(OSError, netrc.NetrcParseError, RuntimeError):
        entry = netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname or "")
        if entry is not None:
            return entry[0], entry[2] or ""
    return None


def _local(location: str) -> Path:
    """The path of a ``file:`` address, or of what is none."""
    if location.startswith("file:"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(location).path))
    return Path(location).expanduser()


def _shown(location: str) -> str:
    """An address for a message: without name and password."""
    parts: Sequence[str] = urllib.parse.urlsplit(location)
    host = parts[1].rpartition("@")[2]
    return urllib.parse.urlunsplit((parts[0], host, *parts[2:])) if parts[1] else location
