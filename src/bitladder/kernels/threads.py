"""How many threads compiled loops take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba


@contextmanager
def one_thread() -> Iterator[None]:
    """Loops in the block run in the calling thread alone: over a few dozen rows several threads wait for one another
    for longer than they work, four times as long on a busy machine (docs/log.md)."""
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(before)
