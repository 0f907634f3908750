"""Sweeps: the file's faults, what a job's key follows from, jobs that fail, and several sweeps on one store."""

import collections
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.errors import BadInput, NothingFits, OutputError
from bitladder.records.reading import read_json
from bitladder.records.sweep import SweepRecord, SweepRow, SweepState
from bitladder.report.sweep import render_sweep, write_sweep
from bitladder.stages.sweep import run_sweep, stored_rows, sweep_costs, sweep_jobs, sweep_record
from bitladder.stages.sweep_file import read_sweep
from bitladder.store import Evidence
from ladder_examples import run_record
from tiny_engine import write_tiny

WORKLOAD = "inputs:\n  - {id: one, prompt: Hello, max_tokens: 4, expect: {max_words: 100}}\n"
HERE = Path(__file__).parents[1]


@functools.cache
def made():
    """What a run found out."""
    return run_record()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two tiny models and a workload, and a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITLADDER_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("BITLADDER_STORE", raising=False)
    write_tiny(tmp_path / "a.gguf")
    write_tiny(tmp_path / "b.gguf", seed=1)
    (tmp_path / "w.yaml").write_text(WORKLOAD)
    (tmp_path / "t.txt").write_text("Some words to measure on. " * 60)
    return tmp_path


def jobs_of(folder: Path, text: str):
    (folder / "jobs.yaml").write_text(text)
    return sweep_jobs(read_sweep(folder / "jobs.yaml"), folder / "out", threads=1, device="cpu")


FAULTY = """\
models: [a.gguf, none.gguf, "http://host:1#m"]
levels: [Q8_0, Q9_9]
workloads: [w.yaml, missing.yaml]
bars:
  - kl < 0.1
  - kl > nonsense
  - 7
ctx: many
effor: good
effort: hard
text: [none.txt]
imatrix: none.dat
price: {hour: -1, rate: 2}
"""


def test_every_fault_of_a_file_is_named_with_its_line(here):
    (here / "jobs.yaml").write_text(FAULTY)
    with pytest.raises(BadInput) as caught:
        read_sweep(here / "jobs.yaml")
    lines = caught.value.found.splitlines()
    expected = [
        (1, "none.gguf"), (1, "an address has none"), (2, "Q9_9"), (3, "missing.yaml"), (6, "wrong way"),
        (7, "needs a text"), (8, "whole number"), (9, "effor"), (10, "effort"), (11, "none.txt"), (12, "none.dat"),
        (13, "price"),
    ]  # fmt: skip
    assert len(lines) == len(expected), caught.value.found
    for line, (number, words) in zip(lines, expected, strict=True):
        assert line.startswith(f"jobs.yaml, line {number}: ") and words in line, line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no models"),
        ("- a", "names no models"),
        ("models: []", "is empty"),
        ("models: [a.gguf", "no YAML"),
        ("models: [a.gguf]\nlevels: Q8_0", "must be a list"),
        ("models: [a.gguf]\nlevels: [[Q8_0], []]", "is empty"),
        ("models: [a.gguf]\nlevels: [[Q8_0], Q4_K_M]", "needs a text"),
        ("models: {a: 1}", "needs a text"),
        ("models: [a.gguf]\nmodels: [b.gguf]", "twice"),
        ("models: [a.gguf]\nprice: {hour: .nan}", "price"),
        ("models: &x [*x]", "line 1"),
        (f"models: {[f'm{n}' for n in range(200)]}\nbars: {[f'kl < 0.{n}' for n in range(1, 60)]}", "at most 10000"),
        ("models: [a.gguf]" + "\n#" * 300_000, "more than"),
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_files_that_are_no_sweep(here, text, said):
    (here / "jobs.yaml").write_text(text)
    with pytest.raises(BadInput, match=said):
        read_sweep(here / "jobs.yaml")


def test_a_job_is_known_by_all_that_its_result_follows_from(here):
    base = "models: [a.gguf]\nlevels: [Q8_0]\nworkloads: [w.yaml]\nbars: [kl < 0.1]\ntext: [t.txt]\n"
    (job,) = jobs_of(here, base)
    (here / "moved").mkdir()
    (here / "moved" / "other.gguf").write_bytes((here / "a.gguf").read_bytes())
    (moved,) = jobs_of(here, base.replace("a.gguf", "moved/other.gguf"))
    assert moved.row.key == job.row.key
    others = [
        base.replace("a.gguf", "b.gguf"), base.replace("Q8_0", "Q4_K_M"), base.replace("0.1", "0.2"), base + "ctx: 128",
        base + "imatrix: none", base + "effort: best", base.replace("text: [t.txt]\n", ""),
        base.replace("workloads: [w.yaml]\n", ""), base.replace("levels: [Q8_0]\n", ""),
    ]  # fmt: skip
    keys = {jobs_of(here, text)[0].row.key for text in others}
    assert len(keys) == len(others) and job.row.key not in keys
    product = jobs_of(here, "models: [a.gguf, b.gguf]\nlevels: [[Q8_0], [Q4_K_M]]\nbars: [kl < 1, kl < 2, kl < 3]\n")
    assert len(product) == len({one.row.key for one in product}) == 12
    assert len({one.settings.out for one in product}) == 2  # levels of one model lie together


def run_of(jobs, out, errors=(), began=None):
    """A sweep whose jobs of these bars fail."""
    errors = dict(errors)

    def run(settings, progress, say):
        (began if began is not None else []).append(settings.bar)
        if settings.bar in errors:
            raise errors[settings.bar]
        return made()

    return run_sweep(jobs, out, run)


def test_a_job_that_fails_is_told_and_tried_again_and_the_others_are_not(here):
    jobs = jobs_of(here, "models: [a.gguf, b.gguf]\nbars: [kl < 0.1, kl < 0.2]\n")
    began: list[str] = []
    rows = run_of(jobs, here / "out", {"kl < 0.2": NothingFits("Too large.")}, began)
    assert [row.state for row in rows] == [SweepState.DONE, SweepState.FAILED] * 2
    assert rows[1].error == "Too large." and rows[0].quality == made().decision.quality
    assert len(began) == 4
    assert (here / "out" / rows[0].report).is_file()
    again: list[str] = []
    rows = run_of(jobs, here / "out", (), again)
    assert [row.state for row in rows] == [SweepState.STORED, SweepState.DONE] * 2
    assert again == ["kl < 0.2"] * 2
    with Evidence.open() as store:
        assert len(stored_rows(store, jobs)) == 4
        store.put("sweep", jobs[0].key, {"nonsense": 1})  # no record of ours: done anew
    assert [row.state for row in run_of(jobs, here / "out")] == [SweepState.DONE, *[SweepState.STORED] * 3]


def test_a_full_disk_ends_a_sweep_and_frees_its_claim(here):
    jobs = jobs_of(here, "models: [a.gguf]\nbars: [kl < 0.1, kl < 0.2]\n")
    with pytest.raises(OutputError):
        run_of(jobs, here / "out", {"kl < 0.2": OutputError("No space.")})
    rows = run_of(jobs, here / "out")
    assert [row.state for row in rows] == [SweepState.STORED, SweepState.DONE]


def test_what_a_file_names_twice_is_one_job(here):
    (here / "same.gguf").write_bytes((here / "a.gguf").read_bytes())
    twice = "models: [a.gguf, a.gguf, same.gguf]\nlevels: [[Q8_0], [Q8_0]]\nworkloads: [w.yaml, w.yaml]\n"
    assert len(jobs_of(here, twice + "bars: [kl < 1, kl < 1]\n")) == 1
    done = CliRunner().invoke(app, ["sweep", "jobs.yaml", "--plan"])
    assert done.exit_code == 0 and "1 jobs" in done.output


def test_what_a_sweep_takes_counts_what_is_shared_once(here):
    text = "models: [a.gguf, b.gguf]\nlevels: [Q8_0, Q4_K_M]\nbars: [kl < 0.1, kl < 0.2]\nprice: {hour: 3.6}\n"
    jobs = jobs_of(here, text)
    sweep = read_sweep(here / "jobs.yaml")
    first, second, third, _ = sweep_costs(sweep, jobs, set())
    assert first.low_s < first.seconds < first.high_s and first.disk_bytes > 0
    assert (second.seconds, second.disk_bytes) == (0, 0)  # the same levels, the same answers, another bar
    assert third.seconds > 0 and third.disk_bytes == first.disk_bytes
    assert first.money == pytest.approx(first.seconds * 0.001)
    assert sweep_costs(sweep, jobs, {jobs[0].row.key})[0].seconds == 0
    unknown = jobs_of(here, "models: [no-such-model]\n")
    (cost,) = sweep_costs(read_sweep(here / "jobs.yaml"), unknown, set())
    assert cost.note and cost.seconds == 0


def test_the_report_shows_every_job_and_escapes_what_comes_from_outside(here):
    jobs = jobs_of(here, "models: [a.gguf]\nbars: [kl < 0.1, kl < 0.2]\nname: <b>mine</b>\n")
    rows = run_of(jobs, here / "out", {"kl < 0.2": NothingFits("<script>no</script>")})
    record = sweep_record(read_sweep(here / "jobs.yaml"), rows, [])
    html = write_sweep(record, here / "out").read_text()
    assert "<script>" not in html and "&lt;script&gt;no" in html and "<b>mine" not in html
    assert html.count('<th scope="row">') == 2 and rows[0].report in html
    assert read_json(SweepRecord, (here / "out" / "sweep.json").read_text()) == record
    assert render_sweep(record) == html


def test_a_server_that_goes_away_is_told_and_the_sweep_goes_on_when_it_is_back(here, postgres):
    jobs = jobs_of(here, "models: [a.gguf]\nbars: [kl < 0.7, kl < 0.8, kl < 0.9]\n")

    def run(settings, progress, say):
        if settings.bar == "kl < 0.8":
            postgres.stop()
        return made()

    with pytest.raises(BadInput, match="does not answer") as caught:
        run_sweep(jobs, here / "out", run, store_url=postgres.url, lease_s=1.0)
    assert "Check the address and that the server runs" in str(caught.value)
    postgres.start()
    rows = run_sweep(jobs, here / "out", lambda *_: made(), store_url=postgres.url, lease_s=1.0)
    assert [row.state for row in rows] == [SweepState.STORED, SweepState.DONE, SweepState.DONE]


def test_four_sweeps_share_a_store_two_are_killed_and_nothing_is_done_twice_or_lost(here, postgres):
    url = postgres.url
    bars = [f"kl < 0.{number}" for number in range(1, 5)]
    (here / "jobs.yaml").write_text(f"models: [a.gguf, b.gguf]\nbars: {json.dumps(bars)}\n")
    with Evidence.open(url) as store:
        before = store.count()["sweep"]
    log = here / "log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE)])}

    def start(number: int) -> subprocess.Popen:
        # each on a machine of its own, as far as folders go
        command = [sys.executable, HERE / "sweep_worker.py", "jobs.yaml", f"out{number}", url, log, "1.5", "0.3"]
        return subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)

    workers = [start(number) for number in range(4)]
    chance = random.Random(0)
    for victim in chance.sample(workers, 2):
        while not log.exists() or log.read_text().count("begin") < 3:
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    said = [worker.communicate(timeout=120)[0].split("\n") for worker in workers if worker.returncode is None]
    assert len(said) == 2
    for lines in said:
        assert [line.split()[0] for line in lines if line].count("failed") == 0
        assert len([line for line in lines if line]) == 8
    ended = collections.Counter(line for line in log.read_text().splitlines() if line.startswith("end"))
    assert len(ended) == 8
    assert sum(ended.values()) <= 8 + 2  # of those that were killed as they had ended a job and not stored it
    with Evidence.open(url) as store:
        assert store.count()["sweep"] == before + 8


@pytest.mark.model
def test_the_verb_on_a_real_model(here):
    (here / "jobs.yaml").write_text(
        "models: [a.gguf]\nlevels: [Q8_0]\nworkloads: [w.yaml]\nbars: [kl < 100, kl < 101]\ntext: [t.txt]\n"
        "imatrix: none\n"
    )
    runner = CliRunner()
    planned = runner.invoke(app, ["sweep", "jobs.yaml", "--plan", "--threads", "1", "--json"])
    assert planned.exit_code == 0, planned.output
    assert len(json.loads(planned.stdout)["costs"]) == 2
    done = runner.invoke(app, ["sweep", "jobs.yaml", "--threads", "1", "--out", "s"])
    assert done.exit_code == 0, done.output
    record = read_json(SweepRecord, (here / "s" / "sweep.json").read_text())
    assert {row.state for row in record.rows} == {SweepState.DONE}
    assert all((here / "s" / row.report).is_file() for row in record.rows)
    again = runner.invoke(app, ["sweep", "jobs.yaml", "--threads", "1", "--out", "s"])
    assert again.exit_code == 0 and "2 of them stored already" in again.output


def test_rows_are_records_that_are_read_back():
    row = SweepRow("k", "m", ("Q8_0",), "w", "")
    assert (
        read_json(SweepRow, json.dumps({"key": "k", "model": "m", "levels": ["Q8_0"], "workload": "w", "bar": ""}))
        == row
    )
