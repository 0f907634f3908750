"""Tables that fit the terminal: columns have ranks, and those of the highest rank are left out first, never cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

R = TypeVar("R")
BETWEEN = 3
"""Characters of space and rule that each column takes beside its text."""
SENTENCE = 36
"""Columns below which sentences in a column are hard to read."""


@dataclass(frozen=True)
class Column(Generic[R]):
    """A column, its reader, and its rank: the highest ranks are left out first on a narrow terminal, rank 0 never."""

    title: str
    read: Callable[[R], str]
    rank: int
    right: bool = True
    keeps: int = 0
    """Characters to which its text may be cut, with an ellipsis, so that the others stay whole; 0: never."""
    wraps: bool = False
    """Its sentences break into lines in what the others leave."""
    spoken: str = ""
    """What to call it where it is left out; its title otherwise."""
    style: Callable[[R], str] | None = None


def plain_table() -> Table:
    """The one look of tables on a terminal."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1, 0, 1))


def fitted_table(columns: Sequence[Column[R]], rows: Sequence[R], width: int) -> tuple[Table, list[str]]:
    """As many columns as fit into ``width``, and what those that do not are called."""
    from rich.text import Text

    chosen = columns_that_fit(columns, rows, width)
    table = plain_table()
    for column in chosen:
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=not column.wraps,
            overflow="fold" if column.wraps else "ellipsis",
            min_width=_least(column, rows),
            width=_given_way(column, chosen, rows, width) if column.keeps else None,
        )
    for row in rows:
        table.add_row(*(Text(column.read(row), style=column.style(row) if column.style else "") for column in chosen))
    return table, [column.spoken or column.title for column in columns if column not in chosen]


def columns_that_fit(columns: Sequence[Column[R]], rows: Sequence[R], width: int) -> list[Column[R]]:
    """Left out by rank until the rest fits, columns that may be cut at their shortest."""
    chosen = list(columns)

    def needed() -> int:
        return sum(BETWEEN + _least(one, rows) for one in chosen)

    while needed() + 1 > width and any(column.rank for column in chosen):
        chosen.remove(max(chosen, key=lambda column: column.rank))
    return chosen


def _given_way(column: Column[R], chosen: Sequence[Column[R]], rows: Sequence[R], width: int) -> int:
    """Characters for a column that may be cut: its text, or what the others leave of the terminal."""
    others = sum(BETWEEN + _least(one, rows) for one in chosen if one is not column)
    return min(_text_width(column, rows), max(column.keeps, width - others - BETWEEN - 1))


def _least(column: Column[R], rows: Sequence[R]) -> int:
    """Characters without which a column is not worth showing."""
    whole = _text_width(column, rows)
    return min(column.keeps, whole) if column.keeps else min(SENTENCE, whole) if column.wraps else whole


def _text_width(column: Column[R], rows: Sequence[R]) -> int:
    return max([len(column.title), *(len(column.read(row)) for row in rows)])
