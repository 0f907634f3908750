"""Where the evidence is kept: an option, the environment, or the user's data folder."""

from __future__ import annotations

import os
from pathlib import Path

from bitladder.files.folders import data_folder


def store_url(url: str | None = None) -> str:
    """A SQLAlchemy URL from an option, from ``BITLADDER_STORE``, or the SQLite file of the data folder.

    A bare path means a SQLite file. ``postgres://`` and ``postgresql://`` mean the psycopg driver.
    """
    wanted = url or os.environ.get("BITLADDER_STORE") or ""
    if not wanted:
        return f"sqlite:///{data_folder() / 'evidence.sqlite'}"
    if "://" not in wanted:
        return f"sqlite:///{Path(wanted).expanduser().resolve()}"
    scheme, rest = wanted.split("://", 1)
    return f"postgresql+psycopg://{rest}" if scheme in ("postgres", "postgresql") else wanted
