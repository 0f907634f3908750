"""Whether two names mean one model: the name that was asked for, and the one that an engine answers with."""

from __future__ import annotations

import re

_VERSION = re.compile(r"-\d{4}(-?\d{2}){0,2}|-\d{2}-\d{2}(\d{2})?|-\d{3}|:latest")
"""What services add to a name: ``-2026-01-31``, ``-20260131``, ``-0131``, ``-01-31``, ``-01-2026``, ``-002``,
``:latest``. A single or double digit is a model's own (``gpt-4`` and ``gpt-4-1``).
"""


def same_model(wanted: str, served: str) -> bool:
    """Whether a served name is the wanted one: equal, or with a date, a revision or ``:latest`` added.

    Case and a file's ``.gguf`` do not count, nor does the publisher (``org/name``) where only one of them names it,
    nor the folders of a path.
    """
    (publisher, name), (other, answered) = _parts(wanted), _parts(served)
    if publisher and other and publisher != other:
        return False
    return answered == name or (answered.startswith(name) and _VERSION.fullmatch(answered[len(name) :]) is not None)


def _parts(name: str) -> tuple[str, str]:
    """Publisher, empty where none is named, and the model's own name."""
    folders, _, own = name.lower().rpartition("/")
    stem = own.removesuffix(".gguf")
    is_path = "/" in folders or name.startswith(("/", ".")) or stem != own or folders == "models"
    return "" if is_path else folders, stem
