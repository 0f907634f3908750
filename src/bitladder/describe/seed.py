"""What a model is asked when it writes its own calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seed:
    """One text to be written."""

    name: str
    """Of the document; languages in front, as ``describe.text.languages_of`` reads them."""
    ask: tuple[str, ...]
    """What a user says, turn by turn, to a model with a chat template."""
    begin: str
    """The opening of a plain text, for a model without one."""
    system: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    """What the model may call, in OpenAI's form."""
    script: str = "Latin"
    """Of most of its letters, as Unicode names them; ``Japanese`` for all three that it is written in."""
