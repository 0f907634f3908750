"""Files of settings that a user writes: YAML with the line of every value, so that each fault is told by its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitladder import unicode
from bitladder.describe.document import Document
from bitladder.describe.structured import Fault, read_yaml
from bitladder.errors import BadInput


def read_document(path: Path, largest: int, holds: str) -> tuple[Document, Any]:
    """A file's document, and its plain values.

    Args:
        path: It.
        largest: Bytes that it may have.
        holds: What such a file is of, as words of a message.

    Raises:
        BadInput: it cannot be read, is too large, or is no YAML: with the line where that is known.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(largest + 1)
        text = unicode.decoded(raw)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}.", do="Check the path."
        ) from None
    if len(raw) > largest:
        raise BadInput(f"'{path}' has more than {largest} bytes.", do=f"Give a file of {holds}.")
    try:
        read = read_yaml(text)
    except Fault as fault:
        raise BadInput(f"{path.name}, line {fault.line}: {fault.found}", do=fault.do) from None
    return Document(path.name, read, BadInput), read.plain
