"""A comparison of implementations on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitladder.records.selfcheck import HEAD, ComparedPair, SelfCheck, Trust
from bitladder.visible import console as visible_console

if TYPE_CHECKING:
    from rich.console import Console

_STYLE = {Trust.YES: "green", Trust.NO: "red", Trust.UNCHECKED: "yellow"}


def selfcheck_table(check: SelfCheck, *, every: bool = False, console: Console | None = None) -> None:
    """Who was compared, where they part and what can be trusted; every layer on request."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console or visible_console(highlight=False)
    out.print(Text(f"{check.model}  {check.architecture}", style="bold"))
    text = f"{check.n_layer} layers, {check.windows} windows of {check.tokens} tokens of {check.text}"
    out.print(Text(text, style="dim"))
    for one in check.compared:
        out.print(Text(f"{one.name.value:<13} {one.how or f'not compared: {one.missing}'}"))
    for made in check.comparisons:
        out.print()
        out.print(Text(_verdict(made), style="green" if made.agrees else "red"))
        out.print(Text(f"  bound: {made.bound}", style="dim"))
        shown = [gap for gap in made.layers if every or gap.parts]
        if shown:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            table.add_column("layer")
            for title in ("differs by", "may by", "tokens outside"):
                table.add_column(title, justify="right")
            for gap in shown:
                name = "head" if gap.layer == HEAD else str(gap.layer)
                style = "red" if gap.parts else ""
                table.add_row(name, _share(gap.gap), _share(gap.bound), f"{gap.outside:.0%}", style=style)
            out.print(table)
    out.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("part", "can be trusted", "why"):
        table.add_column(title)
    for part in check.trust:
        table.add_row(part.what, Text(part.trust.value, style=_STYLE[part.trust]), Text(part.why))
    out.print(table)
    for note in check.notes:
        out.print(Text(note, style="dim"))


def _verdict(made: ComparedPair) -> str:
    names = f"{made.one.value} and {made.other.value}"
    same = f"KL of predictions {made.kl_mean:.2g}, the same next token {made.top1:.0%}"
    if not made.layers:
        verdict = f"{'agree' if made.agrees else 'part'}, by predictions alone ({made.unseen})"
        return f"{names} {verdict}; {same}; rounding explains a KL up to {made.kl_bound:.2g}"
    if made.agrees:
        widest = _share(max(gap.gap for gap in made.layers))
        return f"{names} agree in all {len(made.layers)} places, within {widest} of what a layer changes; {same}"
    parting = sum(gap.parts for gap in made.layers)
    where = "the head" if made.first == HEAD else f"layer {made.first}"
    return f"{names} part at {where} first, in {parting} of {len(made.layers)} places; {same}"


def _share(value: float) -> str:
    return f"{100 * value:.2g}%"
