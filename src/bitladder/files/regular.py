"""The one way in which a file of a stranger's folder is opened: regular files alone, every error one of ours.

A named pipe, a device or a terminal under the name of a model's file would wait for ever or never end. What a link
leads to counts, not the link.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bitladder import system
from bitladder.errors import BadFile

MAX_TEXT = 512 << 20
"""Upper bound of a file that is read whole, in bytes (the largest tokenizers have 40 MB)."""


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A file for reading; what the system refuses while it is open ends as BadFile, too.

    Raises:
        FileNotFoundError: nothing is there, or a link whose target is gone.
        BadFile: it is no regular file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: opening alone makes some devices act
            raise _no_file(path)
        handle = system.open_file(path, "O_RDONLY", "O_NONBLOCK")
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):  # exchanged in between
                raise _no_file(path)
            yield file
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise BadFile(
            f"{path} cannot be read: {reason}",
            means="It is no file of a model, lies on a disk that fails, or its permissions forbid it.",
            do="Check it, or fetch it again.",
        ) from error


def read_regular(path: Path, limit: int = MAX_TEXT) -> bytes:
    """The content of a regular file.

    Args:
        path: It.
        limit: The most bytes that it may have.

    Raises:
        FileNotFoundError: nothing is there, or a link whose target is gone.
        BadFile: it is no regular file, is larger than ``limit``, or cannot be read.
    """
    with open_regular(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise BadFile(f"{path} has more than {limit} bytes.", means="No such file of a model is that large.")
    return raw


def _no_file(path: Path) -> BadFile:
    return BadFile(
        f"{path} is {'a folder' if path.is_dir() else 'no regular file'}.",
        means="A file of a model is expected under this name.",
        do="Fetch the file again.",
    )
