"""Text from outside on a terminal: what would steer the terminal is shown instead of sent."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)
"""C0 without tab and line feed, DEL, C1, separators and directions of text, and halves of surrogate pairs."""


def visible(text: str) -> str:
    """The text with every character that steers a terminal, or that no terminal can take, as its escape.

    Names of models, files and tensors are a stranger's: an escape sequence in one could recolour, hide or rewrite what
    is on the screen. Tabs and line feeds stay: they are also our own.
    """
    return _STEERING.sub(_escaped, text)


def on_one_line(text: str) -> str:
    """The same for what must stay on its line: line feeds and tabs are escaped, too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def visible_json(document: str) -> str:
    """A JSON document that means the same, with those characters as JSON's own escapes.

    Outside strings JSON has none of them, so each stands in a string.
    """
    return _STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", document)


def _escaped(match: re.Match[str]) -> str:
    return _code(ord(match[0]))


def _code(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


PLAIN = "bitladder.plain"
"""An error handler of codecs, for streams whose encoding lacks a character (``write_plainly``)."""
_INSTEAD = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "…": "...", "×": "x", "→": "->", "≥": ">=", "≤": "<=", "≈": "~", "±": "+-", "µ": "u"}
    | dict.fromkeys("‘’", "'") | dict.fromkeys("“”", '"') | dict.fromkeys("·•●", "*") | dict.fromkeys("█▇▆▅▄▃▂▁", "#")
)  # fmt: skip


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_INSTEAD)
    return "".join(one if one.isascii() else _code(ord(one)) for one in text), error.end


codecs.register_error(PLAIN, _plainly)


def takes_all(stream: TextIO) -> bool:
    """Whether a stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def write_plainly(stream: TextIO) -> None:
    """Have a stream write what its encoding lacks as plain marks or escapes, instead of an error: a terminal, a pipe or
    a file of another locale than UTF-8."""
    if isinstance(stream, io.TextIOWrapper) and not takes_all(stream):
        stream.reconfigure(errors=PLAIN)


def console(**options: Any) -> Console:
    """A rich console that sends only its own control sequences, never those of a text that it prints, nor reads
    rich's markup in one (``[bold]``, ``[link=...]``, ``:smile:``)."""
    from rich.console import Console
    from rich.segment import Segment

    class Careful(Console):
        """Every text on its way to the terminal passes ``render``."""

        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            """Rich's own, text made visible; its control codes are segments of their own kind."""
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

        def on_broken_pipe(self) -> None:
            """Leave it to whoever printed: rich's own ends the program, with exit code 1."""
            raise  # noqa: PLE0704 - rich calls this while it handles the error

    return Careful(**{"markup": False, "emoji": False, **options})
