"""One HTML file with the whole run: no scripts, no requests, everything from outside escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from bitladder.files.atomic import write_whole
from bitladder.files.outputs import check_output, holding
from bitladder.records.decision import Status
from bitladder.records.run import RunRecord
from bitladder.report.answers import compared_answers
from bitladder.report.behaviour import behaviour_lines
from bitladder.report.chart import Axis, Point, find_cliff, loss_chart
from bitladder.report.facts import facts, warnings
from bitladder.report.meanings import HEADS, LOSSES, VERDICTS
from bitladder.report.reading import RUN_JSON
from bitladder.report.rows import LevelRow, cost_lines, front_line, left_out, level_rows, over_caches
from bitladder.report.tables import evidence_tables
from bitladder.report.wording import answers_columns, answers_rows
from bitladder.units import GiB, MiB, human_bytes


def write_html(record: RunRecord, path: Path) -> Path:
    """Write the report, whole or not at all; returns the path.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_whole(path, render_html(record))


def check_html(
    path: Path,
    *,
    source_sha256: Callable[[], str],
    created: str = "",
    inputs: Sequence[Path] = (),
    force: bool | None = None,
) -> None:
    """Raises UsageError where a report would take the place of anything but a report of the same source (and, with
    ``created``, of the same run).
    """

    def is_ours(there: Path) -> bool:
        return holding("<!doctype html>", "Bitladder", source_sha256(), created or "Bitladder")(there)

    check_output(path, "a report", inputs=inputs, ours=is_ours, force=force)


def report_beside(record: Path) -> Path:
    """Where a record's report lies: ``report.html`` beside the ``run.json`` of a run; beside a record that was given
    another name, under that name.
    """
    return record.with_name("report.html") if record.name == RUN_JSON else record.with_suffix(".html")


def render_html(record: RunRecord) -> str:
    """The report's text. The same record always gives the same text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("bitladder") / "data" / "report"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "report.html").read_text(encoding="utf-8"))
    rows = level_rows(record)
    return template.render(
        run=record,
        rows=rows,
        tiers=[row for row in rows if row.tier],
        # Both are made by us: the style sheet is shipped, and the charts escape every text they hold.
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        charts=[{name: Markup(text) for name, text in chart.items()} for chart in _charts(record, rows)],
        cliff=None if over_caches(record) else find_cliff(_points(rows, "size", GiB)),
        front=front_line(record),
        tags=_tag_table(record),
        compared=compared_answers(record),
        answers={"rows": answers_rows(record), "columns": answers_columns(answers_rows(record))},
        behaviour=behaviour_lines(record),
        repetition=[result for result in record.results if result.repetition or result.reference_repetition],
        evidence=evidence_tables(record),
        human_bytes=human_bytes,
        sentence=lambda text: text[:1].upper() + text[1:],
        facts=facts,
        costs=cost_lines(record),
        left_out=left_out(record, rows),
        heads=HEADS,
        verdicts=VERDICTS,
        losses=LOSSES,
        warnings=warnings(record),
    )


def _points(rows: Sequence[LevelRow], across: str, unit: float) -> list[Point]:
    """Levels with a measured loss; the reference has none and stays out."""
    points = []
    for row in rows:
        if row.fidelity is None or row.verdict.status == Status.REFERENCE:
            continue
        speed = row.result.decode_tokens_per_s if row.result else math.nan
        x = {"size": row.bytes / unit, "memory": row.plan.total_bytes / unit, "speed": speed}[across]
        found = row.fidelity
        points.append(Point(row.level, x, found.kl_mean, found.kl_low, found.kl_high, row.tier))
    return points


def _charts(record: RunRecord, rows: Sequence[LevelRow]) -> list[dict[str, str]]:
    """Loss against size (memory, of levels with several caches) and against speed, each drawn for a wide and for a
    narrow page."""
    limit = _kl_limit(record.decision.bar)
    largest = max((row.bytes for row in rows), default=0)
    unit, name = (GiB, "GiB") if largest >= 2 * GiB else (MiB, "MiB")
    size, of = Axis("file size", name), "size"
    if over_caches(record):
        size, of = Axis(f"memory at {record.plan.n_ctx:,} tokens of context", name, ladder=False), "memory"
    speed = Axis("decode speed", "tokens/s", ladder=False)
    charts = []
    for across, axis, scale, width in ((of, size, unit, 600), ("speed", speed, 1, 420)):
        points = _points(rows, across, scale)
        wide = loss_chart(points, axis, limit=limit, width=width, height=380, name=f"{across}-wide")
        narrow = loss_chart(points, axis, limit=limit, width=360, height=380, name=f"{across}-narrow")
        if wide:
            charts.append({"wide": wide, "narrow": narrow})
    return charts


def _kl_limit(bar: str) -> float | None:
    """The bar's limit on the mean KL, if it has one."""
    from bitladder.plan.bar import parse_bar

    return next((clause.value for clause in parse_bar(bar).clauses if clause.metric == "kl"), None)


def _tag_table(record: RunRecord) -> dict[str, Any]:
    """Levels across, tags down; empty when the workload has no tags."""
    verdicts = record.decision.tags
    levels = list(dict.fromkeys(verdict.level for verdict in verdicts))
    tags = sorted({verdict.tag for verdict in verdicts})
    cells = {(verdict.tag, verdict.level): verdict for verdict in verdicts}
    rows = []
    for tag in tags:
        own = [cells.get((tag, level)) for level in levels]
        rows.append((tag, max(cell.inputs for cell in own if cell), own))
    return {"levels": levels, "rows": rows}
