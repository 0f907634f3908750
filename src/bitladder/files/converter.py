"""llama.cpp's converter of the very build that runs the files.

The source archive of the engine (``xllamacpp``) carries llama.cpp's ``convert_hf_to_gguf.py``, ``conversion/`` and
``gguf-py/``. It is fetched once for the installed version of the engine, from where this user's pip looks; the
converter alone is unpacked into the cache. So engine, converter and the architectures both know move together.
``BITLADDER_CONVERTER`` names another one: a checkout of llama.cpp or an archive that holds one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bitladder.errors import BadInput, FetchError, OutputError
from bitladder.files.atomic import put_in_place
from bitladder.files.engine_package import ENGINE, engine_version
from bitladder.files.folders import cache_folder
from bitladder.files.package_index import fetch_file, pip_settings
from bitladder.progress import Progress, silent

VARIABLE = "BITLADDER_CONVERTER"
ARCHIVES = {"2026.10.11549": "c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"}
"""SHA-256 of the source archives that Bitladder was tried with; of others the hash that the index states counts."""
MAX_ARCHIVE = 256 << 20
MAX_UNPACKED = 4 << 30
"""Bounds of an archive in bytes: as it comes, and of all its members together."""
MAX_CONVERTER = 64 << 20
"""Bound of the converter's own files in bytes (4 MB in 2026)."""
_OURS = re.compile(r"(?:.*/)?(convert_hf_to_gguf\.py|LICENSE|(?:conversion|gguf-py)/(?:\w[\w.-]*/)*\w[\w.-]*\.py)")
"""Members that are unpacked, from beneath whatever folder: only the group is used, which cannot hold ``..``."""


@dataclass(frozen=True)
class Converter:
    """A converter at hand."""

    folder: Path
    """Holds convert_hf_to_gguf.py, conversion/ and gguf-py/."""
    label: str
    """What it is, for messages."""

    @property
    def search_path(self) -> list[str]:
        """What its process imports from first."""
        return [str(self.folder), str(self.folder / "gguf-py")]

    def identity(self) -> str:
        """SHA-256 over its files: what it makes depends on them."""
        digest = hashlib.sha256()
        for path in sorted(self._files()):
            digest.update(f"\n{path.relative_to(self.folder).as_posix()} ".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def mentions(self, word: str) -> bool:
        """Its source has this word in quotes."""
        quoted = (f'"{word}"'.encode(), f"'{word}'".encode())
        return any(any(one in content for one in quoted) for content in map(Path.read_bytes, self._files()))

    def _files(self) -> list[Path]:
        folders = (self.folder / "conversion", self.folder / "gguf-py" / "gguf")
        return [self.folder / "convert_hf_to_gguf.py", *(path for at in folders for path in at.rglob("*.py"))]


def find_converter(progress: Progress = silent) -> Converter:
    """The converter: the one that ``BITLADDER_CONVERTER`` names, else the engine's own, fetched once (38 MB).

    Raises:
        BadInput: ``BITLADDER_CONVERTER`` names no converter.
        FetchError: the archive cannot be fetched, or is not what it should be.
        OutputError: the cache cannot be written.
    """
    if named := os.environ.get(VARIABLE):
        return _named(Path(named).expanduser())
    version = engine_version()
    if not version:
        raise FetchError(
            f"{ENGINE} is not installed, and a checkpoint is converted by its converter.",
            do=f"Install it (pip install {ENGINE}), name a checkout of llama.cpp in {VARIABLE}, or give a GGUF file.",
        )
    label = f"llama.cpp's converter of {ENGINE} {version}"
    folder = cache_folder("converter", f"{ENGINE}-{version}")
    if _complete(folder):
        return Converter(folder, label)
    known = ARCHIVES.get(version, "")
    progress(
        f"fetching {label} (once{'' if known else '; this version is not pinned, the index states its hash'})", 0, 1
    )
    with _scratch(folder) as scratch:
        try:
            archive = fetch_file(
                ENGINE,
                f"{ENGINE}-{version}.tar.gz",
                scratch,
                sha256=known,
                limit=MAX_ARCHIVE,
                settings=pip_settings(),
                progress=progress,
            )
        except FetchError as error:
            raise FetchError(
                f"llama.cpp's converter is not here, and cannot be fetched: {error.found}",
                means=f"It comes with the source archive of {ENGINE} {version}, fetched when it is first needed.",
                do="Check the connection and pip's settings (`pip config list`); or copy that archive or a checkout of "
                f"llama.cpp here and name its path in {VARIABLE}; or give a GGUF file.",
            ) from error
        _install(archive, folder, scratch)
    return Converter(folder, label)


def converter_at_hand() -> Converter | None:
    """The converter where it is here already; nothing is fetched or unpacked for it."""
    if named := os.environ.get(VARIABLE):
        path = Path(named).expanduser()
        return _named(path) if path.is_dir() and _complete(path) else None
    version = engine_version()
    folder = cache_folder("converter", f"{ENGINE}-{version}")
    return Converter(folder, f"llama.cpp's converter of {ENGINE} {version}") if version and _complete(folder) else None


def _named(path: Path) -> Converter:
    """The converter of a checkout, or of an archive, which is unpacked into the cache under its hash."""
    if path.is_dir():
        if not _complete(path):
            raise BadInput(
                f"{VARIABLE} names {path}, which holds no converter.",
                do="Name a checkout of llama.cpp: the folder with convert_hf_to_gguf.py, conversion and gguf-py.",
            )
        return Converter(path.resolve(), f"llama.cpp's converter in {path}")
    if not path.is_file():
        raise BadInput(
            f"{VARIABLE} names {path}, which does not exist.", do="Name a checkout of llama.cpp or an archive."
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder("converter", f"archive-{digest[:16]}")
    if not _complete(folder):
        with _scratch(folder) as scratch:
            _install(path, folder, scratch)
    return Converter(folder, f"llama.cpp's converter in {path.name}")


def _complete(folder: Path) -> bool:
    parts = ("convert_hf_to_gguf.py", "conversion/__init__.py", "gguf-py/gguf/__init__.py")
    return all((folder / part).is_file() for part in parts)


def _install(archive: Path, folder: Path, scratch: Path) -> None:
    """Unpack the converter aside and rename it into place; another process may be faster."""
    fresh = scratch / "converter"
    _unpack(archive, fresh)
    if not _complete(fresh):
        raise FetchError(
            f"{archive.name} holds no converter of llama.cpp.",
            means="It needs convert_hf_to_gguf.py, conversion and gguf-py beside one another.",
            do=f"Name a checkout of llama.cpp in {VARIABLE}, or give a GGUF file.",
        )
    try:
        put_in_place(fresh, folder)
    except OSError:
        if not _complete(folder):
            raise


def _unpack(archive: Path, target: Path) -> None:
    """Write the converter's files. Only regular files of names that we know are written, under paths that we make, so
    links, devices, owners and modes of an archive have no effect (this is stricter than tarfile's data filter).
    """
    whole = kept = 0
    try:
        with tarfile.open(archive, "r|*") as members:
            for member in members:
                whole += member.size
                found = _OURS.fullmatch(member.name)
                if whole > MAX_UNPACKED:
                    raise tarfile.TarError(f"more than {MAX_UNPACKED} bytes")
                if not member.isreg() or found is None:
                    continue
                kept += member.size
                source = members.extractfile(member)
                if kept > MAX_CONVERTER or source is None:
                    raise tarfile.TarError(f"more than {MAX_CONVERTER} bytes of converter")
                path = target / found[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    shutil.copyfileobj(source, file)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise FetchError(
            f"{archive.name} cannot be unpacked: {error}",
            means="It is no archive, or was cut on its way.",
            do="Fetch it again.",
        ) from error


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for unfinished work beside ``folder``; failures of the disk are OutputErrors."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise OutputError(
            f"The converter cannot be kept in {folder}: {error.strerror or error}",
            do="Free some space, or choose another folder with BITLADDER_CACHE.",
        ) from error
