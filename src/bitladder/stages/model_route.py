"""By what layers a model is walked, as far as that is known without opening it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitladder.files.gguf import GgufFile
    from bitladder.plan.abilities import Route


def route_of(source: GgufFile) -> Route:
    """By what layers a model's statistics are gathered, as far as nothing refuses: each has sums of its own,
    so what is kept of one is not another's."""
    from bitladder.files.convert import checkpoint_of
    from bitladder.plan.abilities import Route, walk_gap

    if not walk_gap(source.model):
        return Route.WALK
    return Route.ENGINE if checkpoint_of(source.path) is None else Route.DERIVED
