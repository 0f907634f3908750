"""A document of somebody's, read to plain values, with the faults found in it: each with its line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from bitladder.describe.structured import Fault, Read, Where
from bitladder.errors import BadInput, BadWorkload

T = TypeVar("T")
_MOST_SHOWN = 20
"""Faults that one message lists."""
LONGEST_TEXT = 4_000_000
"""Characters of a message with its variables filled in: a few lines can ask for one file a thousand times."""


class Document:
    """A parsed file: plain values with the line of each, and the faults found so far."""

    def __init__(self, source: str, read: Read, error: type[BadInput] = BadWorkload) -> None:
        self.source = source
        self.error = error
        self.lines = read.lines
        self.faults = list(read.faults)

    def line(self, *path: str | int) -> int:
        """The line of the value at a path, or of the nearest thing around it."""
        return line_of(self.lines, path)

    def fault(self, found: str, *path: str | int, do: str = "") -> Fault:
        """A fault at a path, to be raised."""
        return Fault(found, self.line(*path), do)

    def attempt(self, read: Callable[[], T]) -> T | None:
        """What is read, or None when a fault was found in it, which is kept."""
        try:
            return read()
        except Fault as fault:
            self.faults.append(fault)
            return None

    def known(self, plain: Mapping[str, Any], allowed: tuple[str, ...], *path: str | int) -> set[str]:
        """Note every field but these as a fault. Returns those that were probably meant."""
        meant = set()
        for name in plain:
            if name not in allowed:
                near = difflib.get_close_matches(str(name)[:80], allowed, 1)
                meant |= set(near)
                do = f"Did you mean '{near[0]}'?" if near else f"It may have: {', '.join(allowed)}."
                self.faults.append(self.fault(f"there is no field '{shortened(str(name))}' here.", *path, name, do=do))
        return meant

    def read(self, reader: Callable[[Any], Any], plain: Any, *path: str | int) -> Any:
        """A value through a reader of ``describe.criterion_values``; its complaint gets file, line and field.

        Raises:
            Fault: the reader does not take it.
        """
        try:
            return reader(plain)
        except ValueError as error:
            what = path[-1] if isinstance(path[-1], str) else f"entry {path[-1] + 1} of {path[-2]}"
            raise self.fault(f"{what} {error}.", *path) from error

    def check(self) -> None:
        """Raise what was found, if anything was.

        Raises:
            BadInput: of the kind that was asked for; names the file, and every fault with its line.
        """
        faults = sorted(self.faults, key=lambda fault: fault.line)
        if not faults:
            return
        if len(faults) == 1:
            raise self.error(f"{self.source}, line {faults[0].line}: {faults[0].found}", do=faults[0].do)
        shown = [f"{self.source}, line {one.line}: {one.found} {one.do}".rstrip() for one in faults[:_MOST_SHOWN]]
        more = [f"... and {len(faults) - _MOST_SHOWN} more faults."] if len(faults) > _MOST_SHOWN else []
        raise self.error("\n".join(shown + more))


def line_of(lines: Mapping[Where, int], path: Where) -> int:
    """The line of the value at a path, or of the nearest thing around it."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def shortened(text: str, most: int = 80) -> str:
    """A text of others as a message repeats it."""
    return text if len(text) <= most else text[:most] + "..."


def filled(document: Document, text: str, variables: Mapping[str, str], *path: str | int) -> str:
    """A text with ``{{name}}`` filled in from variables.

    Raises:
        Fault: one has no value, or the text becomes too long.
    """
    length = len(text)

    def value(match: re.Match[str]) -> str:
        nonlocal length
        if match[1] not in variables:
            have = ", ".join(variables) or "none"
            do = f"Variables of this input: {shortened(have, 300)}."
            raise document.fault(f"the variable '{shortened(match[1])}' has no value.", *path, do=do)
        length += len(variables[match[1]])
        if length > LONGEST_TEXT:
            raise document.fault(f"filled in, this is longer than {LONGEST_TEXT} characters.", *path)
        return variables[match[1]]

    return re.sub(r"\{\{\s{0,99}([\w.-]+)\s{0,99}\}\}", value, text)
