"""Where the evidence is kept: an option, the environment, or the user's data folder."""

from __future__ import annotations

import os
from pathlib import Path

from bitladder.errors import BadInput
from bitladder.files.folders import data_folder


def store_url(url: str | None = None) -> str:
    """A SQLAlchemy URL from an option, from ``BITLADDER_STORE``, or the SQLite file of the data folder.

    A bare path means a SQLite file. ``postgres://`` and ``postgresql://`` mean the psycopg driver.

    Raises:
        BadInput: a path that leads nowhere.
    """
    wanted = url or os.environ.get("BITLADDER_STORE") or ""
    if not wanted:
        return f"sqlite:///{data_folder() / 'evidence.sqlite'}"
    if "://" not in wanted:
        try:
            return f"sqlite:///{Path(wanted).expanduser().resolve()}"
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a home that is not known, a NUL
            raise BadInput(
                f"The evidence store {wanted} cannot be found: {error}.", do="Name another place with BITLADDER_STORE."
            ) from error
    scheme, rest = wanted.split("://", 1)
    return f"postgresql+psycopg://{rest}" if scheme in ("postgres", "postgresql") else wanted
