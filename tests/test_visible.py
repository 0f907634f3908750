"""What a stranger's names send to the terminal: nothing that steers it."""

import io
import json
import os
import subprocess
import sys

import pytest

from bitladder.cli import terminal
from bitladder.errors import BadInput
from bitladder.visible import console, visible, visible_json

HOSTILE = "es\x1b[31mc\x9b1m\x07\r\u202egnp\u2066\x7f\udc80\u2028end"
STEERING = set("\x1b\x9b\x07\r\u202e\u2066\x7f\udc80\u2028")

MARKUP = ["[/]", "[link=http://evil]x[/link]", "[bold]x", "[red", ":smile:", "a\\[b]"]


def test_text_is_shown_and_not_obeyed():
    assert visible(HOSTILE) == r"es\x1b[31mc\x9b1m\x07\x0d\u202egnp\u2066\x7f\udc80\u2028end"
    plain = "Größe 你好 👩\u200d🔬\tü\n"
    assert visible(plain) == plain


def test_json_means_the_same():
    document = json.dumps({HOSTILE: [HOSTILE]}, ensure_ascii=False)
    assert not STEERING & set(visible_json(document))
    assert json.loads(visible_json(document)) == {HOSTILE: [HOSTILE]}


@pytest.mark.parametrize("as_json", [False, True])
def test_errors_and_lines(capsys, as_json):
    terminal.show_error(BadInput(f"{HOSTILE}\nerror: another", means=HOSTILE, do=HOSTILE), as_json=as_json)
    terminal.say(HOSTILE)
    terminal.put(HOSTILE)
    terminal.print_json({"name": HOSTILE})
    terminal.log_lines()(HOSTILE + "\nmore", 0, 1)
    printed = capsys.readouterr()
    assert not STEERING & set(printed.out + printed.err)
    assert [line for line in printed.err.splitlines() if line.startswith("error: ")] == [printed.err.splitlines()[0]]


def test_markup_in_a_name_is_text():
    from rich.table import Table

    out = console(file=io.StringIO(), force_terminal=True, width=200, highlight=False)
    table = Table("name")
    for name in MARKUP:
        table.add_row(name)
        out.print(name)
    out.print(table)
    text = out.file.getvalue()
    assert all(text.count(name) == 2 for name in MARKUP)
    assert "\x1b]8" not in text


def test_tables_and_panels_in_colour():
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    out = console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    table = Table(title=Text(HOSTILE))
    table.add_column("name")
    table.add_row(Text(HOSTILE, style="bold"))
    out.print(table)
    out.print(Panel(Text(HOSTILE), title="t"))
    text = out.file.getvalue()
    assert "\x1b[1m" in text  # its own colours work
    assert "\x1b[31m" not in text
    assert not (STEERING - {"\x1b"}) & set(text)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_locale_takes_what_is_printed(encoding, tmp_path):
    code = """
import sys
from bitladder.cli import terminal
from bitladder.errors import BadInput
from bitladder.visible import console, write_plainly
from rich.table import Table
write_plainly(sys.stdout)
write_plainly(sys.stderr)
text = "0.1 \\u2013 0.3 \\u2026 \\xfc \\u5317 \\U0001f600"
terminal.put(text)
terminal.say(text)
terminal.show_error(BadInput(text), as_json=False)
table = Table("a")
table.add_row(text)
console().print(table)
terminal.put_json('{"a": "\\x85\\u5317"}')
terminal.print_json({"name": text})
"""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode(encoding)
    assert json.loads(out[out.index('{\n  "name"') :])["name"].endswith("\U0001f600")
    assert json.loads(out[out.index('{"a"') : out.index("{\n")]) == {"a": "\x85\u5317"}
    if encoding == "ascii":
        assert out.startswith("0.1 - 0.3 ... \\xfc \\u5317 \\U0001f600\n")
