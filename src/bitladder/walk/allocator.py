"""Freed memory: what is kept for the next batch, and what is given back where a layer alone is nearly too much.

Activations of a batch are arrays of some megabytes, which glibc takes from the system and gives back every time; the
system clears each page again. That is a twelfth of a calibrating walk's processor time.
"""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 256 * 1024**2
_LARGE_BYTES = 32 * 1024**2
"""Arrays from here on still come from the system and return to it: glibc takes no larger value."""


def keep_freed_memory() -> None:
    """Let malloc keep up to 256 MiB of freed memory, for the rest of the process; does nothing but under glibc."""
    try:
        tune = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    tune(_MMAP_THRESHOLD, _LARGE_BYTES)
    tune(_TRIM_THRESHOLD, _KEPT_BYTES)


def give_freed_memory_back() -> None:
    """Let the system have what malloc kept, and keep little from now on; does nothing but under glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        glibc = ctypes.CDLL(None)
        glibc.mallopt(_TRIM_THRESHOLD, _LARGE_BYTES)
        glibc.malloc_trim(0)
