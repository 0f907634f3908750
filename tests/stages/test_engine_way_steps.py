"""The verbs on a model that only the engine runs: measure, imatrix, quantize, run, smallest."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from bitladder.describe.text import Document
from bitladder.errors import EngineError, UnknownArchitecture
from bitladder.files.imatrix import read_imatrix
from bitladder.levels import parse_levels
from bitladder.pipeline import run
from bitladder.progress import silent
from bitladder.records.fidelity import Way
from bitladder.stages import calibration as calibrated
from bitladder.stages import engine_way
from bitladder.stages.calibration import make_imatrix
from bitladder.stages.job import Build, Job, Journal, Work
from bitladder.stages.measure import Measuring, measure_model
from bitladder.stages.quantize import build_levels
from bitladder.stages.run_facts import RunSettings
from bitladder.stages.smallest import SmallestRequest, find_smallest
from engine_models import byte_tokens, write_family

pytestmark = pytest.mark.model
LEVELS = parse_levels(["Q8_0", "Q4_K_M"])
WORKLOAD = """\
name: short
max_tokens: 4
inputs:
  - {id: any-word, prompt: "abc", expect: {max_words: 100}}
  - {id: any-other, prompt: "def", expect: {max_words: 100}}
"""


def measured(model, levels, *, journal=None, imatrix="none", **wanted):
    wanted = Measuring(levels=levels, imatrix=imatrix, **wanted)
    return measure_model(model, wanted, Work(journal=journal or Journal()))


def quantized(model, levels, out, *, journal=None, imatrix="auto"):
    return build_levels(model, levels, Build(out=out, imatrix=imatrix), Work(journal=journal or Journal()))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch):
    """Importance matrices of these models are nobody's; the text to calibrate on is short."""
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    short = [Document("short", " ".join(str(n * n) for n in range(300)))]
    monkeypatch.setattr(calibrated, "calibration_texts", lambda *_: short)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_family(tmp_path_factory.mktemp("model") / "tiny.gguf", "gpt-oss"))


@pytest.fixture
def texts(tmp_path) -> list[Path]:
    paths = [tmp_path / f"text-{n}.txt" for n in range(3)]
    for n, path in enumerate(paths):
        path.write_text(" ".join(chr(97 + (n + k * k) % 26) * (1 + k % 3) for k in range(100)))
    return paths


def test_measure_says_which_way_and_keeps_its_evidence_apart(model, texts):
    journal = Journal()
    found = measured(model, LEVELS, texts=texts, journal=journal)
    assert {one.way for one in found} == {Way.ENGINE}
    assert 0 < found[0].kl_mean < found[1].kl_mean
    assert sum("Fidelity is measured in the engine" in line and "gpt-oss" in line for line in journal.warnings) == 1
    again = Journal()
    assert measured(model, LEVELS, texts=texts, journal=again) == found
    assert again.reused == ["fidelity of Q8_0, Q4_K_M"]
    weighed = measured(model, LEVELS, texts=texts, imatrix="auto")
    assert weighed[1] != found[1]
    with pytest.raises(UnknownArchitecture, match=r"No layers are known for the architecture 'gpt-oss'"):
        measured(model, LEVELS, texts=texts, through=Way.WALK)


def test_a_level_as_the_reference_and_a_file_beside_it(model, texts, tmp_path):
    built = quantized(model, LEVELS, tmp_path / "out", imatrix="none")
    q8, q4 = parse_levels(["Q8_0"])[0], built.files[1].path
    found = measured(model, LEVELS, reference=q8, files=[q4], texts=texts)
    assert [one.level for one in found] == ["Q4_K_M", q4.stem]
    assert found[0].kl_mean == pytest.approx(found[1].kl_mean)
    assert found[0].kl_mean > 0


def test_files_of_one_name_have_their_own_figures(model, texts, tmp_path):
    q8, q4 = (one.path for one in quantized(model, LEVELS, tmp_path / "out", imatrix="none").files)
    for place, path in (("a/x", q8), ("b/x", q4), ("c/Q8_0", q4)):
        (tmp_path / place).parent.mkdir()
        shutil.copy(path, tmp_path / f"{place}.gguf")
    x8, x4, called_q8 = (tmp_path / f"{place}.gguf" for place in ("a/x", "b/x", "c/Q8_0"))
    found = measured(model, None, files=[x8, x4, x8], texts=texts)
    assert [one.level for one in found] == ["a/x.gguf", "b/x.gguf"], "a file that is named twice is taken once"
    assert 0 < found[0].kl_mean < found[1].kl_mean
    beside = measured(model, LEVELS[:1], files=[called_q8], texts=texts)
    assert [one.level for one in beside] == ["Q8_0", "Q8_0.gguf"]
    assert [one.kl_mean for one in beside] == pytest.approx([one.kl_mean for one in found])


def test_both_ways_of_a_model_that_has_both(texts, tmp_path):
    case = tiny_models.CASES["llama"]
    sizes = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 288, "max_position_embeddings": 512}
    tiny = tiny_models.make(case, **sizes)
    path = tiny_models.write(case, tiny, tmp_path / "tiny.gguf", tokenizer=lambda writer, _: byte_tokens(writer))
    figures = {}
    for through in (Way.ENGINE, None, Way.WALK):
        journal = Journal()
        (figures[through],) = measured(str(path), LEVELS[:1], texts=texts, through=through, journal=journal)
        said = [line for line in journal.warnings if "that was asked for" in line]
        assert journal.warnings == said and len(said) == (through is Way.ENGINE)
        assert bool(journal.reused) == (through is Way.WALK), "measured by the walk just before"
    assert figures[Way.ENGINE].way is Way.ENGINE
    assert figures[None] == figures[Way.WALK]
    assert figures[None].way is Way.WALK
    assert figures[Way.ENGINE].kl_mean > figures[None].kl_mean  # its rounding of inputs comes on top


def test_a_variant_that_the_walk_refuses_goes_to_the_engine(texts, tmp_path, monkeypatch):
    """A llama with a tensor that its rows do not place: the walk finds that out only when it reads the names."""
    monkeypatch.setattr("bitladder.walk.layers._check_tensors", refuse)
    case = tiny_models.CASES["llama"]
    sizes = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 288, "max_position_embeddings": 512}
    tiny = tiny_models.make(case, **sizes)
    path = tiny_models.write(case, tiny, tmp_path / "tiny.gguf", tokenizer=lambda writer, _: byte_tokens(writer))
    journal = Journal()
    (found,) = measured(str(path), LEVELS[:1], texts=texts, imatrix="auto", journal=journal)
    assert found.way is Way.ENGINE
    assert any("the tensor 'x' has no place" in line for line in journal.warnings)
    made = make_imatrix(str(path), texts, tmp_path / "imatrix.gguf", Work())
    assert "blk.2.ffn_down.weight" in read_imatrix(made).counts


def refuse(*_):
    raise UnknownArchitecture("The tensor 'x' has no place in the layers of 'llama'.")


def test_quantizing_with_the_engines_importance(model, texts, tmp_path):
    """The file differs from one without, holds a smaller error where the inputs are large, and says so."""
    matrix = read_imatrix(make_imatrix(model, texts, tmp_path / "imatrix.gguf", Work()))
    assert matrix.counts["blk.1.ffn_down_exps.weight"].shape == (4,)
    assert matrix.mean_squares["blk.1.ffn_down_exps.weight"].shape == (4, 256)
    journal = Journal()
    weighed, plain = (
        quantized(model, LEVELS[1:], tmp_path / choice, imatrix=choice, journal=journal).files[0]
        for choice in ("auto", "none")
    )
    assert weighed.path.read_bytes() != plain.path.read_bytes()
    assert [line for line in journal.warnings if "Importance is gathered in the engine" in line]
    kept = list((tmp_path / "cache" / "importance").glob("*.gguf"))
    assert len(kept) == 1
    assert not list((tmp_path / "cache").glob("walks/engine/*"))


def test_quantizing_a_model_that_nobody_runs_starts_no_engine(model, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_way, "engine_missing", lambda _: "it is of tomorrow")
    monkeypatch.setattr(Job, "windows", lambda *_: pytest.fail("the engine was started"))
    journal = Journal()
    built = quantized(model, LEVELS[1:], tmp_path, journal=journal)
    assert built.files[0].path.is_file()
    (warning,) = [line for line in journal.warnings if "without an importance matrix" in line]
    assert "it is of tomorrow" in warning


@pytest.mark.parametrize("level", ["GPTQ-4bit-g64", "AWQ-Q4_K_M", "GPTQ-Q4_K_M", "bpw4.5"])
def test_what_needs_layers_is_refused_before_a_text_is_read(model, level, tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "windows", lambda *_: pytest.fail("the engine was started"))
    with pytest.raises(UnknownArchitecture, match="No layers are known") as refused:
        quantized(model, parse_levels([level]), tmp_path)
    assert "checkpoint folder" in refused.value.do
    assert not list(tmp_path.glob("*/*.gguf"))


def test_an_encoder_is_quantized_without_importance(tmp_path):
    path = write_family(tmp_path / "bert.gguf", "bert")
    journal = Journal()
    built = quantized(str(path), LEVELS[1:], tmp_path, journal=journal)
    assert built.files[0].path.is_file()
    assert any("without an importance matrix" in line and "an encoder" in line for line in journal.warnings)


def test_an_engine_that_fails_says_how_to_go_without(tmp_path):
    path = write_family(tmp_path / "bad.gguf", "deepseek2", expert_gating_func=77)
    with pytest.raises(EngineError, match=r"--imatrix none"):
        quantized(str(path), LEVELS[1:], tmp_path)
    assert not list(tmp_path.glob("*Q4_K_M*"))
    built = quantized(str(path), LEVELS[1:], tmp_path, imatrix="none")
    assert built.files[0].path.is_file()


def test_a_run_and_a_search(model, texts, tmp_path):
    (tmp_path / "workload.yaml").write_text(WORKLOAD)
    settings = RunSettings(
        model=model, levels=tuple(LEVELS), workload=tmp_path / "workload.yaml", texts=tuple(texts),
        out=tmp_path / "out", n_ctx=256,
    )  # fmt: skip
    record = run(settings, silent).record
    assert [one.way for one in record.fidelities] == [Way.ENGINE, Way.ENGINE]
    assert record.settings["protocol"].startswith("512-token windows, second half scored, llama.cpp")
    assert any("Fidelity is measured in the engine" in line for line in record.warnings)
    assert any("Importance is gathered in the engine" in line for line in record.warnings)
    assert all(np.isfinite(one.kl_mean) for one in record.fidelities)
    heard: list[str] = []
    outcome = find_smallest(
        SmallestRequest(
            model, "passes >= reference - 60 points", tmp_path / "workload.yaml", tuple(LEVELS), n_ctx=256,
            out=tmp_path / "out",
        ),
        Work(journal=Journal(heard.append)),
    )  # fmt: skip
    assert outcome is not None
    assert not any("without an importance matrix" in line for line in heard)
