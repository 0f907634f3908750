"""KV caches in the real engine: what each costs by depth, what is computed once, and what a run decides over."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.describe.cache_types import F16_CACHE, parse_cache, parse_caches
from bitladder.describe.windows import Window
from bitladder.errors import UsageError
from bitladder.files.gguf import GgufFile
from bitladder.records.fidelity import Way
from bitladder.stages.engine_scores import engine_scores
from bitladder.stages.job import Journal, Work
from bitladder.stages.measure import Measuring, measure_model
from tiny_engine import write_tiny

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("cache") / "tiny.gguf")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, words in enumerate(("the tide comes in twice a day ", "a bridge was built over the river ")):
        (folder / f"{number}.txt").write_text(words * 6)
    return folder


def test_each_cache_costs_what_its_bits_let_expect_and_is_measured_once(model, text):
    wanted = Measuring(caches=parse_caches("f16,q8_0,q4_0,f16/q4_0"), depths=(256, 512), texts=[text])
    journal = Journal()
    found = measure_model(str(model), wanted, Work(journal=journal))
    by_name = {one.level: one for one in found}
    assert list(by_name) == ["F16", "F16+q8_0", "F16+q4_0", "F16+f16/q4_0"]
    assert by_name["F16"].kl_mean == 0  # the reference itself
    assert 0 < 20 * by_name["F16+q8_0"].kl_mean < by_name["F16+f16/q4_0"].kl_mean
    assert all([at.depth for at in one.depths] == [256, 512] and one.way is Way.DEPLOYED for one in found)
    again = measure_model(str(model), wanted, Work(journal=journal))
    assert again == found
    assert any("F16+q4_0" in line for line in journal.reused)


def test_context_that_windows_share_is_computed_once_and_changes_nothing(model):
    rng = np.random.default_rng(3)
    before = rng.integers(1, 250, 300)
    windows = [Window(f"text {at}", np.concatenate([before, rng.integers(1, 250, 40)]), begin=310) for at in range(3)]
    caches = [F16_CACHE, parse_cache("q4_0")]
    with GgufFile.open(model) as file:
        together = engine_scores(file, [file], windows, threads=1, caches=caches)[1]
        alone = [engine_scores(file, [file], [one], threads=1, caches=caches)[1] for one in windows]
    np.testing.assert_allclose(together.kl, np.concatenate([one.kl for one in alone]), rtol=0.3, atol=2e-5)
    np.testing.assert_allclose(together.nll, np.concatenate([one.nll for one in alone]), rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"caches": parse_caches("q8_0"), "through": Way.WALK}, "--through walk"),
        ({"depths": (512, 1 << 20)}, "trained for"),
        ({"depths": (10,)}, "too short"),
    ],
)
def test_what_cannot_be_measured_by_depth_is_refused(model, options, said):
    with pytest.raises(UsageError, match=said):
        measure_model(str(model), Measuring(**options), Work())


def test_a_cache_that_the_engine_refuses_is_told_by_every_verb_before_any_work(tmp_path):
    narrow = write_tiny(tmp_path / "narrow.gguf", heads=16)
    for verb in (
        ["plan", str(narrow)], ["measure", str(narrow)], ["serve", "--quality", str(narrow)],
        ["run", str(narrow), "--out", str(tmp_path / "out")],
    ):  # fmt: skip
        done = CliRunner().invoke(app, [*verb, "--kv", "q8_0"])
        assert done.exit_code != 0, verb
        assert "do not divide into q8_0's blocks of 32" in done.output, verb
    assert not (tmp_path / "out").exists()


def test_a_run_decides_over_levels_and_caches(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("bitladder.stages.in_time._WORTH_SAYING_S", 0.0)
    monkeypatch.setattr("bitladder.plan.engine_need._RATE", 1e3)
    workload = tmp_path / "w.yaml"
    workload.write_text("name: t\ninputs:\n  - {id: a, prompt: Say a., max_tokens: 4, expect: {contains_none: zzz}}\n")
    command = ["run", str(model), "--levels", "Q8_0", "--kv", "f16,q4_0", "--ctx", "512", "--workload", str(workload)]
    command += ["--text", str(text), "--out", str(tmp_path / "out"), "--threads", "1", "--json"]
    done = CliRunner().invoke(app, command)
    assert re.search(r"Up to .* (min|h) .*a smaller --ctx or less --text takes less", done.stderr)  # the engine's share
    record = json.loads(done.stdout)
    names = ["Q8_0", "Q8_0+q4_0"]
    assert [row["level"] for row in record["plan"]["levels"]] == names
    assert [one["level"] for one in record["fidelities"]] == names
    assert {one["level"] for one in record["answers"]} == {"F16", *names}
    assert record["decision"]["files"]["Q8_0"] == record["decision"]["files"]["Q8_0+q4_0"]
    assert record["decision"]["quality"] in names  # both are near-lossless: which is faster decides
    assert record["settings"]["kv"] == ["f16", "q4_0"]
    assert "--kv f16,q4_0" in record["commands"][0]
