"""`list` and `clean`: what is kept, what points to it, and that nothing else is deleted."""

import contextlib
import dataclasses
import hashlib
import io
import json
import mmap
import os
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.files.engine_package import ENGINE, engine_version
from bitladder.files.hashing import remember, state_of
from bitladder.records.level_file import Making, StoredFile
from bitladder.records.run import FileFacts
from bitladder.report import write_run
from bitladder.report.inventory import print_inventory
from bitladder.stages.inventory import CACHES, inventory
from bitladder.store.evidence import Evidence
from bitladder.store.recorded import Recorded, StoredDecision, Subject
from gguf_bytes import tiny_weights, write_model
from ladder_examples import run_record

SOURCE = "ab" * 32
LONG_AGO = time.time() - 90 * 86400


def run(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def listed():
    return json.loads(run("list", "--json"))


def levels():
    return [file for file in listed()["files"] if file["place"] == "level"]


def hashed_long_ago(path: Path) -> str:
    """Reading a file is use, and setting its times a change: its hash is kept without either."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    remember(aged(path), digest, state_of(path))
    return digest


@contextlib.contextmanager
def open_file(path: Path):
    with path.open("rb"):
        yield


@contextlib.contextmanager
def mapped_file(path: Path):
    """As engines hold a model: mapped, the file itself closed again."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with mapped:
        yield


def aged(path: Path) -> Path:
    for one in [path, *(path.rglob("*") if path.is_dir() else ())]:
        os.utime(one, (LONG_AGO, LONG_AGO))
    return path


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A store that knows a run's levels, a level that no run names, and one made elsewhere; all of them old."""
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "demo"
    folder.mkdir()
    with Evidence.open() as store:
        recorded = Recorded(store)
        for number, (level, method) in enumerate(
            {"Q8_0": "plain", "Q4_K_M": "plain", "Q3_K_M": "plain", "Q2_K": "plain", "Q6_K": ""}.items()
        ):
            path = write_model(folder / f"tiny-{level}.gguf", tiny_weights(seed=number))
            digest = hashed_long_ago(path)
            size = path.stat().st_size
            stored = StoredFile(SOURCE, level, digest, str(path), size, method, Making(), "0.1.0")
            recorded.keep_file(Subject(SOURCE, level, method), stored)
            if level == "Q8_0":
                record = run_record()
                files = (FileFacts(level, str(path), size, 8.5, digest),)
                decision = dataclasses.replace(record.decision, files={level: digest})
                at = write_run(dataclasses.replace(record, files=files, decision=decision), folder / "run.json")
                recorded.keep_decision(SOURCE, StoredDecision(decision, at, record.created, "m"))
            if level == "Q4_K_M":  # of a run whose record is gone
                decision = dataclasses.replace(record.decision, bar="kl < 1", files={level: digest})
                recorded.keep_decision(SOURCE, StoredDecision(decision, tmp_path / "gone/run.json", "2026-01-01", "m"))
    return folder


def names(files):
    return sorted(Path(file["path"]).name for file in files)


class TestLevels:
    def test_only_what_nothing_points_to_is_stale(self, kept):
        files = levels()
        assert names(files) == [f"tiny-{level}.gguf" for level in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q6_K", "Q8_0")]
        assert names(file for file in files if file["stale"]) == ["tiny-Q2_K.gguf", "tiny-Q3_K_M.gguf"]
        why = {Path(file["path"]).name: " ".join(file["kept_by"]) for file in files}
        assert f"run of 2026-01-02 03:04 ({kept / 'run.json'})" in why["tiny-Q8_0.gguf"]
        assert "whose record is gone" in why["tiny-Q4_K_M.gguf"] and "made elsewhere" in why["tiny-Q6_K.gguf"]

    def test_what_was_used_lately_or_changed_since_is_not_stale(self, kept):
        os.utime(kept / "tiny-Q2_K.gguf")
        with (kept / "tiny-Q3_K_M.gguf").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x7f")
        aged(kept / "tiny-Q3_K_M.gguf")
        files = levels()
        assert not [file for file in files if file["stale"]]
        assert any("changed after it was measured" in " ".join(file["kept_by"]) for file in files)

    def test_the_model_that_was_measured_against_is_kept(self, kept):
        digest = hashed_long_ago(kept / "tiny-Q2_K.gguf")
        with Evidence.open() as store:
            Recorded(store).keep_decision(digest, StoredDecision(run_record().decision, Path("/gone/run.json")))
        assert names(file for file in levels() if file["stale"]) == ["tiny-Q3_K_M.gguf"]

    def test_runs_with_the_one_that_is_served(self, kept):
        runs = listed()["runs"]
        there, gone = sorted(runs, key=lambda one: one["gone"])
        size = (kept / "tiny-Q8_0.gguf").stat().st_size
        assert (there["model"], there["levels"], there["bytes"], there["gone"]) == (
            "Reference 191M", ["Q8_0"], size, False,
        )  # fmt: skip
        assert there["path"] == str(kept / "run.json") and gone["gone"]
        assert [one["served"] for one in (there, gone)] == [True, False]

    def test_one_that_chose_nothing_is_not_served(self, kept):
        nothing = dataclasses.replace(run_record().decision, quality=None, speed=None)
        record = dataclasses.replace(run_record(), created="2027-01-02T03:04:05+00:00", decision=nothing)
        at = write_run(record, kept / "later" / "run.json")
        with Evidence.open() as store:
            Recorded(store).keep_decision(SOURCE, StoredDecision(nothing, at, record.created, "m"))
        assert not any(one["served"] for one in listed()["runs"])


class TestClean:
    def test_without_a_yes_nothing_goes(self, kept):
        said = run("clean")
        assert "Nothing was deleted" in said and "Q2_K" in said and "Q8_0" not in said
        assert json.loads(run("clean", "--json"))["deleted"] == []
        assert len(list(kept.glob("*.gguf"))) == 5

    def test_a_yes_deletes_that_and_nothing_else(self, kept):
        assert "Deleted 2 files" in run("clean", "--yes")
        assert sorted(path.name for path in kept.iterdir()) == [
            "run.json", "tiny-Q4_K_M.gguf", "tiny-Q6_K.gguf", "tiny-Q8_0.gguf",
        ]  # fmt: skip
        assert "Nothing is stale" in run("clean", "--yes")

    def test_what_a_program_has_open_or_maps_stays(self, kept):
        for held in (open_file, mapped_file):
            with held(kept / "tiny-Q2_K.gguf"):
                hashed_long_ago(kept / "tiny-Q2_K.gguf")  # which neither opening nor mapping leave it
                said = run("clean", "--yes")
            assert f"tiny-Q2_K.gguf stays: process {os.getpid()}" in said.replace("\n", "")
            assert (kept / "tiny-Q2_K.gguf").exists() and not (kept / "tiny-Q3_K_M.gguf").exists()
        hashed_long_ago(kept / "tiny-Q2_K.gguf")
        run("clean", "--yes")
        assert not (kept / "tiny-Q2_K.gguf").exists()

    def test_leftovers_and_the_cache(self, kept, tmp_path):
        cache, mine = tmp_path / "cache", kept / "notes.partial"
        mine.write_text("mine")
        (kept / "x-Q8_0.gguf.partial").write_bytes(b"0" * 10)
        (kept / ".x-GPTQ.partial").mkdir()
        (kept / ".x-GPTQ.partial/log.jsonl").write_text("{}")
        (kept / ".others.partial").mkdir()
        for name in (f"{ENGINE}-{engine_version()}", f"{ENGINE}-0.1"):
            (cache / "converter" / name).mkdir(parents=True)
        (cache / "walks").mkdir()
        (cache / "walks/layer1-0.f32").write_bytes(b"0" * 100)
        (cache / "unknown").mkdir()
        (cache / "unknown/file").write_bytes(b"0")
        for one, seed in (("a", 9), ("b", 10)):
            (cache / "converted" / one).mkdir(parents=True)
            write_model(cache / "converted" / one / "m.gguf", tiny_weights(seed=seed))
        blobs = tmp_path / "hub/models--org--name/blobs"
        blobs.mkdir(parents=True)
        (blobs / "abc.part").write_bytes(b"0" * 7)
        for folder in (kept, cache, tmp_path / "hub"):
            aged(folder)
        source, *_ = [hashed_long_ago(path) for path in (cache / "converted/a/m.gguf", *kept.glob("*.gguf"))]
        with Evidence.open() as store:
            Recorded(store).keep_decision(source, StoredDecision(run_record().decision, Path("/x/run.json")))
        run("clean", "--yes")
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
        assert {"demo/notes.partial", "demo/.others.partial", "cache/unknown/file", "cache/converted/a/m.gguf"} <= left
        assert f"cache/converter/{ENGINE}-{engine_version()}" in left
        gone = {
            "demo/x-Q8_0.gguf.partial", "demo/.x-GPTQ.partial", f"cache/converter/{ENGINE}-0.1",
            "cache/walks/layer1-0.f32", "hub/models--org--name/blobs/abc.part", "cache/converted/b/m.gguf",
        }  # fmt: skip
        assert not gone & left


@pytest.mark.parametrize("days", ["0", "1000000", "99999999999999999999"])
def test_days_that_no_calendar_has_are_refused(days):
    for name in ("list", "clean"):
        done = CliRunner().invoke(app, [name, "--older-than", days])
        assert done.exit_code == 2 and "1<=x<=36500" in done.output


def test_list_fits_a_narrow_terminal(kept):
    out = Console(file=io.StringIO(), width=80)
    found = inventory(older_than_days=30)
    print_inventory(found, CACHES, 30, out)
    lines = out.file.getvalue().splitlines()
    assert max(len(line) for line in lines if not line.startswith(("Evidence:", "Cache ("))) <= 80
    said = "\n".join(lines)
    assert "Reference 191M" in said and "Q2_K of " in said and "would free" in said
    assert "run of 2026-01-02 03:04" in said


def test_an_empty_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "nothing to clean" in run("list") and "Nothing is stale" in run("clean", "--yes")
