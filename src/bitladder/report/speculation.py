"""What speculative decoding gains, as a table."""

from __future__ import annotations

from rich.console import Console

from bitladder.plan.speculation import paying
from bitladder.records.speculation import SpeculationReport
from bitladder.report.columns import plain_table
from bitladder.report.rows import interval, number, percent
from bitladder.units import human_bytes
from bitladder.visible import console as terminal_console


def speculation_table(report: SpeculationReport, console: Console | None = None) -> None:
    """Acceptance and gain of each way to guess, over all inputs and by tag, and what follows."""
    out = console or terminal_console(highlight=False)
    out.print(f"{report.model}: {report.inputs} inputs, {number(report.tokens_per_s, 3)} tokens/s without guesses")
    table = plain_table()
    for title in ("guesses", "inputs", "timed", "guessed", "right", "times as fast", "95%"):
        table.add_column(title, justify="left" if title in ("guesses", "inputs", "95%") else "right", no_wrap=True)
    for one in report.results:
        for at, gain in enumerate(one.gains):
            table.add_row(
                one.mode if not at else "",
                gain.tag or "all",
                str(gain.inputs),
                f"{gain.drafted:,}",
                percent(gain.acceptance, 0),
                number(gain.ratio, 3),
                interval(gain.low, gain.high, lambda ratio: f"{ratio:.3g}"),
            )
    out.print(table)
    best = paying(report.results)
    for one in report.results:
        same = "the same answers"
        if not one.lossless:
            shown = ", ".join(one.differing[:5]) + (", ..." if len(one.differing) > 5 else "")
            same = f"other answers to {len(one.differing)} of {report.inputs} inputs ({shown})"
        memory = f", {human_bytes(one.extra_bytes)} more memory" if one.extra_bytes else ""
        out.print(f"{one.mode}: {same}{memory}; {'surely pays' if one in best else 'is not known to pay'}")
    if report.unstable:
        out.print(f"Not the same twice without guesses, and left out of this: {', '.join(report.unstable[:5])}")
    said = f"--speculate {best[0].mode} (or auto)" if best else "no guesses"
    out.print(f"\nServe it with {said}.")
