"""A run while it is under way: the table that fills in, the lines of a log, and nothing with --json."""

import io

from rich.console import Console

from bitladder.cli.live import LiveRun, LoggedRun, run_display
from bitladder.progress import LevelNews, silent
from bitladder.units import MiB

STORY = (
    LevelNews("Q8_0", "fits"),
    LevelNews("Q4_K_M", "fits"),
    LevelNews("Q8_0", "written", file_bytes=144 * MiB),
    LevelNews("Q8_0", kl_mean=0.0123),
    LevelNews("Q8_0", "asked", answered=7, inputs=25),
    LevelNews("Q8_0", "judged", passes=6, inputs=25, tokens_per_s=41.234),
)


def drawn(live: LiveRun) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(live.drawn())
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_the_table_fills_in():
    live = LiveRun(Console(file=io.StringIO(), force_terminal=True))
    live._draw = lambda: None
    assert drawn(live) == []
    for news in STORY[:5]:
        live.on_level(news)
    lines = drawn(live)
    assert lines[0].split() == ["Level", "State", "File", "KL", "Passes", "Tok/s"]
    assert lines[2].split() == ["Q8_0", "asked", "144", "MiB", "0.0123", "7", "of", "25", "answered"]
    assert lines[3].split() == ["Q4_K_M", "fits"]
    live.on_level(STORY[5])
    assert drawn(live)[2].split()[-4:] == ["6", "of", "25", "41.2"]


def test_what_is_being_done_stands_under_the_table():
    live = LiveRun(Console(file=io.StringIO(), force_terminal=True))
    live._draw = lambda: None
    live.on_level(STORY[0])
    live("quantizing", 1, 4)
    assert "quantizing" in drawn(live)[-1] and " 25%" in drawn(live)[-1]
    live("walk: layer 1 of 30", 0, 32)
    live("walk: layer 9 of 30", 8, 32)
    assert "walk: layer 9 of 30" in drawn(live)[-1] and "quantizing" not in "".join(drawn(live))


def test_on_a_terminal_it_is_drawn_and_what_is_said_meanwhile_stays_readable(capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with LiveRun(console).shown() as live:
        assert console.file.getvalue() == ""  # a question may stand here
        live.on_level(STORY[2])
        console.print("! a warning")
    shown = console.file.getvalue()
    assert "a warning" in shown and "144 MiB" in shown
    assert capsys.readouterr() == ("", "")


def test_in_a_log_a_line_for_each_change_of_state(capsys):
    logged = LoggedRun()
    for news in STORY:
        logged.on_level(news)
    assert capsys.readouterr().err.splitlines() == [
        "Q8_0: fits",
        "Q4_K_M: fits",
        "Q8_0: written, 144 MiB",
        "Q8_0: asked, 144 MiB, KL 0.0123, 7 of 25 answered",
        "Q8_0: judged, 144 MiB, KL 0.0123, 6 of 25 pass, 41.2 tok/s",
    ]


def test_without_a_terminal_there_are_lines_and_quiet_is_quiet(capsys):
    with run_display() as progress:  # pytest has no terminal
        progress("quantizing", 0, 4)
        progress.on_level(STORY[0])
    assert capsys.readouterr().err.splitlines() == ["quantizing: 0%", "Q8_0: fits"]
    with run_display(quiet=True) as progress:
        progress("quantizing", 0, 4)
        progress.on_level(STORY[0])
    silent.on_level(STORY[0])
    assert capsys.readouterr() == ("", "")
