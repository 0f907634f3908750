"""`workload check` and `workload import` on the command line."""

import json

import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_few_inputs_can_show_nothing(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_text("inputs:\n  - {prompt: p, expect: {exact: a}}\n")
    done = run("workload", "check", path)
    assert done.exit_code == 0
    assert "nan" not in done.output and "can show no drop" in done.output
    assert json.loads(run("workload", "check", path, "--json").stdout)["smallest_visible_loss"] is None
    path.write_text("inputs:\n" + "  - {prompt: p, expect: {exact: a}}\n" * 30)
    assert "A drop of fewer than 2" in run("workload", "check", path).output


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_every_fault_is_in_one_message(tmp_path, as_json):
    path = tmp_path / "w.yaml"
    path.write_text(
        "inputs:\n  - {prompt: p, expect: {number: x}}\n  - {expect: {exact: a}}\n  - {prompt: '{{a}}', expect: {}}\n"
    )
    done = run("workload", "check", path, *as_json)
    assert done.exit_code == 2
    for line in (2, 3, 4):
        assert f"line {line}: " in done.output


def test_an_import_lists_what_is_not_the_same_and_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "promptfooconfig.yaml"
    source.write_text(
        "prompts: ['Say {{x}}']\nproviders: [a]\ntests: [{vars: {x: tea}, assert: [{type: equals, value: tea}]}]\n"
    )
    done = run("workload", "import", source)
    assert done.exit_code == 0, done.output
    assert "! 'providers' is not imported" in done.output and "! equals: white space" in done.output
    assert "Wrote workload.yaml with 1 inputs" in done.output
    mine = "inputs:\n  - {prompt: p, expect: {exact: a}}\n"
    (tmp_path / "workload.yaml").write_text(mine)
    before = source.read_text()
    for out in ((), ("--out", source), ("--out", "workload.yaml")):
        assert run("workload", "import", source, *out).exit_code == 2
    assert (tmp_path / "workload.yaml").read_text() == mine and source.read_text() == before


def test_names_of_others_are_text(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_text(
        'inputs:\n  - {id: "a\\e[31m", prompt: p, expect: {contains_none: x}}\n  - {id: "a\\e[31m", prompt: p}\n'
    )
    assert "\x1b" not in run("workload", "check", path).output
