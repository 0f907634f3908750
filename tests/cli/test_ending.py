"""How the program ends when what it prints does not arrive, or Ctrl-C comes before a verb has begun."""

import os
import sys
from pathlib import Path

import pytest

from bitladder import cli
from bitladder.cli import app
from tiny_engine import write_tiny

VERBS = ["--version", "--help", "plan", "inspect"]
BUFFERED, BY_LINES = -1, 1


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The program within this process, without what it sets up for a process of its own."""
    monkeypatch.setattr(app, "main", app.app)
    model = write_tiny(tmp_path / "tiny.gguf")

    def run(verb: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["bitladder", verb, *([] if verb.startswith("-") else [str(model)])])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0

    return run


@pytest.mark.parametrize("buffering", [BUFFERED, BY_LINES])
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_standard_output_is_one_message(run, monkeypatch, capsys, verb, buffering):
    with Path("/dev/full").open("w", buffering) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(verb) == 6
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "Standard output cannot be written: No space left on device." in said


@pytest.mark.parametrize("buffering", [BUFFERED, BY_LINES])
@pytest.mark.parametrize("verb", VERBS)
def test_a_reader_that_goes_away_is_a_good_end(run, monkeypatch, capsys, verb, buffering):
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w", buffering) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(verb) == 0
    assert capsys.readouterr().err == ""


def test_standard_error_may_be_closed(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert run("plan") == 0
    sys.stderr.close()
    assert "llama" in capsys.readouterr().out


def test_ctrl_c_while_the_program_is_loaded_is_no_traceback(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, *_):
            if name == "bitladder.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delattr(cli, "app")
    monkeypatch.delitem(sys.modules, "bitladder.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith("\nStopped.")
