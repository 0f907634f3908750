"""What hardware each level needs, on the terminal, with money where the user filled in prices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitladder.plan.inverse import GpuNeed, HardwareNeed, Saving
from bitladder.report.columns import Column, fitted_table
from bitladder.report.terminal import terminal_console
from bitladder.units import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

KINDS_SHOWN = 3
"""Kinds of GPUs a row names: those with a price first, then the fewest and smallest."""


def needs_table(model: str, rows: Sequence[HardwareNeed], n_ctx: int, console: Console | None = None) -> None:
    """Per level the RAM or the GPUs that run it, what they cost, and what is saved against 16 bits."""
    from rich.text import Text

    out = console or terminal_console()
    out.print(Text(f"What each level of {model} needs at a context of {n_ctx:,} tokens", style="bold"))
    priced = any(_has_price(need) for row in rows for need in row.gpus)
    columns = [column for column in COLUMNS if priced or column.title not in ("price", "saved")]
    table, left_out = fitted_table(columns, rows, out.width)
    out.print(table)
    told = ["in memory: weights, cache and buffers. RAM: of a machine that runs it on the CPU beside its system."]
    told += ["or GPUs: everything on them, embedding table aside."]
    if priced:
        told.append(
            "price, saved: of the first GPUs with a price in your prices.yaml; saved against F16 on the same kind."
        )
    else:
        told.append("Prices: none in prices.yaml (key gpus) in the data folder, so no money is shown.")
    told += [f"Left out for width: {', '.join(left_out)}."] if left_out else []
    out.print(Text(" ".join(told), style="dim"))


def shown(row: HardwareNeed) -> list[GpuNeed]:
    """The kinds of GPUs that a row names."""
    possible = [need for need in row.gpus if need.count]
    return sorted(possible, key=lambda need: not _has_price(need))[:KINDS_SHOWN]


def _has_price(need: GpuNeed) -> bool:
    return need.purchase is not None or need.hourly is not None


def _gpus(row: HardwareNeed) -> str:
    return ", ".join(f"{need.count} x {need.name}" for need in shown(row)) or "none known is large enough"


def _price(row: HardwareNeed) -> str:
    first = next((need for need in shown(row) if _has_price(need)), None)
    return _money(first.purchase, first.hourly) if first else ""


def _saved(row: HardwareNeed) -> str:
    first = next((need for need in shown(row) if _has_price(need)), None)
    saving = next((one for one in row.savings if first and one.gpu == first.name), None)
    return _saving(saving) if saving else ""


def _saving(saving: Saving) -> str:
    if saving.gpus == saving.gpus_f16:
        return "0"
    return f"{_money(saving.purchase, saving.hourly)} ({saving.gpus} for {saving.gpus_f16})"


def _money(purchase: float | None, hourly: float | None) -> str:
    parts = [] if purchase is None else [f"{purchase:,.0f}"]
    parts += [] if hourly is None else [f"{hourly:,.2f}/h"]
    return ", ".join(parts)


COLUMNS: tuple[Column[HardwareNeed], ...] = (
    Column("level", lambda row: row.level, 0, right=False),
    Column("in memory", lambda row: human_bytes(row.total_bytes), 0),
    Column("RAM", lambda row: f"{row.ram_gib} GiB", 0),
    Column("or GPUs", _gpus, 0, right=False, keeps=14),
    Column("price", _price, 1),
    Column("saved", _saved, 0),
)
