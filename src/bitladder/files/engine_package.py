"""Packages as they are installed, without importing them: the engine's version and the architectures that it knows,
the types of models that transformers has.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import mmap
import re
from pathlib import Path

ENGINE = "xllamacpp"
KNOWN_BUILDS = ("2026.10.11549",)
"""Versions of the wheel whose llama.h and ggml.h the structures in ``engines/llama_library.py`` are written from."""


def engine_version() -> str:
    """Version of the installed engine, without a local part (``+cu128``); empty when there is none."""
    try:
        return importlib.metadata.version(ENGINE).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def library_missing() -> str:
    """Why llama.cpp's functions in the wheel cannot be called from here; empty where they can."""
    version = engine_version()
    if not version:
        return f"{ENGINE}, which carries llama.cpp, is not installed"
    if version not in KNOWN_BUILDS:
        return f"the structures of {ENGINE} {version} are not known here (known: {', '.join(KNOWN_BUILDS)})"
    return ""


@functools.cache
def engine_knows(architecture: str) -> bool | None:
    """Whether llama.cpp, as the installed engine has it, knows ``general.architecture``; None where no engine is.

    A table of names is compiled into the library as plain strings. A short word may stand there for another reason, so
    True is a guess on the generous side, and False is certain.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{1,63}", architecture):
        return False
    libraries = engine_libraries()
    if not libraries:
        return None
    return any(_holds(library, architecture.encode() + b"\0") for library in libraries)


@functools.cache
def transformers_has(model_type: str) -> bool:
    """Whether the installed transformers has models of this type of its own; it is not imported."""
    spec = importlib.util.find_spec("transformers")
    places = (spec.submodule_search_locations if spec else None) or ()
    name = re.sub("_text$", "", model_type.replace("-", "_"))
    return bool(re.fullmatch(r"\w{1,64}", name)) and any((Path(place) / "models" / name).is_dir() for place in places)


@functools.cache
def engine_libraries() -> tuple[Path, ...]:
    """Shared libraries in the engine's package; none where it is not installed."""
    spec = importlib.util.find_spec(ENGINE)
    places = (spec.submodule_search_locations if spec else None) or ()
    return tuple(path for place in places for path in sorted(Path(place).glob("*.so")))


def _holds(library: Path, text: bytes) -> bool:
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(text) >= 0
    except (OSError, ValueError):
        return False
