"""What exports must know of this machine: how Bitladder is started here, who may read its files, and what an image of
it can be built from.
"""

from __future__ import annotations

import json
import re
import stat
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import bitladder
from bitladder import system
from bitladder.errors import BadInput, UsageError

_WHEEL = re.compile(r"bitladder-[\w.+]+(-[\w.]+)?-[\w.]+-[\w.]+-[\w.]+\.whl")
_CHECKOUT_FILES = ("pyproject.toml", "README.md", "LICENSE", "constraints.txt")


@dataclass(frozen=True)
class Owner:
    """A user of this machine."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True)
class ImageSource:
    """What an image is built from: files and folders of ``context``, of which ``install`` is given to pip."""

    context: Path
    files: tuple[str, ...]
    folders: tuple[str, ...]
    install: str


def program() -> list[str]:
    """The words that start this very Bitladder from any folder and without a search path."""
    return [sys.executable, "-m", "bitladder"]


def own_files() -> list[Path]:
    """What must be readable to start it: the interpreter, and the package."""
    return [Path(sys.executable), Path(bitladder.__file__)]


def reader_of(paths: Iterable[Path]) -> Owner | None:
    """Who must read these files: None when everyone may, else the user who runs this."""
    if all(_everyone_reads(one) for path in paths for one in {path.absolute(), path.resolve()}):
        return None
    found = system.user()
    return Owner(*found) if found else None


def _everyone_reads(path: Path) -> bool:
    try:
        reads = bool(path.stat().st_mode & stat.S_IROTH)
        return reads and all(folder.stat().st_mode & stat.S_IXOTH for folder in path.parents)
    except OSError:
        return False


def image_source(given: Path | None = None) -> ImageSource:
    """What to build an image from: the wheel or checkout that is named, else the checkout that this runs from, else the
    wheel or folder that pip installed it from (PEP 610).

    Raises:
        UsageError: what is named is neither; or nothing is named, and nothing is at hand.
    """
    if given is not None:
        found = _source_at(given.absolute())
        if found is None:
            raise BadInput(
                f"'{given}' is neither a wheel nor a checkout of Bitladder.",
                do="Name bitladder-VERSION-py3-none-any.whl, or the folder that holds its pyproject.toml.",
            )
        return found
    places = [Path(bitladder.__file__).resolve().parents[2], _installed_from()]
    for place in places:
        found = _source_at(place) if place is not None else None
        if found is not None:
            return found
    raise UsageError(
        "There is nothing here that an image of Bitladder could be built from.",
        means="It was installed from an index or from a file that is gone, and a container needs a copy of its own.",
        do="Name the wheel or the checkout with --from.",
    )


def _source_at(place: Path) -> ImageSource | None:
    if _WHEEL.fullmatch(place.name) and place.is_file():
        return ImageSource(place.parent, (place.name,), (), f"./{place.name}")
    if (place / "src" / "bitladder" / "__init__.py").is_file() and _project_name(place) == "bitladder":
        files = tuple(name for name in _CHECKOUT_FILES if (place / name).is_file())
        return ImageSource(place, files, ("src",), ".")
    return None


def _project_name(folder: Path) -> str:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project")
    except (OSError, ValueError):
        return ""
    return str(project.get("name", "")) if isinstance(project, dict) else ""


def _installed_from() -> Path | None:
    """The wheel or folder that pip was given."""
    try:
        recorded = json.loads(metadata.distribution("bitladder").read_text("direct_url.json") or "{}")
        parts = urlsplit(str(recorded.get("url", "")))
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    return Path(unquote(parts.path)) if parts.scheme == "file" else None
