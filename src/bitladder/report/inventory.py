"""What is kept on this machine, on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bitladder.records.inventory import Inventory, KeptFile, KeptRun, Place
from bitladder.report.columns import Column, fitted_table
from bitladder.report.terminal import terminal_console
from bitladder.units import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

Row = TypeVar("Row")


def _reasons(file: KeptFile) -> str:
    return "; ".join(file.kept_by) or "nothing"


RUNS: tuple[Column[KeptRun], ...] = (
    Column("model", lambda run: run.model, 0, right=False, keeps=24),
    Column("made", lambda run: run.created[:16].replace("T", " "), 0, right=False),
    Column("quality", lambda run: run.quality or "none", 0, right=False),
    Column("speed", lambda run: run.speed or "none", 0, right=False),
    Column("levels", lambda run: str(len(run.levels)), 1),
    Column("size", lambda run: "gone" if run.gone else human_bytes(run.bytes), 0),
    Column("served", lambda run: "yes" if run.served else "", 0, right=False),
    Column("folder", lambda run: _near(Path(run.path).parent), 2, right=False),
    Column("bar", lambda run: run.bar, 3, right=False),
)
LEVELS: tuple[Column[KeptFile], ...] = (
    Column("level", lambda file: file.name, 0, right=False, keeps=31),
    Column("size", lambda file: human_bytes(file.bytes), 0),
    Column("used", lambda file: file.used[:10], 1, right=False),
    Column("kept by", _reasons, 0, right=False, keeps=23),
    Column("file", lambda file: _near(Path(file.path)), 2, right=False, keeps=30),
)
GROUPS: tuple[Column[tuple[str, int, int, str]], ...] = (
    Column("what", lambda row: row[0], 0, right=False, keeps=40),
    Column("files", lambda row: str(row[1]), 0),
    Column("size", lambda row: human_bytes(row[2]), 0),
    Column("last used", lambda row: row[3][:10], 0, right=False),
)


def print_inventory(found: Inventory, words: dict[str, str], days: float, console: Console | None = None) -> None:
    """Runs, levels, the cache and the hub's, each as a table. ``words``: what the cache's folders hold."""
    out = console or terminal_console()
    out.print(f"Evidence: {found.store}", highlight=False, markup=False, soft_wrap=True)
    _table(out, "Runs", RUNS, found.runs)
    _table(out, "Files of levels", LEVELS, _of(found.files, Place.LEVEL))
    _table(out, "Left by stopped jobs", GROUPS, groups(_of(found.files, Place.PARTIAL, Place.DOWNLOAD), words))
    _table(out, f"Cache ({found.cache})", GROUPS, groups(_of(found.files, Place.CACHE), words))
    _table(out, "The hub client's cache (`hf cache` deletes)", GROUPS, groups(_of(found.files, Place.HUB), words))
    stale = sum(file.bytes for file in found.stale)
    line = f"`bitladder clean` would free {human_bytes(stale)}: what nothing points to, not used for {days:g} days."
    out.print(line if stale else "There is nothing to clean.", highlight=False, markup=False)


def print_stale(files: Sequence[KeptFile], words: dict[str, str], console: Console | None = None) -> None:
    """What would be deleted."""
    out = console or terminal_console()
    _table(out, "Files of levels that no run points to", LEVELS, _of(files, Place.LEVEL))
    _table(out, "Left by stopped jobs", GROUPS, groups(_of(files, Place.PARTIAL, Place.DOWNLOAD), words))
    _table(out, "Cache", GROUPS, groups(_of(files, Place.CACHE), words))


def groups(files: Iterable[KeptFile], words: dict[str, str]) -> list[tuple[str, int, int, str]]:
    """What a kind of files is, how many, how large in bytes, when one was last used; the largest first."""
    by_name: dict[str, list[KeptFile]] = {}
    for file in files:
        by_name.setdefault(words.get(file.name, file.name), []).append(file)
    rows = [
        (name, len(some), sum(one.bytes for one in some), max(one.used for one in some))
        for name, some in by_name.items()
    ]
    return sorted(rows, key=lambda row: -row[2])


def _table(out: Console, title: str, columns: Sequence[Column[Row]], rows: Sequence[Row]) -> None:
    if rows:
        table, _ = fitted_table(columns, rows, out.width)
        out.print(f"\n{title}", style="bold", highlight=False, markup=False)
        out.print(table)


def _of(files: Iterable[KeptFile], *places: Place) -> list[KeptFile]:
    return [file for file in files if file.place in places]


def _near(path: Path) -> str:
    """A path as it is shortest to type from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
