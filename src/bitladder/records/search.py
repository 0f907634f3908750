"""What a search for the smallest level that holds a bar found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LadderOutcome:
    """What is known when the measuring stopped, levels from the largest to the smallest."""

    levels: tuple[str, ...]
    standings: tuple[str, ...]
    """``meets``, ``fails``, ``unlikely`` (to meet the bar), or ``open`` for levels that were not asked, or whose
    inputs ran out (``stats.sequential.Standing``)."""
    inputs_used: tuple[int, ...]
    """Inputs asked of each level."""
    chosen: str | None
    """The smallest level found to meet the bar."""
    decided: bool
    """False when inputs ran out at a smaller level than the chosen one: more of them might still show it to do."""
