"""What a search of the hub found, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from bitladder.report.columns import Column, fitted_table
from bitladder.report.terminal import terminal_console
from bitladder.units import human_bytes

if TYPE_CHECKING:
    from rich.console import Console


class Row(Protocol):
    """A level of a repository."""

    @property
    def repo(self) -> str: ...  # noqa: D102
    @property
    def level(self) -> str: ...  # noqa: D102
    @property
    def nbytes(self) -> int: ...  # noqa: D102
    @property
    def fits(self) -> str: ...  # noqa: D102
    @property
    def downloads(self) -> int: ...  # noqa: D102
    @property
    def licence(self) -> str: ...  # noqa: D102
    @property
    def gated(self) -> bool: ...  # noqa: D102


COLUMNS: tuple[Column[Row], ...] = (
    Column("repository", lambda row: row.repo, 0, right=False, keeps=45),
    Column("level", lambda row: row.level or "?", 0, right=False),
    Column("GB", lambda row: f"{row.nbytes / 1e9:.1f}" if row.nbytes else "?", 0),
    Column("fits in", lambda row: row.fits or "?", 0, right=False),
    Column("downloads", lambda row: f"{row.downloads:,}" if row.downloads else "", 1),
    Column("licence", lambda row: row.licence, 3, right=False),
    Column("access", lambda row: "gated" if row.gated else "open", 2, right=False),
)


def print_search(rows: Sequence[Row], machine: str, usable: int, console: Console | None = None) -> None:
    """The table, what its heads mean, and what to type next."""
    from rich.text import Text

    out = console or terminal_console()
    table, left_out = fitted_table(COLUMNS, rows, out.width)
    out.print(table)
    narrow = f" Left out for width: {', '.join(left_out)}." if left_out else ""
    closed = [row.repo for row in rows if row.gated]
    gated = f" Gated (accept the conditions on the hub first): {', '.join(closed)}." if closed else ""
    out.print(
        Text(
            f"GB: what is downloaded. fits in: by size, in the {human_bytes(usable)} that {machine} leaves for a "
            f"model; `bitladder plan hf:ORG/NAME` is exact. downloads: in 30 days.{gated}{narrow}",
            style="dim",
        )
    )
    first = next((row for row in rows if row.level), rows[0])
    out.print(Text(f"All its levels: bitladder search hf:{first.repo}"))
    out.print(Text(f"Fetch one:      bitladder pull hf:{first.repo}:{first.level or 'LEVEL'}"))
