"""Which level is the fast one with guesses: tried on tiers, then on others that may win, on simulated ladders."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bitladder.plan.decide import decide
from bitladder.plan.speculation import next_to_try
from bitladder.plan.whatif import what_if
from bitladder.records.decision import Pairing, Status, TierGuesses
from bitladder.records.speculation import Gain, SpeculationReport, SpeculationResult
from bitladder.stages.tier_guesses import MOST_OTHERS, with_guesses
from bitladder.stats.paired import product_interval, ratio_above_one, ratio_interval
from bitladder.units import MiB
from ladder_examples import SIZES, SPEEDS, run_record

INPUTS = 12


def report(level: str, gain: float, *, noise=0.05, seed=0, extra=0, differing=()) -> SpeculationReport:
    """What ``INPUTS`` inputs say of guesses that make a level ``gain`` times as fast."""
    rng = np.random.default_rng(seed)
    plain = np.exp(rng.normal(0, noise, INPUTS))
    guessed = np.exp(rng.normal(0, noise, INPUTS)) / gain
    found = Gain("", INPUTS, 100, 60, *ratio_interval(plain, guessed), ratio_above_one(plain, guessed))
    result = SpeculationResult("ngram", 100.0, extra, (found,), differing)
    return SpeculationReport("model", "work", INPUTS, 50.0, (result,), (), level=level)


def tried(gains: dict[str, float], *, budget: int | None = None, **given):
    """The record after guesses were tried, and the levels they were tried on, in order. Quality is Q6_K and speed
    Q4_K_M without guesses."""
    record = run_record()
    assert (record.decision.quality, record.decision.speed) == ("Q6_K", "Q4_K_M")
    if budget is not None:
        record = replace(record, plan=replace(record.plan, budget_bytes=budget))
    order: list[str] = []

    def try_on(level: str) -> SpeculationReport:
        order.append(level)
        return report(level, gains.get(level, 0.9), **given)

    def decide_with(guesses):
        return decide(record.plan, record.fidelities, record.results, reference="F16", guesses=guesses)

    return with_guesses(record, list(SIZES), try_on, decide_with), order


def test_a_quality_tier_that_is_the_fastest_with_its_guesses_serves_alone():
    record, order = tried({"Q6_K": 1.6})
    assert (record.decision.quality, record.decision.speed) == ("Q6_K", "Q6_K")
    assert record.decision.pair is Pairing.ONE_LEVEL
    (guesses,) = record.decision.speculate
    assert guesses.level == "Q6_K" and "Q6_K guesses tokens ahead" in record.decision.summary
    assert order[:2] == ["Q6_K", "Q4_K_M"]


def test_a_larger_level_that_is_the_fastest_with_its_guesses_is_not_called_the_smallest():
    """Q8_0 is as good as Q6_K, larger, and with its guesses faster than all."""
    record, _ = tried({"Q6_K": 1.6, "Q8_0": 3.5}, noise=0.3)
    reason = next(one.reason for one in record.decision.verdicts if one.level == "Q8_0")
    assert record.decision.quality == record.decision.speed == "Q8_0"
    assert reason.startswith("as good as the original") and "no level that meets the bar is measurably faster" in reason


def test_a_level_in_no_tier_becomes_the_fast_one_where_its_guesses_make_it_so():
    record, order = tried({"Q6_K": 1.3, "Q5_K_M": 1.6})
    assert order[:3] == ["Q6_K", "Q4_K_M", "Q5_K_M"]
    assert (record.decision.quality, record.decision.speed) == ("Q6_K", "Q5_K_M")
    status = {one.level: one for one in record.decision.verdicts}
    assert status["Q5_K_M"].status is Status.SPEED and status["Q4_K_M"].status is Status.MEETS
    assert "times (Q5_K_M and Q6_K guessing ahead) Q6_K" in status["Q5_K_M"].reason
    assert (
        "slower (131 against" in status["Q4_K_M"].reason and "guessing ahead where it pays" in status["Q4_K_M"].reason
    )
    assert {one.level for one in record.decision.speculate} == {"Q6_K", "Q5_K_M"}


def test_what_if_decides_with_the_guesses_that_were_tried():
    record, _ = tried({"Q6_K": 1.3, "Q5_K_M": 1.6})
    _, same = what_if(record)
    assert (same.quality, same.speed, same.speculate) == ("Q6_K", "Q5_K_M", record.decision.speculate)
    _, other = what_if(record, bar="kl < 0.02")
    assert (other.quality, other.speed) == ("Q6_K", "Q6_K") and [one.level for one in other.speculate] == ["Q6_K"]


def test_where_nothing_pays_the_choice_is_what_it_was_and_no_other_level_is_tried():
    record, order = tried({})
    before = run_record().decision
    assert replace(record.decision, speculate=()) == before and order == ["Q6_K", "Q4_K_M"]


def test_guesses_that_give_other_answers_make_no_level_the_fast_one():
    record, _ = tried({"Q6_K": 2.0}, differing=("in0",))
    assert record.decision.speed == "Q4_K_M" and not record.decision.speculate


def test_guesses_that_fit_alone_and_not_beside_the_other_tier_change_no_tier():
    """Q6_K needs 228 MiB and Q5_K_M 211; guesses of 40 MiB fit beside each, not beside both."""
    gains = {"Q6_K": 1.3, "Q5_K_M": 1.6}
    assert tried(gains, extra=40 * MiB, budget=600 * MiB)[0].decision.speed == "Q5_K_M"
    tight, _ = tried(gains, extra=40 * MiB, budget=470 * MiB)
    assert tight.decision.speed == "Q4_K_M" and tight.decision.pair is Pairing.TOGETHER


def test_at_most_so_many_other_levels_are_tried_the_fastest_first():
    _, order = tried({"Q6_K": 1.9, "Q4_K_M": 1.9, "Q5_K_M": 1.9, "Q8_0": 1.9}, noise=0.6)
    others = order[2:]
    assert len(others) <= MOST_OTHERS
    assert others == sorted(others, key=lambda level: -SPEEDS[level])


def test_what_cannot_win_is_not_tried():
    reports = [report("fast", 1.2, noise=0.01)]
    gains = {"fast": TierGuesses("fast", "ngram", 1.2, 1.19, 1.21)}
    speeds = {"fast": 100.0, "near": 99.0, "far": 70.0}
    assert next_to_try(speeds, reports, {}, "fast") == "near"
    assert next_to_try(speeds, reports, gains, "fast") is None
    assert next_to_try(speeds | {"near": math.nan}, reports, {}, "fast") is None
    assert next_to_try({}, [], {}, "") is None


def test_guesses_that_gain_nothing_seldom_change_a_tier():
    changed = 0
    for seed in range(60):
        found, _ = tried(dict.fromkeys(SIZES, 1.0), noise=0.2, seed=seed)
        changed += found.decision.speed != "Q4_K_M"
    assert changed <= 3


def test_the_interval_of_a_product_holds_it_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        factors = [ratio_interval(np.exp(rng.normal(np.log(true), 0.1, 10)), np.ones(10)) for true in (1.5, 0.8)]
        _, low, high = product_interval(*factors)
        held += low <= 1.2 <= high
    assert 370 <= held <= 398  # 95%, within four standard errors
    assert product_interval((2.0, 1.0, 4.0)) == pytest.approx((2.0, 1.0, 4.0))
    assert product_interval((2.0, 0.0, math.inf), (3.0, 2.0, 4.0)) == (pytest.approx(6.0), 0.0, math.inf)
