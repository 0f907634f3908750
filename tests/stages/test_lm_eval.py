"""Reading lm-evaluation-harness' results.

``fixtures/lm_eval_results.json`` was written by lm_eval 0.4.13 (local-chat-completions, a task of six sums,
against a level of the demo model on llama.cpp's server), cut down to the sections that are read.
"""

import json
import math
from pathlib import Path

import pytest

from bitladder.errors import BadInput
from bitladder.files.lm_eval import read_results
from bitladder.stages.benchmarks import keep_lm_eval
from bitladder.store import Evidence

RESULTS = Path(__file__).parents[1] / "fixtures" / "lm_eval_results.json"


def test_what_the_tool_wrote():
    (number,) = read_results(RESULTS)
    assert (number.task, number.metric, number.samples, number.shots) == ("tiny_sums", "exact_match,last-number", 6, 0)
    assert number.value == pytest.approx(4 / 6)
    assert number.stderr == pytest.approx(math.sqrt(4 / 6 * 2 / 6 / 5))
    assert (number.model, number.tool) == ("SmolLM2-135M-Instruct-Q4_K_M", "lm_eval 0.4.13")


def test_several_metrics_and_no_error_given(tmp_path):
    plain = {"results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,none": 0.25}}}
    path = tmp_path / "model" / "results_2026.json"
    path.parent.mkdir()
    path.write_text(json.dumps(plain))
    accuracy, f1 = read_results(tmp_path)
    assert (accuracy.metric, f1.metric, f1.value, accuracy.samples) == ("acc", "f1", 0.25, 0)
    assert math.isnan(accuracy.stderr)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "has no results in the format"),
        ('{"results": {"t": 3}}', "has no results in the format"),
    ],
)
def test_files_that_are_something_else(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        read_results(path)
    with pytest.raises(BadInput, match="no results_"):
        read_results(tmp_path)
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        read_results(tmp_path / "gone.json")


def test_the_numbers_are_found_in_the_store():
    with Evidence.open("sqlite:///:memory:") as store:
        keep_lm_eval(RESULTS, source="ab12", level="Q4_K_M", store=store)
        (row,) = store.find("benchmark", source="ab12", level="Q4_K_M")
        assert row.value["value"] == pytest.approx(4 / 6)
        assert row.key["tool"] == "lm_eval 0.4.13"
