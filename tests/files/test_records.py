"""Records to JSON and back: what real commands left, to the byte, and what strangers might put there instead.

``fixtures/records/`` holds what ``run``, ``quantize``, ``recipe`` and ``smallest`` wrote on a model of two million
weights, as it lay on the disk: a run's record, an export of evidence, a log of jobs, a table of losses, and what a
checkpoint folder says of itself.
"""

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest

import ladder_examples
from bitladder.describe.rates import MeasuredMachine
from bitladder.errors import BadInput, OutputError
from bitladder.files.checkpoint_folder import MANIFEST, CheckpointFolder
from bitladder.files.job_log import log_path, read_jobs
from bitladder.files.probe import probe_machine
from bitladder.records import to_json
from bitladder.records.calibration import CheckpointReport, LinearLoss
from bitladder.records.decision import Decision
from bitladder.records.endpoint import Fingerprint
from bitladder.records.evaluation import Answer, Speed
from bitladder.records.fidelity import Fidelity
from bitladder.records.job import JobOutcome
from bitladder.records.level_file import StoredFile
from bitladder.records.reading import from_json, read_json
from bitladder.records.recipe import SensitivityTable
from bitladder.records.run import RunRecord
from bitladder.report import read_run, write_run
from bitladder.stages.weighing import keep_table, read_table
from bitladder.store import Evidence
from bitladder.store.evidence import canonical
from bitladder.store.recorded import Recorded, StoredDecision, Subject

KEPT = Path(ladder_examples.__file__).parent / "fixtures" / "records"
STORED = {"fidelity": Fidelity, "answer": Answer, "speed": Speed, "file": StoredFile}
READ = [
    RunRecord, Fidelity, Answer, Speed, StoredFile, Decision, Fingerprint, SensitivityTable, JobOutcome,
    CheckpointReport, LinearLoss,
]  # fmt: skip


def test_a_run_is_written_as_it_was_read(tmp_path):
    again = write_run(read_run(KEPT / "run.json"), tmp_path / "run.json")
    assert again.read_bytes() == (KEPT / "run.json").read_bytes()


def test_evidence_is_written_as_it_was_read(tmp_path):
    lines = (KEPT / "evidence.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    kinds = set()
    for row in rows:
        if kind := STORED.get(row["kind"]):
            assert canonical(from_json(kind, row["value"])) == canonical(row["value"])
        else:
            assert row["kind"] == "decision"
            assert to_json(from_json(Decision, row["value"]["decision"])) == row["value"]["decision"]
        kinds.add(row["kind"])
    assert kinds == {*STORED, "decision"}
    with Evidence.open("sqlite:///:memory:") as store:
        store.import_(KEPT / "evidence.jsonl")
        for row in rows:
            found = store.get(row["kind"], row["key"])
            store.put(
                row["kind"], row["key"], from_json(STORED[row["kind"]], found) if row["kind"] in STORED else found
            )
        again = {(row["kind"], canonical(row["key"])): row["value"] for row in map(json.loads, [*store.lines()][1:])}
    assert again == {(row["kind"], canonical(row["key"])): row["value"] for row in rows}


def test_jobs_tables_and_reports_are_written_as_they_were_read(tmp_path):
    log = log_path(probe_machine())
    log.parent.mkdir(parents=True)
    log.write_bytes((KEPT / "jobs.json").read_bytes())
    jobs = read_jobs(probe_machine())
    assert len(jobs) > 2
    assert json.dumps([to_json(job) for job in jobs]) == (KEPT / "jobs.json").read_text()
    table = read_table(KEPT / "sensitivity.json")
    assert table is not None
    keep_table(tmp_path / "again" / "table.json", table)
    assert (tmp_path / "again" / "table.json").read_bytes() == (KEPT / "sensitivity.json").read_bytes()
    report = json.loads((KEPT / "checkpoint.json").read_text())["report"]
    assert json.dumps(to_json(from_json(CheckpointReport, report))) == json.dumps(report)


def test_what_is_undefined_is_null_and_back(tmp_path):
    table = read_table(KEPT / "sensitivity.json")
    keep_table(tmp_path / "table.json", dataclasses.replace(table, error=math.nan, checked=((1.0, math.nan),)))
    stored = json.loads((tmp_path / "table.json").read_text())
    assert (stored["error"], stored["checked"]) == (None, [[1.0, None]])
    again = read_table(tmp_path / "table.json")
    assert math.isnan(again.error)
    assert math.isnan(again.checked[0][1])
    assert (
        read_json(Speed, '{"prefill_tokens_per_s": 1, "decode_tokens_per_s": null, "load_seconds": 0}').load_seconds
        == 0.0
    )
    assert math.isnan(from_json(LinearLoss, {"name": "a", "loss": math.nan, "tokens": 3}).loss)  # as older logs have it


def _floats(kind, where="", seen=()):
    """Where a plain float stands in what a record is made of."""
    if kind is float:
        yield where
    elif (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")) and kind not in seen:
        for name, inner in typing.get_type_hints(kind).items():
            yield from _floats(inner, f"{kind.__name__}.{name}", (*seen, kind))
    else:
        for inner in typing.get_args(kind):
            yield from _floats(inner, where, seen)


@pytest.mark.parametrize("kind", READ)
def test_every_float_of_a_record_that_is_read_back_may_be_undefined(kind):
    """`to_json` writes null for any that is: `Real` is the annotation that takes it back."""
    assert [*_floats(kind)] == []
    assert "PoolRates.kv_stream" in [*_floats(MeasuredMachine)]  # where one must be there


def _leaves(data, path=()):
    """Paths of all numbers, texts and truth values."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _leaves(value, (*path, key))
    elif data is not None:
        yield path


def _jsonpath(path):
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


FREE = ("settings", "machine", "timings", "versions", "files", "wording")
"""Members by name: those of ``files`` in a decision, say, are shown as ``[...]``."""


def test_whatever_is_wrong_in_a_run_is_named_by_its_place(tmp_path):
    data = json.loads((KEPT / "run.json").read_text())
    paths = [path for path in _leaves(data) if path[0] not in FREE and path[:2] != ("decision", "files")]
    shapes = {}
    for path in paths:
        shapes[tuple("*" if isinstance(part, int) else part for part in path)] = path
    assert len(shapes) > 100
    for path in shapes.values():
        for wrong in ([], {}, "text" if not isinstance(_at(data, path), str) else 3):
            broken = json.loads(json.dumps(data))
            _at(broken, path[:-1])[path[-1]] = wrong
            with pytest.raises(ValueError) as found:
                from_json(RunRecord, broken)
            assert _jsonpath(path) in str(found.value)


def _at(data, path):
    for part in path:
        data = data[part]
    return data


HOSTILE = [
    "[" * 200_000, '{"plan":' * 200_000, "null", "[]", '"run"', "{", "\ud800", '{"bitladder": 1e999}', "1" * 5000,
    '{"bitladder": "1", "source": {"name": "x"}}', '{"settings": {}}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_refused_in_one_way(tmp_path, text):
    path = tmp_path / "it.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BadInput, match="is not a run: "):
        read_run(path)
    assert read_table(path) is None
    log = log_path(probe_machine())
    log.parent.mkdir(parents=True)
    log.write_bytes(path.read_bytes())
    assert read_jobs(probe_machine()) == []


@pytest.mark.parametrize("value", [True, "1", [], {}, 10**400])
def test_a_number_is_a_number(value):
    with pytest.raises(ValueError, match=r"\$\.prefill_tokens_per_s|too large"):
        from_json(Speed, {"prefill_tokens_per_s": value, "decode_tokens_per_s": 1.0, "load_seconds": 1.0})


def test_older_and_newer_records_are_read(tmp_path):
    data = json.loads((KEPT / "run.json").read_text())
    for name in ("inputs", "wording", "jobs", "reused", "reference"):
        del data[name]
    data["invented"] = {"later": [1]}
    data["plan"]["levels"][0]["invented"] = 1
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data))
    record = read_run(path)
    assert (record.reference, record.jobs) == ("", ())
    assert "invented" not in to_json(record)


@pytest.mark.parametrize("change", [{"report": None}, {"digests": [1]}, {"report": {"level": 3}}])
def test_a_folder_that_says_what_nobody_wrote_is_refused(tmp_path, change):
    from bitladder.walk.checkpoint_result import proved

    stored = json.loads((KEPT / "checkpoint.json").read_text())
    folder = CheckpointFolder(tmp_path / "made", stored["fingerprint"], stored["source_sha256"])
    folder.target.mkdir()
    (folder.target / MANIFEST).write_text(json.dumps({**stored, **change}))
    with pytest.raises(OutputError, match=r"made says of itself what .*: Expected"):
        proved(folder, None, checkpoint=None, template=None, prompts={})


@pytest.mark.parametrize("value", [[], {}, "text", 3, {"decision": 3}, {"decision": {}, "run": 1}])
def test_stored_evidence_that_is_no_record_counts_as_none(value):
    """Somebody else's export may hold anything; it is measured anew, and takes the row's place."""
    subject, engine = Subject("source", "Q8_0", "method"), {"threads": 1}
    with Evidence.open("sqlite:///:memory:") as store:
        recorded = Recorded(store)
        speed = Speed(1.0, math.nan, 2.0)
        recorded.keep_speed(subject, engine, speed)
        rows = [(row.kind, row.key) for row in store.find("speed")]
        rows += [("decision", {"source": "source", "bar": "kl < 1"}), ("file", {"source": "source", "path": "p"})]
        for kind, key in rows:
            store.put(kind, key, value)
        assert recorded.speed(subject, engine) is None
        assert (recorded.decisions("source"), recorded.files("source")) == ([], [])
        recorded.keep_speed(subject, engine, speed)
        assert to_json(recorded.speed(subject, engine)) == to_json(speed)


def test_a_decision_comes_back_with_its_run(tmp_path):
    decision = read_run(KEPT / "run.json").decision
    with Evidence.open("sqlite:///:memory:") as store:
        recorded = Recorded(store)
        recorded.keep_decision("source", StoredDecision(decision, tmp_path / "run.json", "2026-01-31", "here"))
        (row,) = store.find("decision")
        kept = {"decision": to_json(decision), "run": str(tmp_path / "run.json"), "created": "2026-01-31"}
        assert row.value == {**kept, "machine": "here"}
        assert recorded.decisions("source") == [StoredDecision(decision, tmp_path / "run.json", "2026-01-31", "here")]
        store.put("decision", row.key, {"decision": kept["decision"], "run": kept["run"]})  # as earlier versions did
        (found,) = recorded.decisions("source")
        assert (found.created, found.machine) == (store.find("decision")[0].created, "")
