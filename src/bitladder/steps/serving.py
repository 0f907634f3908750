"""Steps before serving: how many requests each level may compute at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

MOST_SLOTS = 4
"""Requests that a level computes together unless told otherwise, llama.cpp's own default. More share the
arithmetic units without being served sooner on most machines, and each takes a whole context of memory.
"""


def memory_by_slots(path: Path, n_ctx: int, slots: Sequence[int]) -> tuple[int, ...]:
    """Bytes that a GGUF file takes with so many requests of ``n_ctx`` tokens each, for every number in ``slots``.

    Raises:
        BadInput: the file is no model.
        UsageError: the model was not trained for such a context.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.probe import probe_machine
    from bitladder.stages.plan import file_memory

    machine = probe_machine()
    with GgufFile.open(path) as opened:
        return tuple(file_memory(opened.model, machine, n_ctx=n_ctx, n_seq=number) for number in slots)


def slots_that_fit(needs: Sequence[Sequence[int]], budget_bytes: int) -> tuple[int, ...]:
    """Requests at once for each level: as many as leave every level in memory beside the others.

    They are given one by one, the last level first (the speed tier is for volume). Levels that must take turns
    anyway get what fits when they have the memory to themselves.

    Args:
        needs: for each level the bytes it takes with one request at once, with two, and so on, rising.
        budget_bytes: memory for all of them; 0: unknown, no bound.
    """
    slots = [1] * len(needs)
    together = sum(need[0] for need in needs) <= budget_bytes or not budget_bytes

    def taken(level: int) -> int:
        others = sum(needs[one][slots[one] - 1] for one in range(len(needs)) if one != level) if together else 0
        return needs[level][slots[level]] + others

    for _ in range(max(map(len, needs), default=0)):
        for level in reversed(range(len(needs))):
            if slots[level] < len(needs[level]) and (not budget_bytes or taken(level) <= budget_bytes):
                slots[level] += 1
    return tuple(slots)
