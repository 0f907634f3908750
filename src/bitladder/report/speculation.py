"""What speculative decoding gains, as a table."""

from __future__ import annotations

from rich.console import Console

from bitladder.plan.speculation import paying
from bitladder.records.speculation import SpeculationReport
from bitladder.report.rows import number
from bitladder.report.tables import guess_table
from bitladder.report.terminal import print_table
from bitladder.visible import console as terminal_console


def speculation_table(report: SpeculationReport, console: Console | None = None) -> None:
    """Acceptance and gain of each way to guess, over all inputs and by tag, and what follows."""
    out = console or terminal_console(highlight=False)
    out.print(f"{report.model}: {report.inputs} inputs, {number(report.tokens_per_s, 3)} tokens/s without guesses")
    print_table(guess_table([report]), out)
    best = paying(report.results)
    for one in report.results:
        if not one.lossless:
            shown = ", ".join(one.differing[:5]) + (", ..." if len(one.differing) > 5 else "")
            out.print(f"{one.mode}: other answers to {len(one.differing)} of {report.inputs} inputs ({shown})")
    if report.unstable:
        out.print(f"Not the same twice without guesses, and left out of this: {', '.join(report.unstable[:5])}")
    said = f"--speculate {best[0].mode} (or auto)" if best else "no guesses"
    out.print(f"\nServe it with {said}.")
