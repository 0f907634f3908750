"""Pieces of a pass that need nothing of one another, each in a thread of its own.

Threads that share one product wait for the slowest of them at its end. Beside another busy process that is the one
whose core is shared, at every product: a walk by two threads took twice as long as on a quiet machine, and 1.5 times
with a piece for each (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_P = TypeVar("_P")
_UNEVEN = 1.15
"""What the thread with most to do may have over an even share, for pieces to be done side by side."""


def side_by_side(
    work: Callable[[_P], object], pieces: Sequence[_P], *, sizes: Sequence[int] | None = None, most: int | None = None
) -> None:
    """Do pieces of work, begun in their order, with as many threads as torch has here: one each, or several where there
    are fewer pieces or ``most`` says how many may be done at a time. ``sizes``: of the pieces, where they are not
    alike; they are done one after another where threads would have to wait for a large one.

    Raises:
        Exception: the first that one of them raises, in their order; those not begun by then are not done.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(pieces), most or threads)
    if workers < 2 or _longest(sizes or [1] * len(pieces), workers) > _UNEVEN:
        for piece in pieces:
            work(piece)
        return
    pool = ThreadPoolExecutor(workers, "piece", torch.set_num_threads, (threads // workers,))
    try:
        for done in [pool.submit(work, piece) for piece in pieces]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads to come begin with, too


def _longest(sizes: Sequence[int], workers: int) -> float:
    """The most that one of several workers has to do, who each take what comes next, over an even share."""
    loads = [0] * workers
    for size in sizes:
        loads[loads.index(min(loads))] += size
    return max(loads) * workers / max(1, sum(loads))
