"""Names for files that the user gives by their paths."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path


def names_apart(paths: Iterable[Path], taken: Collection[str] = ()) -> dict[str, Path]:
    """Each file or folder once, in order, by a name that no other has: its own without the ending where that will do,
    else the shortest end of its path that tells it apart. ``taken``: names that others have already."""
    whole: dict[Path, Path] = {}
    for path in paths:
        whole.setdefault(Path(os.path.abspath(path)), path)  # noqa: PTH100 - a link has a name of its own
    names = {path: path.name if path.is_dir() else path.stem for path in whole}
    for depth in range(1, max((len(path.parts) for path in whole), default=0)):
        often = Counter([*taken, *names.values()])
        names |= {path: "/".join(path.parts[-depth:]) for path, name in names.items() if often[name] > 1}
    return {name: whole[path] for path, name in names.items()}
