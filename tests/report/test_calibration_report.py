"""What calibration says of its text, of how much of it reached what, and of the work: from known answers."""

import json

import numpy as np
import pytest

from bitladder.describe.text import Document, languages_of, subject_of
from bitladder.describe.windows import Window
from bitladder.errors import BadInput
from bitladder.files.layer_store import LayerStore
from bitladder.files.texts import read_texts, shipped_texts
from bitladder.plan.calibration_text import check_text
from bitladder.records.calibration import CalibrationReport, FoldedScales, LinearLoss, Preflight
from bitladder.records.coverage import coverage, coverage_of_counts
from bitladder.report.calibration import calibration_lines


def test_languages_and_kinds_by_name_script_and_extension(tmp_path):
    for name, text, languages, subject in (
        ("fr-es-it-recettes-viaje.txt", "oui", ("fr", "es", "it"), "recettes viaje"),
        ("code-rust-queue.txt", "fn main", ("code",), "rust queue"),
        ("letters.txt", "Привет, мир, как дела? Hi", ("Cyrillic", "Latin"), "letters"),
        ("tool.py", "def run(): pass", ("Latin",), "py"),
        ("digits.txt", "12 34", (), "digits"),
    ):
        (tmp_path / name).write_text(text)
        [document] = read_texts([tmp_path / name])
        assert (languages_of(document), subject_of(document)) == (languages, subject)


def test_the_shipped_text_says_its_languages():
    found = {language for one in shipped_texts("calibration") for language in languages_of(one)}
    assert " ".join(sorted(found)) == "ar code data de en es fr hi it ja nl pl pt ru sv zh"
    wide = {language for one in shipped_texts("calibration/wide") for language in languages_of(one)}
    assert wide >= found
    assert len(wide) == 35


def test_a_text_is_described_by_document():
    windows = [Window("de-brief", np.arange(600)), Window("de-brief", np.arange(100)), Window("x", np.arange(500))]
    text = check_text(windows, n_vocab=1000, documents=[Document("de-brief", ""), Document("x", "abc")])
    assert [(one.name, one.tokens, one.languages, one.subject) for one in text.sources] == [
        ("de-brief", 700, ("de",), "brief"), ("x", 500, ("Latin",), "x"),
    ]  # fmt: skip
    assert text.languages == {"de": 700, "Latin": 500}
    assert (text.documents, text.windows, text.tokens, text.shortest, text.longest) == (2, 3, 1200, 100, 600)
    with pytest.raises(BadInput, match="holds token 599; the model has 599 tokens"):
        check_text(windows, n_vocab=599)
    with pytest.raises(BadInput, match="1023 tokens in 1 windows"):
        check_text([Window("x", np.zeros(1023, int))], n_vocab=2)


def losses() -> list[LinearLoss]:
    few = "only 3 calibration tokens reached this expert: rounded plainly"
    return [
        LinearLoss("model.layers.0.self_attn.q_proj", 0.01, 90),
        LinearLoss("model.layers.0.mlp.experts.0.up_proj", 0.02, 80),
        LinearLoss("model.layers.0.mlp.experts.1.up_proj", 0.03, 3, note=few),
        LinearLoss("model.layers.1.self_attn.q_proj", 0.04, 90),
    ]


def test_coverage_per_layer_and_expert():
    first, second = coverage(losses())
    assert (first.layer, first.tokens, first.experts, first.rounded_plainly) == (0, 90, (80, 3), (1,))
    assert (second.layer, second.tokens, second.experts) == (1, 90, ())
    counts = {"blk.4.attn_q.weight": np.array([70.0]), "blk.4.ffn_up_exps.weight": np.array([70.0, 0.0, 9.0])}
    [layer] = coverage_of_counts(counts)
    assert (layer.layer, layer.tokens, layer.experts, layer.rounded_plainly) == (4, 70, (70, 0, 9), (1,))


def test_what_the_terminal_says():
    windows = [Window("en-essay", np.arange(1100))]
    text = check_text(windows, n_vocab=2000, documents=[Document("en-essay", "")])
    folded = FoldedScales("AWQ-Q2_K", tuple(losses()), 2)
    report = CalibrationReport(
        text, coverage(losses()), Preflight(100, 2**30, 2**20), Preflight(90, 2**29, 2**19), (folded,)
    )
    assert list(calibration_lines(report)) == [
        "Calibrated on 1 documents, 1,100 tokens in 1 windows of 1100 to 1100.",
        "Languages (tokens): en 1,100.",
        "Kinds of text: essay.",
        "Coverage: 90 tokens in each of 2 layers.",
        "Experts: 2, reached by 3 to 80 tokens, half of them by 80 or more.",
        "! Too few tokens reached 1 experts, which were rounded plainly: 1 of layer 0.",
        "AWQ-Q2_K: scales paid in 2 of 4 tensors that can have one; "
        "largest error 4.0%, model.layers.1.self_attn.q_proj.",
        "Walk: 90 s (100 predicted), memory 512 MiB (1.00 GiB), disk 512 KiB (1.00 MiB).",
    ]


class Store(LayerStore):
    def is_complete(self) -> bool:
        return False


def test_the_log_is_the_journal(tmp_path):
    import torch

    store = Store(tmp_path / "x", "made of this")
    for layer in range(2):
        note = {"tensor": f"t{layer}", "loss": 0.5}
        store.put_layer(layer, {"a": torch.ones(2)}, [note], seconds=1.25)
    lines = [json.loads(line) for line in store.log.splitlines()]
    assert lines[0] == {"making": "x", "fingerprint": "made of this"}
    assert lines[1] == {"layer": 0, "tensor": "t0", "loss": 0.5}
    assert lines[2] == {"layer": 0, "finished": True, "seconds": 1.25}
    with (store.partial / "log.jsonl").open("a") as file:  # killed while it logged the next layer
        file.write('{"layer": 2, "tensor": "t2", "loss": 0.5}\n{"layer": 2, "fin')
    again = Store(tmp_path / "x", "made of this")
    assert [one.layer for one in again.finished()] == [0, 1]
    again.truncate(1)
    assert again.log.splitlines() == store.log.splitlines()[:3]
    assert Store(tmp_path / "x", "of something else").finished() == []
