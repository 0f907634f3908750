"""Texts from disk: the ones that ship with the package, and the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from bitladder import json_text, unicode
from bitladder.describe.seed import Seed
from bitladder.describe.text import Document, told_apart
from bitladder.errors import BadInput
from bitladder.units import MiB, human_bytes

_LARGEST = 256 * MiB


def shipped_texts(folder: str = "texts") -> list[Document]:
    """Documents that ship with the package, by name: ``texts`` to measure on, ``calibration`` to calibrate on and
    ``calibration/wide``, which is more of that."""
    files = (resources.files("bitladder") / "data" / folder).iterdir()
    return [
        Document(file.name.removesuffix(".txt"), file.read_text(encoding="utf-8"))
        for file in sorted(files, key=lambda one: one.name)
        if file.name.endswith(".txt")
    ]


@cache
def shipped_seeds() -> tuple[Seed, ...]:
    """What models are asked when they write their own calibration text, as it ships."""
    import yaml  # here, because most jobs need none

    text = resources.files("bitladder").joinpath("data/calibration/seeds.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    tools = {name: {"type": "function", "function": {"name": name, **one}} for name, one in loaded["tools"].items()}
    return tuple(
        Seed(
            name=one["name"],
            ask=(one["ask"],) if isinstance(one["ask"], str) else tuple(one["ask"]),
            begin=one["begin"],
            system=one.get("system", ""),
            tools=tuple(tools[name] for name in one.get("tools", ())),
            script=one.get("script", "Latin"),
        )
        for one in loaded["seeds"]
    )


def read_texts(paths: Sequence[Path]) -> list[Document]:
    """The user's documents: each file is one, a folder gives its ``.txt`` files, a ``.jsonl`` file one document a line.

    Raises:
        BadInput: a file is missing, no UTF-8 text, or JSON lines without a ``text`` each; or there is no text at all.
    """
    documents = told_apart(document for path in paths for document in _read(path))
    if not any(document.text.strip() for document in documents):
        raise BadInput(
            f"There is no text in {', '.join(map(str, paths))}.",
            do="Give a file with some prose or code in it.",
        )
    return documents


def _read(path: Path) -> Iterator[Document]:
    if path.is_dir():
        for file in sorted(path.glob("*.txt")):
            yield Document(file.stem, _text(file))
    elif path.suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(unicode.lines(_text(path)), 1):
            if line.strip():
                yield Document(f"{path.stem}:{number}", _text_field(path, number, line))
    else:
        kind = path.suffix.removeprefix(".")
        yield Document(path.stem, _text(path), kind if kind not in ("txt", "md") else "")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise BadInput(
                f"{path} has more than {human_bytes(_LARGEST)}.",
                means="Some thousand tokens are measured or calibrated on.",
                do="Give a part of it.",
            )
        return unicode.decoded(raw).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is no UTF-8 text: byte {error.start} cannot be read.",
            means="It is a binary file, or text in another encoding.",
            do="Save it as UTF-8.",
        ) from None
    except OSError as error:
        raise BadInput(f"The text {path} cannot be read: {error.strerror or error}.", do="Check the path.") from None


def _text_field(path: Path, number: int, line: str) -> str:
    try:
        text = json_text.read(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise BadInput(
            f'{path}, line {number} is no JSON object with a "text".',
            do='Write one document a line: {"text": "..."}.',
        )
    if unicode.half_character(text) is not None:
        raise BadInput(
            f"{path}, line {number}: the text holds half of a surrogate pair, which is no character.",
            means="It was cut inside a character.",
            do="Remove the escape \\ud800 to \\udfff that stands alone.",
        )
    return text
