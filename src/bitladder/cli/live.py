"""A run while it is under way: on a terminal a table of levels that fills in, in a log a line for each change."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bitladder.cli.terminal import Steps, log_lines, say
from bitladder.progress import LevelNews, Progress, silent
from bitladder.units import human_bytes, human_rate

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import TaskID
    from rich.table import Table

_TIMES_A_SECOND = 4


@contextmanager
def run_display(*, quiet: bool = False) -> Iterator[Progress]:
    """A progress that hears news of levels too: drawn on a terminal, told line by line elsewhere, not at all when
    ``quiet``.
    """
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        from bitladder.visible import console

        with LiveRun(console(stderr=True)).shown() as live:
            yield live
    else:
        yield LoggedRun()


class Levels:
    """What is known of every level, in the order in which they were first heard of."""

    def __init__(self) -> None:
        self.rows: dict[str, LevelNews] = {}

    def add(self, news: LevelNews) -> LevelNews:
        """Put news to what was known; gives all that is known of this level."""
        known = self.rows.get(news.level, LevelNews(news.level))
        plain = {field.name: field.default for field in dataclasses.fields(LevelNews)}
        fresh = {
            name: value
            for name, value in vars(news).items()
            if value != plain[name] and not (isinstance(value, float) and math.isnan(value))
        }
        self.rows[news.level] = dataclasses.replace(known, **fresh)
        return self.rows[news.level]


class LoggedRun(Progress):
    """For a log: where the work is every few seconds, and a line whenever a level's state changes."""

    def __init__(self) -> None:
        self._levels = Levels()
        self._progress = log_lines()

    def __call__(self, what: str, done: float, total: float) -> None:
        """Where the work is."""
        self._progress(what, done, total)

    def on_level(self, news: LevelNews) -> None:
        """Something about a level."""
        before = self._levels.rows.get(news.level, LevelNews(news.level)).state
        row = self._levels.add(news)
        if row.state != before:
            known = (_size(row), _kl(row), _answers(row), _speed(row))
            said = (text for text in known if text)
            say(", ".join([f"{row.level}: {row.state}", *said]))


class LiveRun(Progress):
    """For a terminal: the table of levels, and under it what is being done and how long it will still take."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._console = console
        self._levels = Levels()
        self._steps = Steps()
        self._bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[LiveRun]:
        """Drawn while the block runs, from the first word on, so that a question before the work stands alone; what is
        printed meanwhile appears above.
        """
        try:
            yield self
        finally:
            if self._live is not None:
                self._live.stop()

    def __call__(self, what: str, done: float, total: float) -> None:
        """Where the work is."""
        self._draw()
        if self._steps.is_new(done, total) or self._task is None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, description=what, completed=done, total=total)

    def on_level(self, news: LevelNews) -> None:
        """Something about a level."""
        self._draw()
        self._levels.add(news)

    def _draw(self) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(
                console=self._console,
                get_renderable=self.drawn,
                refresh_per_second=_TIMES_A_SECOND,
                vertical_overflow="visible",
            )
            self._live.start()

    def drawn(self) -> Group:
        """All of it, as it stands."""
        from rich.console import Group

        return Group(self._table(), self._bar) if self._levels.rows else Group(self._bar)

    def _table(self) -> Table:
        from rich.box import SIMPLE
        from rich.table import Table

        table = Table(box=SIMPLE, pad_edge=False)
        table.add_column("Level", no_wrap=True)
        table.add_column("State", style="dim", min_width=12)
        for name in ("File", "KL", "Passes", "Tok/s"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self._levels.rows.values():
            kl, passes = _kl(row).removeprefix("KL "), _answers(row).removesuffix(" pass")
            table.add_row(row.level, row.state, _size(row), kl, passes, _speed(row).removesuffix(" tok/s"))
        return table


def _size(row: LevelNews) -> str:
    return human_bytes(row.file_bytes) if row.file_bytes else ""


def _kl(row: LevelNews) -> str:
    return "" if math.isnan(row.kl_mean) else f"KL {row.kl_mean:.3g}"


def _answers(row: LevelNews) -> str:
    if row.passes >= 0:
        return f"{row.passes} of {row.inputs} pass"
    return f"{row.answered} of {row.inputs} answered" if row.answered >= 0 else ""


def _speed(row: LevelNews) -> str:
    return "" if math.isnan(row.tokens_per_s) else f"{human_rate(row.tokens_per_s)} tok/s"
