"""`serve --config FILE`: the options by their names; the command line goes before it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitladder.cli import deploy
from bitladder.cli.app import app
from bitladder.serve import app as serving
from tiny_engine import write_tiny

CONFIG = """
quality: http://10.0.0.5:8000#big
speed: tiny.gguf
port: 9000
rule: [speed:tag=bulk, quality:key=legal]
allow-host: models.lan
open-to-all: true
host: 0.0.0.0
threads: 1
shadow: 0.5
"""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """The settings that `serve` would start with."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny.gguf")
    seen: list = []
    monkeypatch.setattr(serving, "serve", lambda settings, on_ready: seen.append(settings))
    assert deploy.serve
    return seen


def serve(text: str | bytes, *arguments: object):
    Path("serve.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return CliRunner().invoke(app, ["serve", "--config", "serve.yaml", *map(str, arguments)])


def test_options_come_from_a_file_and_the_command_line_goes_before_it(served):
    done = serve(CONFIG, "--port", 9001, "mine")
    assert done.exit_code == 0, done.output
    (settings,) = served
    assert (settings.port, settings.host, settings.threads, settings.shadow.share) == (9001, "0.0.0.0", 1, 0.5)
    assert (settings.quality.model, settings.speed.level, settings.name) == ("big", "tiny", "mine")
    assert [rule.tier for rule in settings.rules] == ["speed", "quality"]
    assert (settings.allowed_hosts, settings.open_to_all) == (("models.lan",), True)
    assert serve("model: tiny.gguf").exit_code == 0
    assert served[1].quality.level == "tiny"
    assert serve("", "tiny.gguf").exit_code == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("qualty: Q8_0", "Did you mean 'quality'?"),
        ("config: other.yaml", "no option"),
        ("- quality", "by their names"),
        ("just a text", "by their names"),
        ("name: [a, b]", "must be one text"),
        ("name: {a: b}", "must be one text"),
        ("rule: {a: b}", "list of texts"),
        ("rule: [[a]]", "list of texts"),
        ("quality: 'open", "no YAML"),
        ("a: &x [1]\nb: *x", "an alias"),
        ("? [a]\n: b", "YAML"),
        (b"\xff\xfe", "no YAML"),
        ("quality: " + "[" * 5000, "no YAML"),
        ("#" * 70000, "more than"),
        ("port: many", "--port"),
        ("shadow: 5", "--shadow"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_file_that_says_what_cannot_be_is_refused(served, text, said):
    done = serve(text, "tiny.gguf")
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.split())
    assert served == [] and not isinstance(done.exception, ValueError | TypeError)


def test_a_file_that_is_not_there(served):
    done = CliRunner().invoke(app, ["serve", "--config", "none.yaml"])
    assert done.exit_code == 2 and "cannot be read" in done.stderr
