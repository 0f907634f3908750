"""The table of engines, schemes and devices, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitladder.records.kernels import KernelTable, Runs

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = {Runs.FULL: "yes", Runs.SLOWER: "slow", Runs.NO: "-"}
_WIDE = 90
"""Columns of a terminal that has room for dates."""


def formats_table(table: KernelTable, devices: Sequence[str], runs: Sequence[Sequence[Runs]], out: Console) -> None:
    """A row for each engine and scheme, a column for each device; below it what "slow" is, notes and sources."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1 if out.width >= _WIDE else 0, 0, 0))
    dated = out.width >= _WIDE
    for title in ("scheme", "engine", *devices, *(("as of",) if dated else ())):
        shown.add_column(title, no_wrap=True)
    order = sorted(range(len(table.rows)), key=lambda at: table.schemes.index(table.rows[at].scheme))
    for at in order:
        row = table.rows[at]
        cells = [_SHOWN[one] for one in runs[at]]
        shown.add_row(row.scheme, table.engines[row.engine].name, *cells, *((row.date,) if dated else ()))
    out.print(shown)
    for at in order:
        row = table.rows[at]
        if row.engine != "transformers" and (row.slower or row.note):
            said = "; ".join(part for part in (row.slower and f"slow, as {row.slower}", row.note) if part)
            out.print(Text(f"{row.scheme} in {table.engines[row.engine].name}: {said}.", style="dim"))
    for engine in table.engines.values():
        if engine.note:
            out.print(Text(f"{engine.name}: {engine.note}.", style="dim"))
    out.print(Text("Read in public documents and not measured here; --json has the source of every row.", style="dim"))
