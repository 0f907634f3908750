"""The examples that come with Bitladder: beside a checkout's sources, or where pip puts a wheel's data."""

from __future__ import annotations

import shutil
import sysconfig
from importlib import metadata
from pathlib import Path

import bitladder
from bitladder.errors import BadInput, OutputError

_FOLDER = "share/bitladder/examples"


def examples_folder() -> Path:
    """Where the examples lie.

    Raises:
        BadInput: they were left out of this installation.
    """
    checkout = Path(bitladder.__file__).resolve().parents[2]
    places = [checkout / "examples"] if (checkout / "pyproject.toml").is_file() else []
    places += [*_of_the_wheel(), Path(sysconfig.get_path("data")) / _FOLDER]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise BadInput("This installation has no examples.", do="Install the wheel, or take them from the repository.")
    return found


def _of_the_wheel() -> list[Path]:
    """The folder that the installed files are recorded in: with ``pip install --user`` or ``--prefix`` not the
    interpreter's own."""
    try:
        files = metadata.files("bitladder") or []
    except metadata.PackageNotFoundError:
        return []
    inside = (Path(str(file.locate())) for file in files if file.as_posix().endswith(f"{_FOLDER}/README.md"))
    return [path.resolve().parent for path in inside]


def copy_examples(target: Path) -> list[Path]:
    """Copy the examples into a folder that is not there yet; returns the files.

    Raises:
        BadInput: there are none.
        OutputError: the folder exists, or cannot be written.
    """
    source = examples_folder()
    try:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    except FileExistsError:
        raise OutputError(f"{target} exists already.", do="Name another folder.") from None
    except (OSError, shutil.Error) as error:
        raise OutputError(f"{target} cannot be written: {error}.", do="Name another folder.") from error
    return sorted(path for path in target.rglob("*") if path.is_file())
