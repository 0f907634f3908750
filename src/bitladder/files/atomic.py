"""Small files, written whole or not at all: aside, flushed to the disk, renamed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from bitladder.errors import OutputError


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file and its folder; returns the path.

    Raises:
        OutputError: no space, no permission. What was under the name before is still there.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where nothing could be written, nothing can be removed either
            part.unlink()
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}.", do="Name another place with --out."
        ) from error
    return path
