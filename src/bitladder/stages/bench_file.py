"""A bench's file: a model, rival files of it, and texts to measure on; every fault by its line.

    model: hf:org/name                            # what losses are relative to
    rivals:
      llama.cpp Q4_K_M: hf:org/name-GGUF:Q4_K_M   # the first one is what ratios are to
      ours: levels/name-bpw4.50.gguf
    texts:                                        # optional: the ones that ship
      wiki: wiki-test.txt
      code: [server.py, client.py]

Paths are relative to the file.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitladder.describe import criterion_values as values
from bitladder.describe.document import Document, shortened
from bitladder.errors import BadInput
from bitladder.files.documents import read_document
from bitladder.units import KiB

_LARGEST = 64 * KiB
MOST_RIVALS = 64


@dataclass(frozen=True)
class Bench:
    """What is compared."""

    model: str
    rivals: Mapping[str, str]
    """Name -> a path, or a name on the hub, as ``files.sources.resolve`` takes it."""
    texts: Mapping[str, tuple[Path, ...]]
    """Name -> files; none: the ones that ship."""


def read_bench(path: Path) -> Bench:
    """Read a bench's file.

    Raises:
        BadInput: it cannot be read, or has faults: all of them, each with its line.
    """
    document, top = read_document(path, _LARGEST, "a model, rivals and texts")
    if not isinstance(top, dict) or not {"model", "rivals"} <= set(top):
        raise BadInput(
            f"{path.name} lacks a model or rivals.", do="Write `model: FILE` and `rivals: {name: FILE, ...}`."
        )
    document.known(top, ("model", "rivals", "texts"))
    place = functools.partial(_place, folder=path.parent)
    model = document.attempt(lambda: document.read(place, top["model"], "model"))
    rivals = _each(document, top["rivals"], "rivals", place)
    texts = _each(document, top.get("texts") or {}, "texts", functools.partial(_files, folder=path.parent))
    document.check()
    return Bench(str(model), rivals, texts)


def _each(document: Document, plain: Any, name: str, read: Any) -> dict[str, Any]:
    """The values of a mapping by their names; faults are noted."""
    if not isinstance(plain, dict) or (not plain and name == "rivals") or len(plain) > MOST_RIVALS:
        do = f"Write a name and a place in each line, {MOST_RIVALS} at most."
        document.faults.append(document.fault(f"{name} must be places by their names.", name, do=do))
        return {}
    found = {}
    for key, value in plain.items():
        made = document.attempt(functools.partial(document.read, read, value, name, key))
        called = shortened(str(key))
        if called in found or not called.strip():
            document.faults.append(document.fault(f"each of {name} needs a name of its own.", name, key))
        elif made is not None:
            found[called] = made
    return found


def _place(value: Any, folder: Path) -> str:
    """A model or a rival: a file beside the bench's own by its path, anything else as it is."""
    text = values.a_string(value)
    return str(beside) if (beside := _beside(text, folder)) else text


def _files(value: Any, folder: Path) -> tuple[Path, ...]:
    named = value if isinstance(value, list) else [value]
    paths = []
    for text in map(values.a_string, named):
        if (path := _beside(text, folder)) is None:
            raise ValueError(f"names '{shortened(str(folder / text), 200)}', which is not there")
        paths.append(path)
    if not paths:
        raise ValueError("names no file")
    return tuple(paths)


def _beside(text: str, folder: Path) -> Path | None:
    """The file or folder that a bench means by a path; None where there is none, or there can be none."""
    try:
        path = folder / Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, of a user who is not known, with a zero byte
        return None
