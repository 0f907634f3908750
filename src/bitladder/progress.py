"""How long work says where it is, and what has become known of a level: one object, passed down; the command line
draws it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LevelNews:
    """What has just become known of one level. What is left at its default is no news."""

    level: str
    state: str = ""
    """What is being done with it, or was done last: a word or two."""
    file_bytes: int = 0
    kl_mean: float = math.nan
    """Nats per token, over the text so far."""
    answered: int = -1
    passes: int = -1
    """Of the answers so far; -1 also while they are not judged."""
    inputs: int = 0
    """How many answers there will be."""
    tokens_per_s: float = math.nan


class Progress:
    """Shows nothing; what shows something overrides one method or both."""

    def __call__(self, what: str, done: float, total: float) -> None:
        """Where the work is: ``what`` is a short phrase in the user's words, ``done`` of ``total`` any unit."""

    def on_level(self, news: LevelNews) -> None:
        """Something about a level."""


silent = Progress()


class StepsOnly(Progress):
    """A function that is told where the work is, and nothing of levels."""

    def __init__(self, step: Callable[[str, float, float], None]) -> None:
        self._step = step

    def __call__(self, what: str, done: float, total: float) -> None:
        """As ``Progress``."""
        self._step(what, done, total)


class Part(Progress):
    """For a part of some work, which counts in a unit of its own: nothing of it is ``start`` of ``total``, all of it
    ``stop``."""

    def __init__(self, progress: Progress, start: float, stop: float, total: float) -> None:
        self._progress, self._start, self._stop, self._total = progress, start, stop, total

    def __call__(self, what: str, done: float, total: float) -> None:
        """As ``Progress``, in the unit of the whole."""
        self._progress(what, self._start + (self._stop - self._start) * done / total, self._total)

    def on_level(self, news: LevelNews) -> None:
        """As ``Progress``."""
        self._progress.on_level(news)
