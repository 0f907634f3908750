"""Every verb takes every kind of level, or refuses by kind with the reason."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.describe.text import Document
from cloud_server import serving
from engine_model import TEXT, WORKLOAD, write_engine_model

OTHER = "A cup of tea costs less than a train to the coast, said the woman in the red coat. "
SMALL = ("--threads", "1")
RECIPE, FITTED, FOLDED, CHECKPOINT = "Q8_0", "GPTQ-Q4_0", "AWQ-Q4_K_M", "GPTQ-4bit-g64"

pytestmark = pytest.mark.usefixtures("one_thread", "short_calibration")


@pytest.fixture
def short_calibration(monkeypatch) -> None:
    """A calibration text that a tiny model reads in a second."""
    documents = [Document(f"t{number}", f"{number} {OTHER}" * 8) for number in range(6)]
    for user in ("quantize", "weighing", "calibration"):
        monkeypatch.setattr(f"bitladder.stages.{user}.calibration_texts", lambda job, texts: documents)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with a model, a workload and a text."""
    monkeypatch.chdir(tmp_path)
    write_engine_model(tmp_path / "m-F16.gguf")
    (tmp_path / "w.yaml").write_text(WORKLOAD)
    (tmp_path / "t.txt").write_text(TEXT * 20)
    return tmp_path


def do(verb: str, *arguments: str | Path, code: int | None = 0):
    done = CliRunner().invoke(app, [verb, *map(str, arguments)])
    assert code is None or done.exit_code == code, (verb, done.output, done.exception)
    return done


def run_of(home: Path, *levels: str, also: tuple[str, ...] = (), code: int | None = 0) -> dict:
    """The record of a run of some levels."""
    done = do(
        "run", home / "m-F16.gguf", "--levels", ",".join(levels), "--workload", home / "w.yaml", "--text",
        home / "t.txt", "--bar", "kl < 9", "--out", home / "out", "--ctx", "512", "--full", *SMALL,
        *(word for one in also for word in ("--also", one)), code=code,
    )  # fmt: skip
    assert done.exit_code in (0, 4), (done.output, done.exception)
    return json.loads((home / "out/run.json").read_text())


def by_level(rows: list[dict]) -> dict[str, dict]:
    return {row["level"]: row for row in rows}


def test_a_run_takes_every_kind(home):
    levels = (RECIPE, FITTED, FOLDED, CHECKPOINT)
    record = run_of(home, *levels)
    fidelities, results = by_level(record["fidelities"]), by_level(record["results"])
    assert set(fidelities) == set(levels)
    assert all(0 < one["kl_mean"] < 9 for one in fidelities.values())
    assert set(results) == {RECIPE, FITTED, FOLDED}
    files, verdicts = by_level(record["files"]), by_level(record["decision"]["verdicts"])
    assert Path(files[CHECKPOINT]["path"]).is_dir()
    assert Path(files[FOLDED]["path"]).is_file()
    assert all(len(one["sha256"]) == 64 and one["method"] for one in files.values())
    assert record["decision"]["files"][CHECKPOINT] == files[CHECKPOINT]["sha256"]
    assert verdicts[CHECKPOINT]["status"] == "cannot tell"
    assert "its answers need an engine" in verdicts[CHECKPOINT]["reason"]
    assert CHECKPOINT not in (record["decision"]["quality"], record["decision"]["speed"])
    page = (home / "out/report.html").read_text()
    assert CHECKPOINT in page
    again = run_of(home, *levels)
    assert any("fidelity of" in line and CHECKPOINT in line and FOLDED in line for line in again["reused"])
    assert again["fidelities"] == record["fidelities"]


def test_a_run_takes_a_mixed_checkpoint(home):
    """Its schemes are chosen first, and the same again."""
    mixed = "CT-bpw5.50"
    record = run_of(home, RECIPE, mixed)
    fidelities, files = by_level(record["fidelities"]), by_level(record["files"])
    assert set(fidelities) == {RECIPE, mixed}
    assert 0 < fidelities[mixed]["kl_mean"] < 9
    config = json.loads((Path(files[mixed]["path"]) / "config.json").read_text())
    assert len(config["quantization_config"]["config_groups"]) > 1
    again = run_of(home, RECIPE, mixed)
    assert by_level(again["files"])[mixed]["sha256"] == files[mixed]["sha256"]
    assert any(f"fidelity of {RECIPE}, {mixed}" in line for line in again["reused"])


def test_answers_through_an_address_are_those_of_the_level(home):
    """An engine that answers nothing leaves its level open."""
    with serving(lambda _: 500) as cloud:
        record = run_of(home, RECIPE, also=(f"{CHECKPOINT}={cloud.url}#m",))
    assert set(by_level(record["results"])) == {RECIPE}
    verdict = by_level(record["decision"]["verdicts"])[CHECKPOINT]
    assert verdict["status"] == "cannot tell"
    assert "need an engine" in verdict["reason"]

    with serving(lambda _: "Hello there") as cloud:
        record = run_of(home, RECIPE, also=(f"{CHECKPOINT}={cloud.url}#m",))
    results, verdicts = by_level(record["results"]), by_level(record["decision"]["verdicts"])
    assert set(results) == {RECIPE, CHECKPOINT}
    assert cloud.asked
    assert set(by_level(record["fidelities"])) == {RECIPE, CHECKPOINT}
    assert verdicts[CHECKPOINT]["status"] in ("both tiers", "quality tier", "speed tier", "meets the bar")
    assert f"--also {CHECKPOINT}={cloud.url}#m" in record["commands"][0].replace("'", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--levels", "Q8_0", "--also", "Q4_K_M=http://127.0.0.1:9/v1#m"), "does not take Q4_K_M: it is a mix"),
        (("--levels", "Q8_0", "--reference", CHECKPOINT), "cannot be the reference of answers"),
        (("--levels", FOLDED, "--imatrix", "none"), "was asked for with --imatrix none"),
        (("--also", f"{CHECKPOINT}=http://h:1#a", "--also", f"{CHECKPOINT}=http://h:2#a"), "Two addresses"),
        (("--also", "Q9=http://h:1#a"), "no level 'Q9'"),
    ],
)
def test_what_a_run_refuses_before_any_work(home, words, said):
    done = do("run", home / "m-F16.gguf", *words, *SMALL, code=2)
    assert said in " ".join(done.stderr.split())
    assert not list(home.glob("*-ladder"))


def test_measure_takes_every_kind_and_leaves_nothing_behind(home):
    levels = (RECIPE, FITTED, FOLDED, CHECKPOINT)
    words = ("measure", home / "m-F16.gguf", "--levels", ",".join(levels), "--text", home / "t.txt", *SMALL, "--json")
    before = set(home.iterdir())
    first = by_level(json.loads(do(*words).stdout)["levels"])
    assert list(first) == list(levels)
    assert all(0 < one["kl_mean"] < 9 for one in first.values())
    assert {path.name for path in set(home.iterdir()) - before} <= {"cache", "data"}
    assert not list(home.rglob("measured/*/*"))
    assert by_level(json.loads(do(*words).stdout)["levels"]) == first


def test_measure_takes_folders(home):
    do("quantize", home / "m-F16.gguf", "--to", f"{CHECKPOINT},AWQ-4bit-g32,INT8-W8A8,GPTQ-8bit-row-ct", *SMALL)
    folders = sorted(path for path in home.glob("m-F16-*") if path.is_dir())
    assert len(folders) == 4
    files = [word for folder in folders for word in ("--file", folder)]
    words = ("measure", home / "m-F16.gguf", *files, "--text", home / "t.txt", *SMALL, "--json")
    found = by_level(json.loads(do(*words).stdout)["levels"])
    assert set(found) == {folder.name for folder in folders}
    assert all(0 < one["kl_mean"] < 1 for one in found.values())
    assert found["m-F16-GPTQ-8bit-row-ct"]["kl_mean"] < found[f"m-F16-{CHECKPOINT}"]["kl_mean"]


@pytest.mark.parametrize("verb", ["serve", "export", "smallest"])
def test_checkpoints_are_refused_by_kind_where_llama_cpp_must_run_them(home, verb):
    words = {
        "serve": ("--quality", CHECKPOINT),
        "export": ("--to", "llama-swap", "--quality", CHECKPOINT),
        "smallest": ("--levels", CHECKPOINT),
    }[verb]
    done = do(verb, home / "m-F16.gguf", *words, code=2)
    said = " ".join(done.stderr.split())
    assert f"does not take {CHECKPOINT}: it is a checkpoint folder" in said
    assert "URL" in said


def test_the_search_for_the_smallest_takes_every_kind_of_file(home):
    done = do(
        "smallest", home / "m-F16.gguf", "--levels", f"{RECIPE},{FITTED},{FOLDED}", "--workload", home / "w.yaml",
        "--bar", "passes >= reference - 90 points", "--out", home / "out", "--ctx", "512", *SMALL, "--json", code=None,
    )  # fmt: skip
    assert done.exit_code in (0, 5), done.output
    assert {one.name.rpartition("m-F16")[2] for one in (home / "out").glob("*.gguf")}


def test_a_folded_level_is_served_and_built_again_byte_for_byte(home, monkeypatch):
    served = []
    monkeypatch.setattr("bitladder.serve.app.serve", lambda settings, on_ready=None: served.append(settings))
    decided = run_of(home, FOLDED)["decision"]["files"][FOLDED]
    shutil.rmtree(home / "out")
    do("serve", home / "m-F16.gguf", "--quality", FOLDED.lower(), "--ctx", "512", "--threads", "1")
    assert served[-1].quality.sha256 == decided
    assert served[-1].quality.level == FOLDED
