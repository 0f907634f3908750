"""Arrays that a long job leaves behind when it is killed, for the next one like it to go on from."""

from __future__ import annotations

import hashlib
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitladder.errors import OutputError
from bitladder.files.atomic import written_aside

SECONDS_BETWEEN = 30.0
_NOT_WHOLE = (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile)
"""What reading a file raises that is not there, was cut short, or is not one of ours."""


def read_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """The arrays of an ``.npz`` file by name, or None where there is nothing whole."""
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            return None if isinstance(found, np.ndarray) else dict(found)
    except _NOT_WHOLE:
        return None


class KeptArray:
    """One file f64[...], or of another ``dtype``, in a folder, under a name made from everything that its numbers
    depend on."""

    def __init__(self, folder: Path | None, *key: str, dtype: DTypeLike = np.float64) -> None:
        """``folder``: None keeps nothing."""
        self._dtype = np.dtype(dtype)
        name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:32]
        self._path = None if folder is None else folder / f"{name}.npy"
        self._saved = time.monotonic()

    def is_there(self) -> bool:
        """Whether an earlier job left something."""
        return self._path is not None and self._path.exists()

    def load(self) -> NDArray[Any] | None:
        """What an earlier job left, or None where there is nothing whole."""
        if self._path is None:
            return None
        try:
            found = np.load(self._path, allow_pickle=False)
        except _NOT_WHOLE:
            return None
        return found if isinstance(found, np.ndarray) and found.dtype == self._dtype else None

    def due(self) -> bool:
        """Whether the last save, or the beginning, was long enough ago."""
        return self._path is not None and time.monotonic() - self._saved >= SECONDS_BETWEEN

    def save(self, array: NDArray[Any]) -> None:
        """Replace what is kept.

        Raises:
            OutputError: the folder cannot be written.
        """
        if self._path is None:
            return
        try:
            with written_aside(self._path) as file:
                np.save(file, array.astype(self._dtype, copy=False))
        except OSError as error:
            raise OutputError(
                f"What was measured so far cannot be kept in {self._path.parent}: {error.strerror}.",
                means="It is kept so that a killed job can go on where it was.",
                do="Free some space there.",
            ) from error
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The job is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
