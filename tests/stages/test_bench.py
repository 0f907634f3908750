"""Rivals of one model, measured beside each other."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.errors import BadInput, UsageError
from bitladder.levels import parse_levels
from bitladder.records.bench import BenchRecord
from bitladder.stages.bench import run_bench
from bitladder.stages.bench_file import Bench, read_bench
from bitladder.stages.job import NONE, Build, Journal, Work
from bitladder.stages.measure import Measuring, measure_model
from bitladder.stages.quantize import build_levels
from hub_server import running_hub
from tiny_engine import write_tiny

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, three levels of it, two domains of text."""
    home = tmp_path_factory.mktemp("bench")
    model = write_tiny(home / "tiny.gguf")
    build_levels(str(model), parse_levels(["Q8_0", "Q4_0", "Q2_K"]), Build(out=home, imatrix=NONE), Work())
    for number, words in enumerate(("the tide comes in twice a day ", "a bridge over the river ", "salt and pepper ")):
        (home / "letters").mkdir(exist_ok=True)
        (home / "letters" / f"{number}.txt").write_text(words * 12)
    (home / "code.txt").write_text("def f(x):\n    return x + 1\n\n" * 40)
    return home


@pytest.fixture
def own_hub(monkeypatch, tmp_path):
    with running_hub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield fake


def path_of(folder: Path, level: str) -> str:
    return str(next(folder.glob(f"*{level}.gguf")))


def test_rivals_from_disk_and_hub_by_bytes_with_paired_shares(folder, own_hub):
    own_hub.repos["maker/Tiny-GGUF"] = {
        "tiny-Q4_0.gguf": Path(path_of(folder, "Q4_0")).read_bytes(),
        "tiny-Q2_K.gguf": Path(path_of(folder, "Q2_K")).read_bytes(),
    }
    rivals = {"hub Q4_0": "hf:maker/Tiny-GGUF:Q4_0", "ours": path_of(folder, "Q8_0"), "small": path_of(folder, "Q2_K")}
    texts = {"letters": (folder / "letters",), "code": (folder / "code.txt",)}
    journal = Journal()
    record = run_bench(Bench(str(folder / "tiny.gguf"), rivals, texts), Work(journal=journal))
    assert record.left_out == {}
    assert [one.name for one in record.rivals] == ["small", "hub Q4_0", "ours"]  # the smallest first
    assert [one.bytes for one in record.rivals] == sorted(one.bytes for one in record.rivals)
    assert record.against == "hub Q4_0"
    assert [text.name for text in record.texts] == ["letters", "code"]
    for text in record.texts:
        by_name = {figure.rival: figure for figure in text.figures}
        assert by_name["hub Q4_0"].ratio == 1
        assert by_name["ours"].ratio < 0.1
        assert by_name["small"].ratio > 1
        share = by_name["small"].fidelity.kl_mean / by_name["hub Q4_0"].fidelity.kl_mean
        assert by_name["small"].ratio == pytest.approx(share)
        assert by_name["small"].ratio_low <= by_name["small"].ratio <= by_name["small"].ratio_high
    alone = measure_model(
        str(folder / "tiny.gguf"), Measuring(files=[Path(path_of(folder, "Q2_K"))], texts=[folder / "letters"]), Work()
    )
    letters = {figure.rival: figure for figure in record.texts[0].figures}
    assert letters["small"].fidelity.kl_mean == alone[0].kl_mean  # the same way as `measure`

    again = Journal()
    assert run_bench(Bench(str(folder / "tiny.gguf"), rivals, texts), Work(journal=again)) == record
    assert any("fidelity" in line for line in again.reused)  # nothing is measured twice


def test_a_checkpoint_folder_is_a_rival_as_it_lies(folder, tmp_path):
    """Neither converted nor decoded to a file of its own."""
    build_levels(str(folder / "tiny.gguf"), parse_levels(["INT8-W8A16"]), Build(out=tmp_path), Work())
    rivals = {"file": path_of(folder, "Q8_0"), "folder": str(next(tmp_path.glob("*INT8*")))}
    texts = {"letters": (folder / "letters",)}
    record = run_bench(Bench(str(folder / "tiny.gguf"), rivals, texts), Work())
    own = next(one for one in record.rivals if one.name == "folder")
    assert record.left_out == {}
    assert own.bytes == sum(path.stat().st_size for path in Path(own.path).glob("*.safetensors")) > 0
    loss = {figure.rival: figure.fidelity.kl_mean for figure in record.texts[0].figures}
    assert 0 < loss["folder"] < 10 * loss["file"]


def test_rivals_that_cannot_be_compared_are_left_out_and_told(folder, tmp_path):
    cut = tmp_path / "cut-Q4_0.gguf"
    cut.write_bytes(Path(path_of(folder, "Q4_0")).read_bytes()[:3000])
    more = write_tiny(tmp_path / "more.gguf", tokens_more=5)
    other = tmp_path / "other.gguf"  # as many tokens, one of which is another
    other.write_bytes((folder / "tiny.gguf").read_bytes().replace(b"<|endoftext|>", b"<|endofbook|>"))
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(Path(path_of(folder, "Q8_0")).read_bytes())
    rivals = {
        "gone": str(tmp_path / "gone.gguf"), "cut": str(cut), "good": path_of(folder, "Q8_0"), "more": str(more),
        "other": str(other), "copy": str(copy),
    }  # fmt: skip
    journal = Journal()
    texts = {"letters": (folder / "letters",)}
    record = run_bench(Bench(str(folder / "tiny.gguf"), rivals, texts), Work(journal=journal))
    assert [one.name for one in record.rivals] == ["good"]
    assert record.against == "good"
    assert set(record.left_out) == set(rivals) - {"good"}
    assert "token_embd.weight" in record.left_out["more"]
    assert "another vocabulary: 1 of 260 tokens differ" in record.left_out["other"]
    assert record.left_out["copy"] == "It is the same file as good."
    assert sum("is left out" in line for line in journal.warnings) == 5
    with pytest.raises(BadInput, match="No rival can be compared") as caught:
        run_bench(Bench(str(folder / "tiny.gguf"), {"cut": str(cut)}, texts), Work())
    assert "cut: " in caught.value.means


def test_the_command_reads_a_file_prints_a_table_and_says_what_is_left_out(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    kit = folder / "bench.yaml"
    kit.write_text(
        f"model: tiny.gguf\nrivals:\n  theirs: {Path(path_of(folder, 'Q4_0')).name}\n"
        f"  ours: {Path(path_of(folder, 'Q8_0')).name}\ntexts:\n  letters: letters\n"
    )
    told = CliRunner().invoke(app, ["bench", str(kit), "--threads", "1"])
    assert told.exit_code == 0, told.output
    assert "theirs" in told.output
    assert "share" in told.output
    ours = path_of(folder, "Q8_0")
    arguments = ["bench", str(folder / "tiny.gguf"), f"good={ours}", str(tmp_path / "gone.gguf")]
    told = CliRunner().invoke(app, [*arguments, "--text", str(folder / "code.txt"), "--threads", "1", "--json"])
    assert told.exit_code == BadInput.exit_code
    assert f"exit code is then {told.exit_code}" in CliRunner().invoke(app, ["bench", "--help"]).output
    record = json.loads(told.stdout)
    assert list(record["left_out"]) == ["gone"]
    assert record["texts"][0]["name"] == "code"
    assert record["rivals"][0]["sha256"]
    assert set(BenchRecord.__dataclass_fields__) <= set(record)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("rivals: {a: b}", "lacks a model"),
        ("model: x.gguf\nrivals: [a, b]", "line 2: rivals must be places by their names"),
        ("model: x.gguf\nrivals: {}", "rivals must be places"),
        ("model: x.gguf\nrivals: {a: 3}", "line 2"),
        ("model: x.gguf\nrivals: {a: b, '': c}", "line 2: each of rivals needs a name of its own"),
        (f"model: x.gguf\nrivals: {{{'a' * 80}b: c, {'a' * 80}d: e}}", "line 2: each of rivals needs a name"),
        ("model: x.gguf\nrivals: {a: b}\ntexts: {wiki: gone.txt}", "line 3: wiki names"),
        (f"model: x.gguf\nrivals: {{a: b}}\ntexts: {{wiki: {'t' * 300}}}", "line 3: wiki names"),
        ("model: x.gguf\nrivals: {a: b}\ntexts: {wiki: ~nobody-here/t.txt}", "line 3: wiki names"),
        ("model: x.gguf\nrivals: {a: b}\nlevels: 3", "no field 'levels'"),
        ("model: [", "no YAML"),
    ],
)
def test_faults_of_a_file_have_their_line(tmp_path, words, found):
    (tmp_path / "b.yaml").write_text(words)
    with pytest.raises(BadInput) as caught:
        read_bench(tmp_path / "b.yaml")
    assert found in caught.value.found


@pytest.mark.parametrize("place", ["r" * 300, "~nobody-here/r.gguf"])
def test_places_that_no_file_can_have_are_left_to_be_told_with_their_rival(tmp_path, place):
    (tmp_path / "b.yaml").write_text(f"model: x.gguf\nrivals: {{a: {place}}}")
    assert read_bench(tmp_path / "b.yaml").rivals == {"a": place}


def test_names_on_the_command_line():
    told = CliRunner().invoke(app, ["bench", "m.gguf"])
    assert told.exit_code == UsageError.exit_code
    told = CliRunner().invoke(app, ["bench", "m.gguf", "a/x.gguf", "b/x.gguf"])
    assert told.exit_code == UsageError.exit_code
    assert "NAME=FILE" in told.output
    for rival in ("=x.gguf", "x="):
        told = CliRunner().invoke(app, ["bench", "m.gguf", rival])
        assert told.exit_code == UsageError.exit_code
        assert f"'{rival}' lacks a name or a file." in told.output


def test_texts_of_one_name_are_all_measured(folder, tmp_path):
    for place, text in (("a", "salt and pepper "), ("b", "a bridge over the river ")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "wiki.txt").write_text(text * 40)
    texts = [part for place in "aba" for part in ("--text", str(tmp_path / place / "wiki.txt"))]
    told = CliRunner().invoke(
        app, ["bench", str(folder / "tiny.gguf"), path_of(folder, "Q8_0"), *texts, "--threads", "1", "--json"]
    )
    assert told.exit_code == 0, told.output
    assert [text["name"] for text in json.loads(told.stdout)["texts"]] == ["a/wiki.txt", "b/wiki.txt"]
