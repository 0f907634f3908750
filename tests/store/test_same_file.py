"""One file under several names is measured once: fidelity, answers and speed are found under each of them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bitladder.describe.windows import Window
from bitladder.records.evaluation import Answer, Speed
from bitladder.records.level_file import Making, StoredFile
from bitladder.stages import measure
from bitladder.stages.job import Work
from bitladder.store.evidence import Evidence
from bitladder.store.recorded import Recorded, Subject
from bitladder.walk.head import TokenScores
from ladder_examples import fidelity

ENGINE = {"engine": "fake"}
SPEED = Speed(100.0, 40.0, 0.5, others_share=0.0, rounds=(40.0, 41.0, 39.0), turns="first")
ANSWER = Answer("a", "A", False, "not judged yet", "stop", 1, 1, question="q")
A, B, C = (Subject("source", level, made="good") for level in ("Q3_K_S", "Q2_K", "Q4_K_M"))


@pytest.fixture
def recorded():
    with Evidence.open() as store:
        yield Recorded(store)


def keep(recorded, subject, sha256, *, path="x.gguf"):
    making = Making("good", "none", "", 1)
    recorded.keep_file(subject, StoredFile("source", subject.level, sha256, path, 10, "good", making, "1"))


def test_what_is_measured_under_one_name_is_found_under_the_others(recorded):
    for subject, sha256 in ((A, "f" * 64), (B, "f" * 64), (C, "e" * 64)):
        keep(recorded, subject, sha256)
    recorded.keep_fidelity(A, "text", fidelity("Q3_K_S", 0.2))
    recorded.keep_answer(A, "q", ENGINE, ANSWER)
    recorded.keep_speed(A, ENGINE, SPEED)
    assert recorded.fidelity(B, "text") == replace(fidelity("Q3_K_S", 0.2), level="Q2_K")
    assert recorded.answers(B, ["q", "other"], ENGINE) == {"q": ANSWER}
    assert recorded.speed(B, ENGINE) == SPEED
    for found in (recorded.fidelity(C, "text"), recorded.speed(C, ENGINE), recorded.fidelity(B, "another text")):
        assert found is None
    assert recorded.answers(C, ["q"], ENGINE) == recorded.answers(B, ["q"], {"engine": "another"}) == {}
    assert recorded.one_of_each([A, B, C]) == {A: A, B: A, C: C}


def test_its_own_measurement_goes_first(recorded):
    keep(recorded, A, "f" * 64)
    keep(recorded, B, "f" * 64)
    recorded.keep_speed(A, ENGINE, SPEED)
    recorded.keep_speed(B, ENGINE, replace(SPEED, turns="second"))
    assert [recorded.speed(one, ENGINE).turns for one in (A, B)] == ["first", "second"]


def test_a_file_named_by_its_hash_is_the_same_file_too(recorded):
    keep(recorded, A, "f" * 64)
    named = Subject("source", "mine", file="f" * 64)
    recorded.keep_fidelity(A, "text", fidelity("Q3_K_S", 0.2))
    recorded.keep_speed(named, ENGINE, SPEED)
    assert recorded.fidelity(named, "text").level == "mine"
    assert recorded.speed(A, ENGINE) == SPEED
    assert recorded.one_of_each([named, A]) == {named: named, A: named}


def test_nothing_is_shared_across_sources_or_by_what_was_never_a_file(recorded):
    keep(recorded, A, "f" * 64)
    other = Subject("another", "Q3_K_S", made="good")
    recorded.keep_speed(A, ENGINE, SPEED)
    assert recorded.speed(other, ENGINE) is None
    assert recorded.one_of_each([B, C]) == {B: B, C: C}


def test_rows_that_others_wrote_name_nothing(recorded):
    keep(recorded, B, "f" * 64)
    recorded._store.put("file", {"source": "source", "sha256": "f" * 64, "level": ["Q"], "bitladder": 7}, {"a": 1})
    recorded._store.put("file", {"source": "source", "sha256": "f" * 64}, None)
    assert recorded.speed(B, ENGINE) is None


def test_of_equal_files_one_is_measured(recorded, monkeypatch):
    keep(recorded, A, "f" * 64)
    keep(recorded, B, "f" * 64)
    walked, windows = [], [Window("a", np.arange(7))]

    def walk(self, missing, windows):
        walked.append([one.level for one in missing])
        return [(TokenScores(np.ones(3), np.ones(3), np.zeros(3)),) * 2 for _ in missing]

    monkeypatch.setattr(measure.Ways, "_walked", walk)
    monkeypatch.setattr(measure, "way_for", lambda *_: measure.Way.WALK)
    job = SimpleNamespace(**vars(Work()), source=None, text_key=lambda _: "text", windows=lambda _: windows)
    for subjects in ([C, A, B], [B], [B, A]):
        found = measure.fidelities(job, subjects, None, [], recorded, files=None)
        assert [one.level for one in found] == [one.level for one in subjects]
    assert walked == [["Q4_K_M", "Q3_K_S"]]
