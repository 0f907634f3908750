"""Which files running programs have open: a level that is served is not deleted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path


def files_in_use(paths: Iterable[Path]) -> dict[Path, str]:
    """Those of the files, and of the folders with something in them, that a process of this machine has open, maps or
    names on its command line, with that process in words.

    What the system does not let this user see is not seen: processes of others, and on macOS what is mapped.
    """
    import psutil

    wanted = [str(path.resolve()) for path in paths]
    found: dict[Path, str] = {}
    for process in psutil.process_iter() if wanted else ():
        held = set(_held(process))
        for path in wanted:
            if any(one == path or one.startswith(f"{path}/") or one.startswith(f"{path}\\") for one in held):
                found.setdefault(Path(path), f"process {process.pid} ({_name(process)})")
    return found


def _held(process: object) -> Iterator[str]:
    import psutil

    for what, reader in (("open_files", None), ("memory_maps", None), ("cmdline", str)):
        with contextlib.suppress(psutil.Error, AttributeError, OSError, ValueError):
            for one in getattr(process, what)():
                yield reader(one) if reader else one.path


def _name(process: object) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        return str(process.name())  # type: ignore[attr-defined]
    return "ended"
