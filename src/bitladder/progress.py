"""How long work says where it is: one callable, passed down; the command line draws it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, float], None]
"""``progress(what, done, total)``: ``what`` is a short phrase in the user's words, ``done`` of ``total`` any unit."""


def silent(what: str, done: float, total: float) -> None:
    """Say nothing."""
