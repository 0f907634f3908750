"""Tables on the terminal. They shrink with it: what does not fit is left out and named, never wrapped into
soup."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bitladder.records.decision import Status
from bitladder.records.fidelity import Fidelity
from bitladder.records.plan import LevelPlan, Plan, PlanSpeed
from bitladder.records.run import RunRecord
from bitladder.report.behaviour import behaviour_lines
from bitladder.report.columns import Column, columns_that_fit, fitted_table, plain_table
from bitladder.report.facts import warnings
from bitladder.report.meanings import heads_in_words
from bitladder.report.rows import (
    LevelRow,
    cost_lines,
    front_line,
    interval,
    left_out,
    level_rows,
    number,
    over_caches,
    percent,
    small,
)
from bitladder.report.tables import Cell, Table, depth_table, evidence_tables, rises
from bitladder.report.wording import AnswersRow, answers_columns, answers_rows, wording_lines
from bitladder.units import human_bytes, human_rate
from bitladder.visible import console as visible_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

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


COLUMNS: tuple[Column[LevelRow], ...] = (
    Column("level", lambda row: row.level, 0, right=False, style=lambda row: STYLES[row.verdict.status]),
    Column("file", lambda row: row.size, 0),
    Column("bpw", lambda row: row.bpw, 3),
    Column("on label", lambda row: row.on_label, 6),
    Column("memory", lambda row: row.memory, 4),
    Column("tok/s", lambda row: row.decode, 1),
    Column("KL", lambda row: row.kl, 0),
    Column("95%", lambda row: row.kl_interval, 2, right=False, spoken="KL interval"),
    Column("ppl ratio", lambda row: row.ppl_ratio, 5),
    Column("top-1", lambda row: row.top1, 3),
    Column("passes", lambda row: row.passes, 1),
    Column("95% ", lambda row: row.pass_interval, 5, right=False, spoken="pass interval"),
    Column("cost", lambda row: row.cost, 2),
    Column("saved", lambda row: row.saved, 2),
    Column("verdict", lambda row: row.verdict.status, 0, right=False, style=lambda row: STYLES[row.verdict.status]),
)


def print_run(record: RunRecord, console: Console | None = None) -> None:
    """The whole run: the table, a reason for each level, the decision, and what to measure next."""
    from rich.padding import Padding
    from rich.text import Text

    out = console or terminal_console()
    rows = level_rows(record)
    source = record.source
    out.print(Text(f"{source.name}  {source.level} source", style="bold"))
    out.print(Text(f"{record.plan.machine}, context {record.plan.n_ctx}, bar: {record.decision.bar}", style="dim"))
    for warning in warnings(record):
        out.print(Text(f"! {warning}", style="yellow"))
    money = ("cost", "saved")
    columns = [column for column in COLUMNS if record.costs or column.title not in money]
    if over_caches(record):  # of one file: what differs is the memory
        ranks = {"file": 4, "memory": 0}
        columns = [replace(column, rank=ranks.get(column.title, column.rank)) for column in columns]
    table, narrowed = fitted_table(columns, rows, out.width)
    out.print(table)
    for words in heads_in_words(("KL", "ppl ratio", "top-1", "passes", *(("cost",) if record.costs else ()))):
        out.print(Text(words, style="dim"))
    if dashes := left_out(record, rows):
        out.print(Text(dashes, style="dim"))
    if narrowed:
        out.print(Text(f"Left out for width: {', '.join(narrowed)}.", style="dim"))
    if over_caches(record) and (front := front_line(record)):
        out.print(Text(front))
    wide = max((len(row.level) for row in rows), default=0) + 2
    for row in rows:
        line = Text.assemble((f"{row.level:<{wide}}", "bold"), (row.verdict.status, STYLES[row.verdict.status]))
        out.print(line.append(f": {row.verdict.reason}"))
    _print_answers(record, out)
    for level, notes in wording_lines(record).items():
        out.print(Text.assemble((f"{level:<{wide}}", "bold"), ("answers", "dim")).append(f": {notes}"))
    for level, notes in behaviour_lines(record).items():
        out.print(Text.assemble((f"{level:<{wide}}", "bold"), ("behaviour", "dim")).append(f": {notes}"))
    for evidence in evidence_tables(record):
        out.print()
        out.print(Text(evidence.title, style="bold"))
        print_table(evidence, out)
        out.print(Text(evidence.lead, style="dim"))
    out.print()
    out.print(Text(record.decision.summary, style="bold"))
    for sentence in cost_lines(record):
        out.print(Text(sentence))
    for step in record.decision.next:
        out.print(Padding(Text(f"To find out more: {step}", style="dim"), (0, 0, 0, 2)))


def _print_answers(record: RunRecord, out: Console) -> None:
    """What changed in the answers of every level."""
    from rich.text import Text

    rows = answers_rows(record)
    if not rows:
        return
    shown = answers_columns(rows)
    columns: list[Column[AnswersRow]] = [Column("answers of", lambda row: row.level, 0, right=False)]
    columns += [Column(one.title, one.read, rank) for rank, one in enumerate(shown)]
    table, left_out = fitted_table(columns, rows, out.width)
    out.print()
    out.print(table)
    for one in shown:
        if one.title not in left_out:
            out.print(Text(f"{one.title}: {one.means}.", style="dim"))


PLAN_COLUMNS: tuple[Column[LevelPlan], ...] = (
    Column("level", lambda row: row.level, 0, right=False),
    Column("file", lambda row: human_bytes(row.file_bytes), 0),
    Column("bpw", lambda row: f"{row.bpw:.2f}", 3),
    Column("on label", lambda row: percent(row.on_label_share, 0), 5),
    Column("KV cache", lambda row: human_bytes(row.kv_bytes), 4),
    Column("in memory", lambda row: human_bytes(row.total_bytes), 2),
    Column("tokens/s", lambda row: _expected(row.speed), 0),
    Column(
        "fits",
        lambda row: "yes" if row.fits else "no",
        0,
        right=False,
        style=lambda row: "green" if row.fits else "red",
    ),
    Column("why", lambda row: row.reason, 7, right=False, wraps=True),
)
PLAN_HEADS = {
    **{name: heads_in_words([name])[0] for name in ("bpw", "on label")},
    "KV cache": "KV cache: what the context takes.",
    "in memory": "in memory: weights, cache and buffers.",
    "tokens/s": "tokens/s: expected when answering.",
}
"""What heads mean, for the lines beneath a table."""


def plan_table(plan: Plan, console: Console | None = None) -> None:
    """What fits on this machine, and why."""
    from rich.text import Text

    out = console or terminal_console()
    room = human_bytes(plan.budget_bytes)
    out.print(Text(f"{plan.model}  {plan.architecture}", style="bold"))
    out.print(Text(f"{plan.machine}, {room} for the model at a context of {plan.n_ctx} tokens", style="dim"))
    columns = [one for one in PLAN_COLUMNS if one.title != "tokens/s" or any(level.speed for level in plan.levels)]
    table, left_out = fitted_table(columns, plan.levels, out.width)
    out.print(table)
    if "why" in left_out:
        for row in plan.levels:
            out.print(Text.assemble((f"{row.level:<9}", "bold"), row.reason))
    out.print(Text(_heads(columns, left_out), style="dim"))


def _heads(columns: Sequence[Column[LevelPlan]], left_out: Sequence[str]) -> str:
    """What the heads that are shown mean, and which are not shown."""
    shown = [PLAN_HEADS[one.title] for one in columns if one.title in PLAN_HEADS and one.title not in left_out]
    hidden = [title for title in left_out if title != "why"]
    return " ".join([*shown, *([f"Left out for width: {', '.join(hidden)}."] if hidden else [])])


def _expected(speed: PlanSpeed | None) -> str:
    """Decode speed that the plan expects, with its range."""
    return "" if speed is None else f"{human_rate(speed.decode.low)}-{human_rate(speed.decode.high)}"


def fidelity_table(fidelities: Sequence[Fidelity], console: Console | None = None) -> None:
    """Token-level losses of levels and files against the reference."""
    out = console or terminal_console()
    table = plain_table()
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
    for line in heads_in_words(("KL", "ppl ratio", "top-1")):
        out.print(line, style="dim")
    if any(one.depths for one in fidelities):
        print_table(depth_table(fidelities), out)
        for line in rises(fidelities).values():
            out.print(line)
    if fidelities:
        one = fidelities[0]
        line = f"95%: intervals over {one.units} {one.unit}s, not over tokens."
        if one.units < 2:
            line = f"One {one.unit} is too little for intervals: measure on more text."
        out.print(line, style="dim")


def print_table(table: Table, out: Console) -> None:
    """A table of evidence; what is sure is bold. Where it is too wide, what stands beside a figure goes beneath it, and
    then the last columns are left out and named."""
    from rich.text import Text

    def drawn(between: str, width: int) -> tuple[RichTable, list[str]]:
        columns: list[Column[Sequence[Cell]]] = []
        for place, head in enumerate(table.heads):
            worded = place < 2 or any(row[place].beneath for row in table.rows)
            columns.append(Column(head, _reader(place, between), max(0, place - 1), right=not worded))
        chosen = columns_that_fit(columns, table.rows, width)
        shown = plain_table()
        for column in chosen:
            shown.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
        kept = [place for place, column in enumerate(columns) if column in chosen]
        for row in table.rows:
            cells = [(Text(row[place].text, "bold" if row[place].known else ""), row[place].beneath) for place in kept]
            shown.add_row(*(text.append(f"{between}{more}", "dim") if more else text for text, more in cells))
        return shown, [column.title for column in columns if column not in chosen]

    shown, left_out = drawn("  ", out.width)
    if left_out:
        shown, left_out = drawn("\n", out.width)
    out.print(shown)
    if left_out:
        out.print(Text(f"Left out for width: {', '.join(left_out)}.", style="dim"))


def _reader(place: int, between: str) -> Callable[[Sequence[Cell]], str]:
    """The widest line of a cell, by which columns are chosen."""

    def read(row: Sequence[Cell]) -> str:
        cell = row[place]
        return max(f"{cell.text}{between}{cell.beneath}".split("\n"), key=len) if cell.beneath else cell.text

    return read


def search_table(outcome: LadderOutcome, bar: str, console: Console | None = None) -> None:
    """What a search for the smallest level found, and how little it asked."""
    from rich.text import Text

    from bitladder.stats.sequential import Standing

    out = console or terminal_console()
    table = plain_table()
    for title in ("level", "inputs used", "standing"):
        table.add_column(title, justify="right" if title == "inputs used" else "left")
    for level, used, standing in zip(outcome.levels, outcome.inputs_used, outcome.standings, strict=True):
        said = {
            Standing.OPEN: "ran out of inputs" if used else "not tried",
            Standing.UNLIKELY: "unlikely to meet the bar",
        }
        table.add_row(level, str(used or "\u2013"), said.get(Standing(standing), f"{standing} the bar"))
    out.print(table)
    needed = f"{sum(outcome.inputs_used)} answers of {sum(map(bool, outcome.inputs_used))} levels were needed"
    if outcome.chosen and outcome.decided:
        found = f"{outcome.chosen} is the smallest level known to hold '{bar}' ({needed})."
    elif outcome.chosen:
        found = f"{outcome.chosen} holds '{bar}'; a smaller one might, which more inputs would show ({needed})."
    elif outcome.decided:
        found = f"No level holds '{bar}' ({needed})."
    else:
        found = f"The workload has too few inputs to decide whether a level holds '{bar}' ({needed})."
    out.print(Text(found, style="bold"))


def terminal_console() -> Console:
    """As wide as the terminal; for a log as wide as everything needs."""
    found = visible_console(highlight=False)
    return found if found.is_terminal else visible_console(highlight=False, width=max(LOG_WIDTH, found.width))
