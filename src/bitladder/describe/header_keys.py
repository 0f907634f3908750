"""Numbers of a GGUF header under its architecture's prefix (``<architecture>.<name>``), checked when they are read.

Headers come from strangers: a text, an infinity or a list of lists may stand where a number belongs, and a number of
layers may be two billion. Whoever plans reads through this, so what is wrong is one error that names the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitladder.errors import BadFile

LARGEST = 1 << 31
"""Bound of every number, exclusive."""


class HeaderKeys:
    """The keys of one architecture.

    Raises:
        BadFile: from whatever is asked, where the key holds something else than it should.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata = metadata
        self.prefix = architecture + "."

    def raw(self, name: str) -> Any:
        """The value as it is, None when the key is missing."""
        return self.metadata.get(self.prefix + name)

    def number(self, name: str, default: int | None = None, *, smallest: int = 0, largest: int = LARGEST - 1) -> int:
        """A whole number; of a list, which some families have per layer, the largest. ``default`` None: it must be
        there.
        """
        value = self.raw(name)
        if value is None:
            if default is not None:
                return default
            raise self._fault(name, "is missing")
        if isinstance(value, list) and value:
            value = max(self._whole(name, item, 0, largest) for item in value)
        return self._whole(name, value, smallest, largest)

    def per_layer(self, name: str, n_layer: int, default: int) -> list[int]:
        """A number for each layer: the list's, or the same for all."""
        value = self.raw(name)
        if isinstance(value, list) and len(value) >= n_layer:
            return [self._whole(name, item, 0, LARGEST - 1) for item in value[:n_layer]]
        return [self.number(name, default)] * n_layer

    def _whole(self, name: str, value: Any, smallest: int, largest: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
            beyond = isinstance(value, int) and value > largest
            bounds = f"from {smallest} to {largest}" if beyond else f"from {smallest} up"
            raise self._fault(name, f"is {repr(value)[:60]}, not a number {bounds}")
        return value

    def _fault(self, name: str, found: str) -> BadFile:
        return BadFile(
            f"The key '{self.prefix}{name}' {found}.",
            means="The header was written by an unfinished conversion, or is damaged.",
            do="Convert the model again from its original checkpoint.",
        )
