"""Token windows whose scored tokens lie deep in a context: what a cache keeps of far-off tokens shows there only.

The same tokens are scored at every depth, and only what stands before them differs: a short context is the end of a
long one. So losses at several depths are paired, token by token, and a text that is hard by itself is hard at each.

    a document as long as the deepest window     its own tokens go before; another part of it for every such length
    a shorter one                                filler goes before it, other texts from end to end, the same for all
                                                 documents, so that the engine computes it once for all

Filler that is shorter than the context is repeated. What is scored is in no filler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitladder.describe.windows import SHORTEST, Window
from bitladder.errors import BadInput, UsageError

SCORED = 256
"""Tokens of one document's part that are scored at most: the last ones."""
DEPTHS = (512, 4096)
"""Where nobody names any."""
SHALLOWEST = 256
"""Half of it is scored."""
_MOST_PARTS = 4
"""Parts of one document at most; documents, not parts, are what intervals resample."""


@dataclass(frozen=True)
class DepthWindows:
    """Windows of one depth in tokens, one for each part of each document, in the same order at every depth."""

    depth: int
    windows: tuple[Window, ...]


def check_depths(depths: Sequence[int], trained: int) -> tuple[int, ...]:
    """Depths in rising order, each once.

    Raises:
        UsageError: one is too short to score anything, or longer than the model was trained for.
    """
    found = tuple(sorted(set(depths)))
    if not found or found[0] < SHALLOWEST:
        raise UsageError(
            f"A depth of {found[0] if found else 0} tokens is too short: at least {SHALLOWEST} are needed.",
            do="Name depths in tokens, like --depth 512,4096.",
        )
    if trained and found[-1] > trained:
        raise UsageError(
            f"A depth of {found[-1]} tokens is wanted; the model was trained for {trained}.",
            do=f"Name depths up to {trained}.",
        )
    return found


def usual_depths(n_ctx: int) -> tuple[int, ...]:
    """Depths up to a context: 512 tokens, eight times as many, and so on, and the context itself."""
    doubling = (512 << 3 * step for step in range(16))
    return tuple(sorted({*(depth for depth in doubling if depth < n_ctx), n_ctx}))


def depth_windows(
    documents: Sequence[tuple[str, Sequence[int]]],
    filler: Sequence[Sequence[int]],
    depths: Sequence[int],
    *,
    bos: int | None = None,
) -> list[DepthWindows]:
    """Windows at each depth.

    Args:
        documents: name and token ids of what is scored.
        filler: token ids of other texts.
        depths: tokens of context and scored tokens together, rising.
        bos: the token that every window begins with, for models that want one.

    Raises:
        BadInput: the documents have too few tokens, or nothing stands before them.
    """
    before = _filler(filler, depths[-1], bos)
    scored = min(SCORED, depths[0] // 2)
    parts = [(name, part) for name, ids in documents for part in _parts(_without(ids, bos), depths[-1])]
    parts = [(name, part) for name, part in parts if len(part) >= SHORTEST]
    if not parts:
        raise BadInput(
            f"The text is too short to measure on: no document has {SHORTEST} tokens.",
            do="Give a longer text, or leave out --text to use the one that ships.",
        )
    if not len(before) and any(len(part) < depths[-1] for _, part in parts):
        raise BadInput(
            f"No text fills a context of {depths[-1]} tokens.", do="Give longer documents, or a smaller --depth."
        )
    return [
        DepthWindows(depth, tuple(_window(name, part, before, depth, scored, bos) for name, part in parts))
        for depth in depths
    ]


def _window(
    name: str, part: NDArray[np.int64], before: NDArray[np.int64], depth: int, scored: int, bos: int | None
) -> Window:
    """``depth`` tokens that end with the part, its last ones scored. Filler is taken from its beginning; a part that is
    too long loses its own."""
    room = depth - (bos is not None)
    own = part[-room:]
    start = [] if bos is None else [bos]
    tokens = np.concatenate([np.asarray(start, np.int64), before[: room - len(own)], own])
    # The first scored token of a short part is never the filler's: at least half of the part goes before.
    count = min(scored, len(part) // 2)
    return Window(name, tokens, begin=depth - 1 - count)


def _parts(ids: NDArray[np.int64], longest: int) -> list[NDArray[np.int64]]:
    whole = [ids[at : at + longest] for at in range(0, len(ids) - longest + 1, longest)]
    return whole[:_MOST_PARTS] or [ids]


def _filler(texts: Sequence[Sequence[int]], length: int, bos: int | None) -> NDArray[np.int64]:
    """At least so many tokens, unless there is no text at all."""
    once = np.concatenate([np.empty(0, np.int64), *(_without(ids, bos) for ids in texts)])
    return once if not len(once) else np.tile(once, -(-length // len(once)))


def _without(ids: Sequence[int], bos: int | None) -> NDArray[np.int64]:
    found = np.asarray(ids, np.int64)
    return found[1:] if bos is not None and len(found) and found[0] == bos else found


def by_depth(parts: Sequence[DepthWindows]) -> Mapping[int, slice]:
    """Where each depth's windows lie when all stand in one list."""
    ends = np.cumsum([0, *(len(one.windows) for one in parts)])
    return {one.depth: slice(int(ends[at]), int(ends[at + 1])) for at, one in enumerate(parts)}
