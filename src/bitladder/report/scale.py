"""What a long job takes on GPUs and nodes, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitladder.plan.scale import RANGE, ScaleCost
from bitladder.report.columns import Column, fitted_table
from bitladder.report.rows import percent
from bitladder.report.sweep import human_time
from bitladder.report.terminal import terminal_console
from bitladder.units import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS: tuple[Column[ScaleCost], ...] = (
    Column("workers", lambda one: one.workers, 0, right=False),
    Column("with work", lambda one: str(one.busy), 3),
    Column("time", lambda one: f"{human_time(one.low_s)} to {human_time(one.high_s)}", 0),
    Column("operations", lambda one: f"{one.flops:.1e}", 4),
    Column("memory of each", lambda one: human_bytes(one.memory_bytes), 1),
    Column("fits", lambda one: "yes" if one.fits else "no", 1),
    Column("moved", lambda one: human_bytes(one.moved_bytes), 2),
    Column("disk", lambda one: human_bytes(one.disk_bytes), 3),
    Column("alone", lambda one: percent(one.waiting_share, 0), 4, spoken="share of the time in which one works alone"),
)


def print_job_costs(model: str, job: str, costs: Sequence[ScaleCost], console: Console | None = None) -> None:
    """The table, and what it rests on."""
    out = console or terminal_console()
    out.print(f"{job} of {model}")
    table, left_out = fitted_table(COLUMNS, list(costs), out.width)
    out.print(table)
    if left_out:
        out.print(f"Not shown: {', '.join(left_out)}.", style="dim")
    out.print(f"From data sheets, good to a factor of {RANGE:g}; nothing of it was measured on a GPU or a cluster.")
