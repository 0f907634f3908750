"""Rivals beside one another, told to a person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitladder.records.bench import BenchFigure, BenchRecord, Rival
from bitladder.report.columns import Column, fitted_table
from bitladder.report.rows import UNKNOWN, interval, number, percent, small
from bitladder.report.terminal import terminal_console

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class _Line:
    rival: Rival
    figure: BenchFigure
    text: str


def _share(line: _Line) -> str:
    return number(line.figure.ratio, 3)


LOSSES: tuple[Column[_Line], ...] = (
    Column("rival", lambda line: line.rival.name, 0, right=False, keeps=24),
    Column("text", lambda line: line.text, 0, right=False, keeps=16),
    Column("bytes", lambda line: f"{line.rival.bytes:,}", 0),
    Column("bpw", lambda line: number(line.rival.bpw, 3) if line.rival.bpw == line.rival.bpw else UNKNOWN, 4),
    Column("KL", lambda line: small(line.figure.fidelity.kl_mean), 0),
    Column(
        "95%", lambda line: interval(line.figure.fidelity.kl_low, line.figure.fidelity.kl_high, small), 1, right=False,
        spoken="KL's 95%",
    ),
    Column("share", _share, 0),
    Column(
        "95% ", lambda line: interval(line.figure.ratio_low, line.figure.ratio_high, lambda one: number(one, 3)), 0,
        right=False, spoken="share's 95%",
    ),
    Column("top-1", lambda line: percent(line.figure.fidelity.top1, 1), 2),
    Column("sha256", lambda line: line.rival.sha256[:12], 3, right=False),
)  # fmt: skip


def print_bench(record: BenchRecord, console: Console | None = None) -> None:
    """The table, what its columns mean, and whole hashes."""
    out = console or terminal_console()
    of_name = {rival.name: rival for rival in record.rivals}
    lines = [_Line(of_name[figure.rival], figure, text.name) for text in record.texts for figure in text.figures]
    table, left_out = fitted_table(LOSSES, lines, out.width)
    out.print(table)
    if left_out:
        out.print(f"Not shown: {', '.join(left_out)}.", style="dim")
    out.print(
        f"KL: from {record.model}'s predictions, nats per token; share: of {record.against}'s, paired.", style="dim"
    )
    for text in record.texts:
        one = text.figures[0].fidelity
        words = f"{text.name}: {one.tokens:,} scored tokens in {one.units} {one.unit}s, sha256 {text.sha256[:12]}"
        words += "; too little for intervals" if one.units < 2 else ""
        out.print(f"{words}.", style="dim")
    out.print(f"model  sha256 {record.model_sha256}", style="dim", soft_wrap=True)
    for rival in record.rivals:
        out.print(f"{rival.name}  sha256 {rival.sha256}", style="dim", soft_wrap=True)
