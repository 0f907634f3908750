"""Hidden states of many windows, in memory or, past a budget, in an unnamed file.

Windows are laid out in batches: windows of similar length side by side, shorter ones padded at their end.
Under a causal mask what follows a token cannot reach it, so padding changes nothing before it and is never
scored.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder import system
from bitladder.describe.windows import Window
from bitladder.errors import OutputError
from bitladder.units import human_bytes

BATCH_TOKENS = 2048
"""Enough for matrix products at full speed, little enough that activations stay small beside a layer."""
CALIBRATION_TOKENS = 1024
"""For passes that gather statistics: activations stay in the caches' reach, 5% less time than with 2,048. And for
those of which several batches are on their way at a time."""
SHARD_TOKENS = 4096
"""A shard of a text is about so long. Sums are rounded shard by shard, so this is part of what bytes depend on."""
_PADDING_ALLOWED = 0.2


@dataclass(frozen=True)
class Batch:
    """Windows that go through a layer together."""

    windows: tuple[int, ...]
    """Their places in the caller's list."""
    lengths: tuple[int, ...]
    """Tokens of each, longest first."""
    tokens: NDArray[np.int64]
    """Ids, int64[windows, n], padded at the end."""
    start: int
    """Where the batch begins in a layout of all batches, in tokens."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """bool[windows, n]: which positions hold a token and not padding."""
        mask: NDArray[np.bool_] = np.arange(self.tokens.shape[1])[None] < np.asarray(self.lengths)[:, None]
        return mask


def batches_of(windows: Sequence[Window], *, batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Group windows, longest first, into batches of at most ``batch_tokens`` tokens (or of one window)."""
    order = sorted(range(len(windows)), key=lambda at: -len(windows[at].tokens))
    groups: list[list[int]] = []
    for at in order:
        if groups:
            longest = len(windows[groups[-1][0]].tokens)
            room = (len(groups[-1]) + 1) * longest <= batch_tokens
            if room and len(windows[at].tokens) >= (1 - _PADDING_ALLOWED) * longest:
                groups[-1].append(at)
                continue
        groups.append([at])
    batches, start = [], 0
    for group in groups:
        lengths = tuple(len(windows[at].tokens) for at in group)
        tokens = np.zeros((len(group), lengths[0]), np.int64)
        for row, at in enumerate(group):
            tokens[row, : lengths[row]] = windows[at].tokens
        batches.append(Batch(tuple(group), lengths, tokens, start))
        start += tokens.size
    return batches


def shards_of(batches: Sequence[Batch], count: int = 1) -> list[list[Batch]]:
    """Cut a text into at most ``count`` runs of batches of about equal length, in order; at least one, if empty.

    What is summed over a text is summed shard by shard and then added in this order, so the number of shards decides
    how sums are rounded, and nothing else does.
    """
    total = sum(batch.tokens.size for batch in batches)
    shards: list[list[Batch]] = [[] for _ in range(max(1, count))]
    for batch in batches:
        shards[batch.start * len(shards) // total].append(batch)
    return [shard for shard in shards if shard] or [[]]


def shard_count(batches: Sequence[Batch]) -> int:
    """Into how many shards a text is cut, whatever computes them."""
    return max(1, sum(batch.tokens.size for batch in batches) // SHARD_TOKENS)


class States:
    """Hidden states f32[tokens, width] of all batches of one model."""

    def __init__(self, batches: Sequence[Batch], width: int, *, spill: Path | None) -> None:
        """``spill`` is a folder for the file that holds the states, or None to hold them in memory.

        Raises:
            OutputError: the folder has no room for the file.
        """
        self.width = width
        self._mapped: mmap.mmap | None = None
        self._resident = (0, 0)
        tokens = sum(batch.tokens.size for batch in batches)
        if spill is None:
            self.data = torch.empty(tokens, width)
            return
        try:
            with tempfile.TemporaryFile(dir=spill) as file:
                # Room is taken now, so that a full disk is an error here and not a crash on a later write.
                system.reserve(file.fileno(), tokens * width * 4)
                self._mapped = mmap.mmap(file.fileno(), tokens * width * 4)
        except OSError as error:
            raise OutputError(
                f"No room for {human_bytes(tokens * width * 4)} of hidden states in {spill}: {error.strerror}.",
                means="Hidden states of all levels are kept on disk when they outgrow memory.",
                do="Free some space, set TMPDIR to a larger disk, or measure fewer levels at once.",
            ) from error
        self.data = torch.frombuffer(self._mapped, dtype=torch.float32).view(tokens, width)

    @classmethod
    def around(cls, data: torch.Tensor) -> States:
        """States f32[tokens, width] that lie somewhere already, and are not copied."""
        made = cls((), data.shape[-1], spill=None)
        made.data = data
        return made

    def get(self, batch: Batch) -> torch.Tensor:
        """f32[windows, n, width] of a batch: a view."""
        size = batch.tokens.size
        if self._mapped is not None:
            self._page_out(batch.start * self.width * 4, size * self.width * 4)
        return self.data[batch.start : batch.start + size].view(*batch.tokens.shape, self.width)

    def _page_out(self, start: int, size: int) -> None:
        """Of a spilled file only the batch in use stays mapped in; the rest is the system's to keep or to write."""
        if self._mapped is None or self._resident == (start, size):
            return
        first, length = self._resident
        aligned = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        if length > aligned - first:
            system.drop_pages(self._mapped, aligned, length - (aligned - first))
        self._resident = (start, size)

    @property
    def everything(self) -> torch.Tensor:
        """The states of all batches, f32[tokens, width]: a view."""
        return self.data

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Replace a batch's states."""
        self.get(batch).copy_(states)

    def copy_from(self, other: States) -> None:
        """Replace all states by those of another."""
        self.everything.copy_(other.everything)


class StatePool:
    """Hands out ``States``, spilling to files in ``folder`` what comes after ``budget_bytes`` are in use."""

    def __init__(self, budget_bytes: int, folder: Path | None = None) -> None:
        """``folder``: the system's for temporary files by default."""
        self._left, self._folder = budget_bytes, folder or Path(tempfile.gettempdir())

    def rest(self) -> StatePool:
        """A room with what is left of this one, for a while: what is taken from it is not missing here."""
        return StatePool(self._left, self._folder)

    def states(self, batches: Sequence[Batch], width: int) -> States:
        """States with undefined contents."""
        self._left -= sum(batch.tokens.size for batch in batches) * width * 4
        return States(batches, width, spill=None if self._left >= 0 else self._folder)


class Shelf:
    """A room for ``States`` of one text and width, which come and go."""

    def __init__(self, batches: Sequence[Batch], width: int, *, budget_bytes: int, folder: Path | None = None) -> None:
        self.batches, self.width = batches, width
        self.room = StatePool(budget_bytes, folder)
        self._free: list[States] = []

    def take(self) -> States:
        """States with undefined contents."""
        return self._free.pop() if self._free else self.room.states(self.batches, self.width)

    def give_back(self, states: States) -> None:
        """Let others use these states' room."""
        self._free.append(states)
