"""Where Bitladder keeps files of its own: a cache that may be deleted at any time, and data that is worth
keeping.
"""

from __future__ import annotations

import hashlib
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


def cache_key(*depends_on: str | bytes) -> str:
    """Hash, in hex, of everything that something in the cache depends on: the model's and the text's hashes, settings,
    and the version (``__version__``, the kernels' ``REVISION``) of what computed it. Each part counts with its length.
    """
    digest = hashlib.sha256()
    for part in depends_on:
        raw = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
