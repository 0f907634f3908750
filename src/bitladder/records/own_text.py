"""One text that a model wrote to be calibrated on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class OwnText:
    """Of one seed: what can be used of it."""

    name: str
    text: str
    """The question in the model's chat template and the answer, or a plain text; empty where it was dropped."""
    tokens: int
    """That the model wrote, as far as they are used."""
    dropped: str = ""
    """Why nothing of it is used."""


@dataclass(frozen=True)
class OwnTextReport:
    """What came of it, without the texts."""

    texts: int
    """That can be used."""
    tokens: int
    """That the model wrote of them."""
    plain: bool
    dropped: Mapping[str, int]
    """Reason -> texts, the most frequent first."""
    refused: str


@dataclass(frozen=True)
class OwnTexts:
    """All that one model wrote, in the order of the seeds."""

    texts: tuple[OwnText, ...]
    plain: bool
    """Whether it wrote on from openings, for want of a chat template."""
    refused: str = ""
    """Why none of it is calibrated on; empty where it is."""

    @property
    def kept(self) -> tuple[OwnText, ...]:
        """Texts that can be used."""
        return tuple(one for one in self.texts if not one.dropped)

    @property
    def report(self) -> OwnTextReport:
        """Counts alone."""
        dropped = Counter(one.dropped for one in self.texts if one.dropped)
        tokens = sum(one.tokens for one in self.kept)
        return OwnTextReport(len(self.kept), tokens, self.plain, dict(dropped.most_common()), self.refused)
