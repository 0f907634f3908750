"""Who is timed and asked of levels whose losses are known: those that can still be chosen, in turns."""

import math
from pathlib import Path

import pytest

from bitladder.describe.criteria import KINDS, Context
from bitladder.describe.workload import Criterion, Input, Workload
from bitladder.plan.decide import decide
from bitladder.records.evaluation import Answer, Speed
from bitladder.stages.ask import Asker, LevelToAsk
from bitladder.stages.contest import answers_that_matter
from bitladder.stages.evaluate import compare
from bitladder.stages.job import Journal, Work
from bitladder.stages.measure import Replies
from bitladder.store.recorded import Subject
from ladder_examples import SIZES, fidelity, plan

INPUTS = tuple(
    Input(f"i{n}", ({"role": "user", "content": str(n)},), (Criterion("exact", KINDS["exact"].parse("A")),))
    for n in range(25)
)
WORKLOAD = Workload("w", INPUTS)
LEVELS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
KL = {"Q8_0": 0.001, "Q6_K": 0.002, "Q5_K_M": 0.004, "Q4_K_M": 0.03, "Q3_K_M": 0.06, "Q2_K": 0.5}
RATES = {"F16": 20, "Q8_0": 40, "Q6_K": 45, "Q5_K_M": 50, "Q4_K_M": 70, "Q3_K_M": 80, "Q2_K": 99}


class World:
    """Levels that answer and are timed without an engine; tells who was."""

    def __init__(self, monkeypatch, *, failing=(), rates=None, kl=None, bar="kl < 0.1 and no known loss"):
        self.asked, self.timed, self.races = [], [], []
        self._failing, self._rates, self._bar = failing, rates or RATES, bar
        self._fidelities = [fidelity(level, mean) for level, mean in (kl or KL).items()]
        monkeypatch.setattr(Asker, "replies", self._replies)
        monkeypatch.setattr("bitladder.stages.speeds.speeds_in_turns", self._speeds)

    def _replies(self, contender, *, timed=False, inputs=None):
        level = contender.subject.level
        self.asked.append(level)
        said = "B" if level in self._failing else "A"
        return Replies(tuple(Answer(one.id, said, False, "", "stop", 1, 1) for one in INPUTS), None, stored=False)

    def _speeds(self, levels, recorded, work, *, past=0, race=None):
        names = [level.subject.level for level in levels]
        self.timed += names
        self.races.append(race)
        return [Speed(100.0, self._rates[name], 0.1, rounds=(self._rates[name],) * 3) for name in names], False

    def _decide(self, answers):
        known = [one for one in answers[1:] if one.answers or math.isfinite(one.speed.decode_tokens_per_s)]
        results = [compare(answers[0], one, WORKLOAD) for one in known]
        return decide(plan(), self._fidelities, results, bar=self._bar, reference="F16")

    def run(self, levels=LEVELS, **more):
        """The decision, and the answers that it rests on."""
        contenders = [LevelToAsk(Subject("source", level, made="x"), Path("never opened")) for level in levels]
        asker = Asker(WORKLOAD, Context(), None, 512, Work(journal=Journal()))
        found = answers_that_matter(asker, contenders, self._decide, SIZES, **more)
        return self._decide(found), found


def test_levels_that_fail_are_neither_asked_nor_timed_and_those_that_are_passed_over_are_not_asked(monkeypatch):
    world = World(monkeypatch)
    decision, found = world.run()
    assert (decision.quality, decision.speed) == ("Q5_K_M", "Q3_K_M")
    assert world.asked == ["F16", "Q5_K_M", "Q3_K_M"]
    assert sorted(world.timed) == sorted(set(LEVELS) - {"Q2_K"})
    assert world.races[0].stays == {"Q5_K_M"} and world.races[0].leaves == {"F16"}
    said = {one.level: one.reason for one in decision.verdicts}
    assert said["Q2_K"].endswith("; neither asked nor timed")
    assert said["Q4_K_M"].endswith("; not asked") and said["Q8_0"].endswith("; not asked")
    assert not said["Q5_K_M"].endswith("asked")
    known = {one.level: (len(one.answers), one.speed.decode_tokens_per_s) for one in found}
    assert known["Q4_K_M"] == (0, 70) and known["Q5_K_M"] == (25, 50) and "Q2_K" not in known


def test_where_answers_veto_a_tier_what_takes_its_place_is_asked(monkeypatch):
    world = World(monkeypatch, failing=("Q5_K_M", "Q3_K_M"))
    decision, _ = world.run()
    assert (decision.quality, decision.speed) == ("Q6_K", "Q4_K_M")
    assert world.asked[:3] == ["F16", "Q5_K_M", "Q3_K_M"] and set(world.asked[3:]) == {"Q6_K", "Q4_K_M"}
    assert len(world.races) == 1


def test_a_bar_on_answers_asks_every_level_that_the_rest_of_it_does_not_rule_out(monkeypatch):
    world = World(monkeypatch, bar="kl < 0.1 and no loss", failing=("Q3_K_M",))
    decision, _ = world.run()
    assert set(world.asked) == set(LEVELS) - {"Q2_K"}
    assert (decision.quality, decision.speed) == ("Q5_K_M", "Q4_K_M")
    assert set(world.timed) == set(LEVELS) - {"Q2_K", "Q3_K_M"}  # known to fail when it was their turn


def test_nobody_is_asked_where_all_are_known_to_fail(monkeypatch):
    world = World(monkeypatch, kl=dict.fromkeys(KL, 0.5))
    decision, found = world.run()
    assert decision.quality is None and world.asked == [] == world.timed
    assert [(one.level, one.answers) for one in found] == [("F16", ())]


@pytest.mark.parametrize("level", ["Q6_K", "Q3_K_M"])
def test_one_level_alone_is_asked_and_timed(monkeypatch, level):
    world = World(monkeypatch, kl={level: KL[level]})
    decision, _ = world.run(("F16", level))
    assert world.asked == ["F16", level] == world.timed
    assert decision.quality == decision.speed == level


def test_levels_that_may_hold_the_bar_are_timed_beside_the_race_and_not_asked(monkeypatch):
    world = World(monkeypatch, kl=KL | {"Q3_K_M": 0.097}, rates=RATES)
    decision, _ = world.run()
    assert {one.level: one.status for one in decision.verdicts}["Q3_K_M"] == "cannot tell"
    assert world.races[0].leaves == {"F16", "Q3_K_M"} and world.races[0].stays == {"Q5_K_M"}
    assert (decision.quality, decision.speed) == ("Q5_K_M", "Q4_K_M")
    assert {"Q5_K_M", "Q4_K_M"} < set(world.asked) and "Q6_K" not in world.asked
    named = {name for pair in decision.certainty for name in (pair.quality, pair.speed)}
    assert set(world.asked) <= {"F16", *named}


def test_where_guesses_are_tried_every_level_that_may_be_chosen_is_asked(monkeypatch):
    world = World(monkeypatch)
    world.run(every=True)
    assert set(world.asked) == set(LEVELS) - {"Q2_K"}


def test_every_loop_ends(monkeypatch):
    """Whatever the answers veto: each turn asks or times somebody who was not."""
    for failing in ([], ["Q8_0"], LEVELS[1:], LEVELS[2:5]):
        world = World(monkeypatch, failing=failing)
        world.run()
        assert len(world.asked) == len(set(world.asked)) and len(world.races) == 1
