"""A sweep, told to a person: what it will take, a line for each job that ends, one HTML file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.files.atomic import write_whole
from bitladder.files.outputs import check_output, holding
from bitladder.records import to_json
from bitladder.records.sweep import SweepCost, SweepRecord, SweepRow, SweepState
from bitladder.report.columns import Column, fitted_table
from bitladder.report.rows import UNKNOWN, number, small
from bitladder.report.terminal import terminal_console
from bitladder.units import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

SWEEP_JSON, SWEEP_HTML = "sweep.json", "sweep.html"


@dataclass(frozen=True)
class _Line:
    """A job with what it will take."""

    row: SweepRow
    cost: SweepCost
    currency: str = ""


def _ladder(row: SweepRow) -> str:
    return ", ".join(row.levels) or "the usual"


def _time(cost: SweepCost) -> str:
    if cost.high_s <= 0:
        return UNKNOWN if cost.note else "0"
    return f"{human_time(cost.low_s)} to {human_time(cost.high_s)}"


def human_time(seconds: float) -> str:
    """Seconds, minutes or hours, as a person says them."""
    if not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{number(seconds / 3600, 3)} h"


def _money(cost: SweepCost, currency: str) -> str:
    return f"{cost.money:,.2f} {currency}".strip() if math.isfinite(cost.money) else ""


PLANNED: tuple[Column[_Line], ...] = (
    Column("model", lambda line: line.row.model, 0, right=False, keeps=24),
    Column("levels", lambda line: _ladder(line.row), 3, right=False, keeps=16),
    Column("workload", lambda line: line.row.workload, 1, right=False, keeps=12),
    Column("bar", lambda line: line.row.bar or "the usual", 2, right=False, keeps=12),
    Column("time", lambda line: _time(line.cost), 0),
    Column("disk", lambda line: human_bytes(line.cost.disk_bytes) if line.cost.disk_bytes else "", 1),
    Column("cost", lambda line: _money(line.cost, line.currency), 1),
    Column("", lambda line: "stored" if line.row.state is SweepState.STORED else line.cost.note, 4, right=False),
)


def print_sweep_plan(record: SweepRecord, console: Console | None = None) -> None:
    """What each job will take, and all of them."""
    out = console or terminal_console()
    lines = [_Line(row, cost, record.currency) for row, cost in zip(record.rows, record.costs, strict=True)]
    table, left_out = fitted_table(PLANNED, lines, out.width)
    out.print(table)
    if left_out:
        out.print(f"Not shown: {', '.join(name for name in left_out if name)}.", style="dim")
    out.print(plan_sentence(record))


def plan_sentence(record: SweepRecord) -> str:
    """All jobs together."""
    whole = sum(record.costs, SweepCost(money=0.0))
    stored = sum(row.state is SweepState.STORED for row in record.rows)
    disk = human_bytes(whole.disk_bytes)
    parts = [f"{len(record.rows)} jobs", *([f"{stored} of them stored already"] if stored else [])]
    parts.append(f"{human_time(whole.low_s)} to {human_time(whole.high_s)} on this machine, {disk} of disk")
    money = whole.money if math.isfinite(whole.money) else math.nan
    if money > 0:
        parts.append(f"about {_money(whole, record.currency)}")
    unknown = sum(bool(cost.note) for cost in record.costs)
    return ", ".join(parts) + (f"; of {unknown} nothing is known, or they do not fit." if unknown else ".")


def sweep_line(row: SweepRow) -> str:
    """A job that ended, in one line."""
    what = f"{row.model}, {_ladder(row)}, {row.workload}, {row.bar or 'the usual bar'}"
    if row.state is SweepState.FAILED:
        return f"{what}: failed: {row.error}"
    again = " (stored)" if row.state is SweepState.STORED else f" ({human_time(row.seconds)})"
    return f"{what}: {_decided(row)}{again}"


def _decided(row: SweepRow) -> str:
    if not row.quality:
        return f"no level holds the bar: {row.outcome}"
    faster = f" with {row.speed}" if row.speed and row.speed != row.quality else ""
    figures = [f"KL {small(row.kl)}" if math.isfinite(row.kl) else "", f"passes {row.passes}" if row.passes else ""]
    return f"{row.quality}{faster}, " + ", ".join([*filter(None, figures), human_bytes(row.file_bytes)])


def check_sweep(out: Path) -> None:
    """Raises UsageError where a sweep's files would take the place of others."""
    check_output(out / SWEEP_JSON, "a sweep's record", ours=holding('"bitladder": "', '"rows": '))
    check_output(out / SWEEP_HTML, "a sweep's report", ours=holding("<!doctype html>", "Bitladder", "sweep"))


def write_sweep(record: SweepRecord, out: Path) -> Path:
    """Write ``sweep.json`` and ``sweep.html``, each whole or not at all; returns the latter's path.

    Raises:
        OutputError: one cannot be written.
    """
    write_whole(out / SWEEP_JSON, json.dumps(to_json(record), ensure_ascii=False, indent=1) + "\n")
    return write_whole(out / SWEEP_HTML, render_sweep(record))


def render_sweep(record: SweepRecord) -> str:
    """The report's text: no scripts, no requests, everything from outside escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("bitladder") / "data" / "report"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "sweep.html").read_text(encoding="utf-8"))
    return template.render(
        sweep=record,
        rows=[_told(row) for row in record.rows],
        plan=plan_sentence(replace(record, costs=record.costs or (SweepCost(),) * len(record.rows))),
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),  # shipped
    )


def _told(row: SweepRow) -> dict[str, str]:
    """A row in words."""
    return {
        "model": row.model,
        "levels": _ladder(row),
        "workload": row.workload,
        "bar": row.bar or "the usual",
        "state": row.state,
        "quality": row.quality or UNKNOWN,
        "speed": row.speed or UNKNOWN,
        "size": human_bytes(row.file_bytes) if row.file_bytes else UNKNOWN,
        "kl": small(row.kl),
        "passes": row.passes or UNKNOWN,
        "decode": number(row.decode, 3),
        "seconds": human_time(row.seconds),
        "report": row.report,
        "why": row.error or row.summary,
        "machine": row.machine,
    }


def print_sweep(rows: Sequence[SweepRow], console: Console | None = None) -> None:
    """All jobs as a table."""
    out = console or terminal_console()
    table, left_out = fitted_table(ENDED, list(rows), out.width)
    out.print(table)
    if left_out:
        out.print(f"Not shown: {', '.join(left_out)}.", style="dim")


ENDED: tuple[Column[SweepRow], ...] = (
    Column("model", lambda row: row.model, 0, right=False, keeps=24),
    Column("levels", _ladder, 5, right=False, keeps=16),
    Column("workload", lambda row: row.workload, 1, right=False, keeps=12),
    Column("bar", lambda row: row.bar or "the usual", 2, right=False, keeps=12),
    Column("state", lambda row: row.state, 0, right=False),
    Column("quality", lambda row: row.quality or UNKNOWN, 0, right=False),
    Column("speed", lambda row: row.speed or UNKNOWN, 1, right=False),
    Column("file", lambda row: human_bytes(row.file_bytes) if row.file_bytes else "", 2),
    Column("KL", lambda row: small(row.kl), 2),
    Column("passes", lambda row: row.passes, 3),
    Column("tok/s", lambda row: number(row.decode, 3), 4),
    Column("took", lambda row: human_time(row.seconds), 4),
)
