"""Before a job what it will take; after it what it took; and the next prediction corrected by that."""

import json
import time
from dataclasses import replace

import pytest

from bitladder.describe.machine import Machine
from bitladder.errors import NothingFits
from bitladder.files.gguf import GgufFile
from bitladder.files.job_log import correction, keep_job, log_path, read_jobs
from bitladder.files.probe import probe_machine
from bitladder.levels import parse_levels
from bitladder.plan.preflight import STATE_BYTES, WALK_START_S, JobNeed, quantize_need, walk_need
from bitladder.records.job import JobOutcome
from bitladder.stages import forecast as jobs
from bitladder.stages.calibration import make_imatrix
from bitladder.stages.job import Build, Journal, Work
from bitladder.stages.quantize import build_levels
from bitladder.units import Basis, GiB, MiB

MACHINE = Machine("cpu", 2, (), 8 * GiB, 6 * GiB, GiB)
NEED = JobNeed("quantize Q8_0", MiB, 0, MiB, 10.0, "assumed", "quantize good")


def finished(took, formula=10.0, kind="quantize good"):
    return JobOutcome(kind, "x", "2026-01-31T00:00:00+00:00", formula, formula, 5.0, 20.0, "assumed", took, 1, 1)


class TestCorrection:
    def test_none_without_jobs(self):
        assert correction([], "walk", 10.0) == correction([finished(20.0)], "walk", 10.0)
        assert correction([], "walk", 10.0).factor == 1.0

    def test_median_ratio_of_the_kind(self):
        log = [finished(20.0), finished(30.0), finished(900.0), finished(1.0, kind="walk")]
        assert correction(log, "quantize good", 10.0).factor == pytest.approx(3.0)
        assert correction(log, "walk", 10.0).jobs == 1

    def test_range_follows_the_spread(self):
        steady = correction([finished(took) for took in (20.0, 20.1, 19.9, 20.0)], "quantize good", 10.0)
        loose = correction([finished(took) for took in (10.0, 20.0, 40.0, 20.0, 12.0)], "quantize good", 10.0)
        assert steady.spread == pytest.approx(1.15)
        assert loose.spread > 2

    def test_old_jobs_are_outvoted(self):
        log = [finished(100.0) for _ in range(50)] + [finished(20.0) for _ in range(9)]
        assert correction(log, "quantize good", 10.0).factor == pytest.approx(2.0)

    def test_jobs_of_a_like_size_count_first(self):
        log = [finished(50.0, formula=5.0), finished(1200.0, formula=1000.0)]
        assert correction(log, "quantize good", 10.0).factor == pytest.approx(10)
        assert correction(log, "quantize good", 2000.0).factor == pytest.approx(1.2)
        assert correction(log[:1], "quantize good", 2000.0).factor == pytest.approx(10)

    def test_start_up_alone_says_nothing_about_a_rate(self):
        assert correction([finished(0.1)], "quantize good", 10.0).jobs == 0


class TestLog:
    def test_jobs_come_back(self):
        keep_job(MACHINE, finished(3.0))
        keep_job(MACHINE, finished(4.0))
        assert [job.took_s for job in read_jobs(MACHINE)] == [3.0, 4.0]
        assert read_jobs(replace(MACHINE, cores=4)) == []

    @pytest.mark.parametrize("content", ["{", '[{"kind": "x"}]', "3"])
    def test_a_damaged_log_stops_no_work(self, content):
        log_path(MACHINE).parent.mkdir(parents=True)
        log_path(MACHINE).write_text(content)
        assert read_jobs(MACHINE) == []
        keep_job(MACHINE, finished(3.0))
        assert len(read_jobs(MACHINE)) == 1


class TestJob:
    def test_too_little_memory_is_refused_with_what_is_missing(self):
        journal = Journal()
        with (
            pytest.raises(NothingFits, match=r"quantize Q8_0 needs .* of RAM") as caught,
            jobs.forecast(replace(NEED, ram_bytes=1 << 60), journal),
        ):
            pytest.fail("it must not begin")
        assert "are missing" in caught.value.means
        assert journal.jobs == []

    def test_too_little_disk_is_refused(self, tmp_path):
        with (
            pytest.raises(NothingFits, match="of disk space"),
            jobs.forecast(replace(NEED, disk_bytes=1 << 60), Journal(), tmp_path),
        ):
            pytest.fail("it must not begin")

    def test_the_next_prediction_is_corrected(self, monkeypatch):
        clock = iter([0.0, 46.0, 100.0, 146.0])
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        said = []
        journal = Journal(said.append)
        for _ in range(2):
            with jobs.forecast(NEED, journal):
                pass
        first, second = journal.jobs
        assert (first.predicted_s, first.label, first.took_s) == (10.0, "assumed", 46.0)
        assert (second.predicted_s, second.label) == (pytest.approx(46.0), "measured")
        assert second.low_s < 46 < second.high_s
        assert second.high_s / second.low_s < first.high_s / first.low_s
        assert said[1] == "quantize Q8_0: predicted 10 s, took 46 s."
        assert said[3] == "quantize Q8_0: predicted 46 s, took 46 s."

    def test_a_failed_job_teaches_nothing(self):
        with pytest.raises(ZeroDivisionError), jobs.forecast(NEED, Journal()):
            raise ZeroDivisionError
        assert read_jobs(probe_machine()) == []


class TestNeeds:
    def test_searching_harder_is_another_kind(self):
        kinds = {
            effort: quantize_need({"Q4_K": 1}, [1], MACHINE, threads=1, effort=effort).kind
            for effort in ("fast", "best")
        }
        assert kinds == {"fast": "quantize fast", "best": "quantize best"}

    def test_states_beyond_the_budget_go_to_disk(self):
        need = walk_need(0, 0, 1 << 20, 1024, 0, 1.0, MACHINE)
        assert need.disk_bytes == 4 * GiB - STATE_BYTES

    def test_a_walk_counts_one_pass_of_every_level(self, demo_gguf):
        with GgufFile.open(demo_gguf) as source:
            windows = [type("W", (), {"tokens": range(100)})] * 3
            alone = jobs.walking_need(source, windows, (), kind="importance")
            three = jobs.walking_need(source, windows, ("A", "B", "C"))
            used = sum(t.elements for t in source.model.tensors if t.name.startswith("blk."))
            head = source.model.dims.n_vocab * source.model.dims.n_embd
        rate = 2.5e10 * probe_machine().cores
        assert alone.seconds == pytest.approx(WALK_START_S + 2 * used * 300 / rate)
        assert three.seconds == pytest.approx(WALK_START_S + 4 * 2 * (used + head) * 300 / rate)
        assert three.what == "measure A, B, C on 300 tokens"


def test_building_says_what_it_took_and_repeats_nothing(demo_gguf, tmp_path):
    journal = Journal()
    for _ in range(2):
        build = Build(out=tmp_path, imatrix="none", effort="fast")
        build_levels(str(demo_gguf), parse_levels(["Q8_0", "Q4_0"]), build, Work(journal=journal))
    (only,) = journal.jobs
    assert only.what == "quantize Q8_0, Q4_0"
    assert only.disk_bytes == pytest.approx(sum(path.stat().st_size for path in tmp_path.glob("*.gguf")), rel=0.01)
    assert json.loads(log_path(probe_machine()).read_text())[0]["kind"] == "quantize fast"


def test_nothing_is_built_without_room(demo_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr("bitladder.files.probe.disk_free", lambda folder: 1000)
    with pytest.raises(NothingFits, match="quantize Q8_0 needs"):
        build_levels(str(demo_gguf), parse_levels(["Q8_0"]), Build(out=tmp_path, effort="fast"), Work())
    assert not list(tmp_path.glob("*.gguf"))


def test_an_importance_matrix_is_refused_where_a_layer_does_not_fit(demo_gguf, tmp_path, monkeypatch):
    small = replace(probe_machine(), ram_available=MiB)
    monkeypatch.setattr("bitladder.files.probe.probe_machine", lambda folder=None: small)
    with pytest.raises(NothingFits, match="gather an importance matrix"):
        make_imatrix(str(demo_gguf), (), tmp_path / "x.gguf", Work())


def test_a_walk_that_multiplies_in_bfloat16_is_predicted_by_the_rate_of_that(monkeypatch):
    monkeypatch.setattr(jobs, "_rate_of_products", lambda *, half: 4e11 if half else 2e11)
    need = replace(NEED, seconds=1000.0, label=Basis.ASSUMED)
    for pays in (False, True):
        monkeypatch.setattr("bitladder.walk.products.half_products_pay", lambda pays=pays: pays)
        walk, importance = (jobs.corrected_seconds(replace(need, kind=kind)) for kind in ("walk", "importance"))
        assert (importance - 5) * (2 if pays else 1) == pytest.approx(walk - 5)
