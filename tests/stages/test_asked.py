"""Speeds measured while other programs ran: told in the run, and measured again by the next one."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from bitladder.describe.criteria import KINDS, Context
from bitladder.describe.workload import Criterion, Input, Workload
from bitladder.engines.base import Completion
from bitladder.records.evaluation import MOST_OTHERS_SHARE, Speed
from bitladder.stages.ask import Asker, LevelToAsk
from bitladder.stages.job import Journal, Work
from bitladder.store.evidence import Evidence
from bitladder.store.recorded import Recorded, Subject

QUIET = Speed(100.0, 40.0, 0.5, others_share=MOST_OTHERS_SHARE, rounds=(40.0, 41.0, 39.0), turns="first")
DISTURBED = Speed(60.0, 20.0, 0.5, others_share=0.4, rounds=(20.0, 21.0, 19.0), turns="second")
WORKLOAD = Workload(
    "w", (Input("a", ({"role": "user", "content": "a"},), (Criterion("exact", KINDS["exact"].parse("A")),)),)
)
LEVEL = LevelToAsk(Subject("source", "Q4_K_M", made="good"), Path("never opened"))


class Engine:
    """Says A to everything."""

    name, parallel = "fake", 1

    def chat(self, _):
        return Completion("A", "stop", 1, 1, "fake", 0.1, 0.1)


@pytest.fixture
def ask(monkeypatch):
    """Ask the level once, with one speed to be measured; tells the level's speed, and the journal."""
    monkeypatch.setattr("bitladder.engines.registry.start", lambda _: nullcontext(Engine()))

    def ask(speed):
        monkeypatch.setattr("bitladder.stages.speeds.measure_in_turns", lambda paths, *_, **__: [speed for _ in paths])
        journal = Journal()
        with Evidence.open() as store:
            asker = Asker(WORKLOAD, Context(), Recorded(store), 512, Work(journal=journal))
            (level,) = asker.ask_all([LEVEL])
        return level.speed, journal

    return ask


def test_a_disturbed_speed_is_told_with_what_to_do_and_measured_again(ask):
    speed, journal = ask(DISTURBED)
    assert speed == DISTURBED
    (warning,) = journal.warnings
    assert "Q4_K_M 40%" in warning
    assert "run again" in warning
    speed, journal = ask(QUIET)
    assert speed == QUIET
    assert (journal.warnings, journal.reused) == ([], ["answers of Q4_K_M"])


def test_an_undisturbed_speed_is_reused(ask):
    ask(QUIET)
    speed, journal = ask(DISTURBED)
    assert speed == QUIET
    assert journal.reused == ["answers and speed of Q4_K_M"]
