"""Tables on the terminal. They shrink with it: what does not fit is left out and named, never wrapped into
soup."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitladder.records.decision import Status
from bitladder.records.fidelity import Fidelity
from bitladder.records.plan import Plan, PlanSpeed
from bitladder.records.run import RunRecord
from bitladder.report.facts import warnings
from bitladder.report.rows import LevelRow, interval, level_rows, number, percent, small
from bitladder.report.wording import wording_lines
from bitladder.units import human_bytes, human_rate
from bitladder.visible import console as visible_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bitladder.records.search import LadderOutcome

STYLES = {
    Status.QUALITY: "bold blue",
    Status.SPEED: "bold yellow",
    Status.BOTH: "bold green",
    Status.MEETS: "green",
    Status.FAILS: "red",
    Status.UNKNOWN: "magenta",
    Status.DOES_NOT_FIT: "dim",
    Status.REFERENCE: "dim",
}
LOG_WIDTH = 150
"""Columns to write when the output is no terminal."""


@dataclass(frozen=True)
class Column:
    """A column, its reader, and its rank: the highest ranks are left out first on a narrow terminal."""

    title: str
    read: Callable[[LevelRow], str]
    rank: int
    right: bool = True


COLUMNS = (
    Column("level", lambda row: row.level, 0, right=False),
    Column("file", lambda row: row.size, 0),
    Column("bpw", lambda row: row.bpw, 3),
    Column("on label", lambda row: row.on_label, 6),
    Column("memory", lambda row: row.memory, 4),
    Column("tok/s", lambda row: row.decode, 1),
    Column("KL", lambda row: row.kl, 0),
    Column("95%", lambda row: row.kl_interval, 2, right=False),
    Column("ppl ratio", lambda row: row.ppl_ratio, 5),
    Column("top-1", lambda row: row.top1, 3),
    Column("passes", lambda row: row.passes, 1),
    Column("95% ", lambda row: row.pass_interval, 5, right=False),
    Column("verdict", lambda row: row.verdict.status, 0, right=False),
)


def print_run(record: RunRecord, console: Console | None = None) -> None:
    """The whole run: the table, a reason for each level, the decision, and what to measure next."""
    from rich.padding import Padding
    from rich.text import Text

    out = console or _console()
    rows = level_rows(record)
    source = record.source
    out.print(Text(f"{source.name}  {source.level} source", style="bold"))
    out.print(Text(f"{record.plan.machine}, context {record.plan.n_ctx}, bar: {record.decision.bar}", style="dim"))
    for warning in warnings(record):
        out.print(Text(f"! {warning}", style="yellow"))
    table, left_out = _level_table(rows, out.width)
    out.print(table)
    if left_out:
        out.print(Text(f"Left out for width: {', '.join(left_out)}.", style="dim"))
    wide = max((len(row.level) for row in rows), default=0) + 2
    for row in rows:
        line = Text.assemble((f"{row.level:<{wide}}", "bold"), (row.verdict.status, STYLES[row.verdict.status]))
        out.print(line.append(f": {row.verdict.reason}"))
    for level, notes in wording_lines(record).items():
        out.print(Text.assemble((f"{level:<{wide}}", "bold"), ("answers", "dim")).append(f": {notes}"))
    out.print()
    out.print(Text(record.decision.summary, style="bold"))
    for step in record.decision.next:
        out.print(Padding(Text(f"To find out more: {step}", style="dim"), (0, 0, 0, 2)))


def _level_table(rows: Sequence[LevelRow], width: int) -> tuple[Table, list[str]]:
    """As many columns as fit."""
    from rich.text import Text

    chosen, left_out = _columns_that_fit(rows, width)
    table = _plain_table()
    for column in chosen:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
    for row in rows:
        style = STYLES[row.verdict.status]
        table.add_row(
            *(Text(column.read(row), style=style if column.title in ("level", "verdict") else "") for column in chosen)
        )
    return table, left_out


def _columns_that_fit(rows: Sequence[LevelRow], width: int) -> tuple[list[Column], list[str]]:
    """Leave out by rank until the table fits."""
    chosen = list(COLUMNS)

    def wide(column: Column) -> int:
        return 3 + max([len(column.title), *(len(column.read(row)) for row in rows)])

    while sum(map(wide, chosen)) + 1 > width and any(column.rank for column in chosen):
        chosen.remove(max(chosen, key=lambda column: column.rank))
    return chosen, [_spoken(column) for column in COLUMNS if column not in chosen]


def _spoken(column: Column) -> str:
    return {"95%": "KL interval", "95% ": "pass interval"}.get(column.title, column.title)


def plan_table(plan: Plan, console: Console | None = None) -> None:
    """What fits on this machine, and why."""
    from rich.text import Text

    out = console or _console()
    room = human_bytes(plan.budget_bytes)
    out.print(Text(f"{plan.model}  {plan.architecture}", style="bold"))
    out.print(Text(f"{plan.machine}, {room} for the model at a context of {plan.n_ctx} tokens", style="dim"))
    table = _plain_table()
    rates = any(level.speed for level in plan.levels)
    for title in (
        "level",
        "file",
        "bpw",
        "on label",
        "KV cache",
        "in memory",
        *(["tokens/s"] if rates else []),
        "fits",
    ):
        table.add_column(title, justify="left" if title in ("level", "fits") else "right", no_wrap=True)
    table.add_column("why")
    for level in plan.levels:
        table.add_row(
            level.level,
            human_bytes(level.file_bytes),
            f"{level.bpw:.2f}",
            percent(level.on_label_share, 0),
            human_bytes(level.kv_bytes),
            human_bytes(level.total_bytes),
            *([_expected(level.speed)] if rates else []),
            Text("yes", style="green") if level.fits else Text("no", style="red"),
            level.reason,
        )
    out.print(table)


def _expected(speed: PlanSpeed | None) -> str:
    """Decode speed that the plan expects, with its range."""
    return "" if speed is None else f"{human_rate(speed.decode.low)}-{human_rate(speed.decode.high)}"


def fidelity_table(fidelities: Sequence[Fidelity], console: Console | None = None) -> None:
    """Token-level losses of levels and files against the reference."""
    out = console or _console()
    table = _plain_table()
    for title in (
        "level",
        "KL mean",
        "95%",
        "median",
        "p99",
        "max",
        "ppl",
        "ppl ratio",
        "95%",
        "top-1",
        "tokens",
    ):
        table.add_column(title, justify="left" if title in ("level", "95%") else "right", no_wrap=True)
    for one in fidelities:
        table.add_row(
            one.level,
            small(one.kl_mean),
            interval(one.kl_low, one.kl_high, small),
            small(one.kl_median),
            small(one.kl_p99),
            small(one.kl_max),
            number(one.ppl, 4),
            f"{one.ppl_ratio:.4f}" if math.isfinite(one.ppl_ratio) else "–",
            interval(one.ppl_ratio_low, one.ppl_ratio_high, lambda ratio: f"{ratio:.3f}"),
            percent(one.top1, 1),
            f"{one.tokens:,}",
        )
    out.print(table)
    if fidelities:
        one = fidelities[0]
        out.print(f"Intervals resample {one.units} {one.unit}s, not tokens.", style="dim")


def search_table(outcome: LadderOutcome, bar: str, console: Console | None = None) -> None:
    """What a search for the smallest level found, and how little it asked."""
    from rich.text import Text

    from bitladder.stats.sequential import Standing

    out = console or _console()
    table = _plain_table()
    for title in ("level", "inputs asked", "standing"):
        table.add_column(title, justify="right" if title == "inputs asked" else "left")
    for level, used, standing in zip(outcome.levels, outcome.inputs_used, outcome.standings, strict=True):
        said = {
            Standing.OPEN: "ran out of inputs" if used else "not asked",
            Standing.UNLIKELY: "unlikely to meet the bar",
        }
        table.add_row(level, str(used or "\u2013"), said.get(Standing(standing), f"{standing} the bar"))
    out.print(table)
    asked = f"{sum(outcome.inputs_used)} inputs asked of {sum(map(bool, outcome.inputs_used))} levels"
    if outcome.chosen and outcome.decided:
        found = f"{outcome.chosen} is the smallest level known to hold '{bar}' ({asked})."
    elif outcome.chosen:
        found = f"{outcome.chosen} holds '{bar}'; a smaller one might, with more inputs ({asked})."
    elif outcome.decided:
        found = f"No level holds '{bar}' ({asked})."
    else:
        found = f"The workload has too few inputs to tell whether a level holds '{bar}' ({asked})."
    out.print(Text(found, style="bold"))


def _plain_table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1, 0, 1))


def _console() -> Console:
    found = visible_console(highlight=False)
    return found if found.is_terminal else visible_console(highlight=False, width=max(LOG_WIDTH, found.width))
