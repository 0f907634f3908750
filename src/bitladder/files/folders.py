"""Where Bitladder keeps files of its own: a cache that may be deleted at any time, and data that is worth
keeping.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder(*parts: str) -> Path:
    """The user's cache (downloads, converted checkpoints, the converter), or ``$BITLADDER_CACHE``; not
    created here.
    """
    root = os.environ.get("BITLADDER_CACHE") or platformdirs.user_cache_dir("bitladder", appauthor=False)
    return Path(root).expanduser().joinpath(*parts)


def data_folder(*parts: str) -> Path:
    """What is kept (evidence, measured machines, added catalogue rows), or ``$BITLADDER_DATA``; not created
    here.
    """
    root = os.environ.get("BITLADDER_DATA") or platformdirs.user_data_dir("bitladder", appauthor=False)
    return Path(root).expanduser().joinpath(*parts)
