"""How long work says where it is: one callable, passed down; the command line draws it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, float, float], None]
"""``progress(what, done, total)``: ``what`` is a short phrase in the user's words, ``done`` of ``total`` any unit."""


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


def tell(progress: Progress, news: LevelNews) -> None:
    """Give news of a level to a progress that listens to them: one with a method ``heard``. Others go without."""
    heard = getattr(progress, "heard", None)
    if heard is not None:
        heard(news)


def silent(what: str, done: float, total: float) -> None:
    """Say nothing."""


def within(progress: Progress, start: float, stop: float, total: float) -> Progress:
    """For a part of some work, which counts in a unit of its own: nothing of it is ``start`` of ``total``, all of it
    ``stop``."""

    def part(what: str, done: float, whole: float) -> None:
        progress(what, start + (stop - start) * done / whole, total)

    return part
