"""A recommendation on the terminal: the answer first, then why, then what else, then the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitladder.plan.quality import LevelCost
from bitladder.plan.recommend import Rated, Recommendation, cost_words
from bitladder.records.plan import Place
from bitladder.report.columns import Column, fitted_table
from bitladder.report.terminal import terminal_console
from bitladder.units import human_bytes, human_rate

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 12
"""Rows of the table; ``--all`` shows the rest."""


def print_recommendation(
    found: Recommendation,
    *,
    assumed: Sequence[str] = (),
    notes: Sequence[str] = (),
    beyond: Sequence[str] = (),
    every: bool = False,
    console: Console | None = None,
) -> None:
    """Everything that a recommendation says; ``beyond`` are sentences about what is just out of reach."""
    from rich.padding import Padding
    from rich.text import Text

    out = console or terminal_console()

    def point(text: str) -> None:
        out.print(Padding(Text(text), (0, 0, 0, 2), expand=False))

    out.print(Text(headline(found), style="bold"))
    for note in notes:
        out.print(Text(f"! {note}.", style="yellow"))
    if found.answer:
        out.print(Text("\nWhy", style="bold"))
        for reason in found.reasons:
            point(f"{reason}.")
        if assumed:
            point(f"Assumed of this machine: {'; '.join(assumed)}.")
    if found.alternatives:
        out.print(Text("\nInstead", style="bold"))
        for other in found.alternatives:
            point(f"{other.purpose}: {_in_words(other.pick)}")
    if found.sizes:
        out.print(Text("\nBy size, at Q4_K_M with a context of 4,096 tokens", style="bold"))
        for size in found.sizes:
            point(f"{size.size:<5} {size.verdict}")
    if found.table:
        rows = found.table if every else found.table[:SHOWN]
        out.print(Text(f"\nThe best level of each model for {found.use}, the most able first", style="bold"))
        table, left_out = fitted_table(COLUMNS, rows, out.width)
        out.print(table)
        out.print(Text(_footer(found, len(rows), left_out), style="dim"))
    for sentence in beyond:
        out.print(Text(sentence))
    if found.answer:
        name = found.answer.short_name
        out.print(
            Text(f'Next: bitladder search "{name} gguf", then bitladder pull hf:ORG/NAME:{found.answer.option.level}')
        )


def headline(found: Recommendation) -> str:
    """The answer in one sentence."""
    if found.answer is None:
        return (
            f"On {found.machine}: no model of the catalogue fits in {human_bytes(found.usable_bytes)} and decodes "
            f"{found.least_decode:g} tokens/s at a context of {found.n_ctx:,} tokens."
        )
    return f"On {found.machine}, for {found.use}: {_in_words(found.answer)}"


def _in_words(row: Rated) -> str:
    option = row.option
    where = {Place.SPLIT: ", partly offloaded to the GPU", Place.EXPERTS_IN_RAM: ", its experts partly in RAM"}
    return (
        f"{row.short_name} at {option.level}, {row.weight_bytes / 1e9:.1f} GB, about {human_rate(row.decode)} tokens/s"
        f"{where.get(option.placement.kind, '')} (licence {option.licence})."
    )


def _place_word(row: Rated) -> str:
    placement = row.option.placement
    if placement.kind == Place.SPLIT:
        return f"{placement.n_gpu_layers}/{row.option.n_layer} on GPU"
    return {Place.GPU: "GPU", Place.CPU: "RAM", Place.EXPERTS_IN_RAM: "GPU + RAM"}.get(placement.kind, placement.kind)


def _short_cost(cost: LevelCost) -> str:
    return cost_words(cost).split("%")[0] + "%"


def _range(row: Rated) -> str:
    decode = row.option.speed.decode
    return f"{human_rate(decode.low)}-{human_rate(decode.high)}"


COLUMNS: tuple[Column[Rated], ...] = (
    Column("model", lambda row: row.short_name, 0, right=False, keeps=14),
    Column("level", lambda row: row.option.level, 0, right=False),
    Column("GB", lambda row: f"{row.weight_bytes / 1e9:.1f}", 0),
    Column("fits in", _place_word, 0, right=False),
    Column("tokens/s", lambda row: human_rate(row.decode), 0),
    Column("range", _range, 2),
    Column("loss", lambda row: _short_cost(row.cost), 1),
    Column("in memory", lambda row: human_bytes(row.option.placement.total_bytes), 3),
    Column("licence", lambda row: row.option.licence, 4, right=False),
)


def _footer(found: Recommendation, shown: int, left_out: Sequence[str]) -> str:
    rest = f" {len(found.table) - shown} more with --all." if shown < len(found.table) else ""
    narrow = f" Left out for width: {', '.join(left_out)}." if left_out else ""
    return (
        "GB: what is downloaded. tokens/s: expected when answering, at the middle of its range; below "
        f"{found.least_decode:g} a level is not shown. loss: how much the level is expected to raise perplexity, from "
        f"published measurements of other models.{rest}{narrow}"
    )
