"""Sequential evidence: the error rate holds however often one looks, and easy cases stop early."""

import math

import numpy as np
import pytest
from scipy import stats

from bitladder.describe.workload import Input
from bitladder.plan.halving import measure_ladder
from bitladder.stats.sequential import (
    STAKES,
    Standing,
    confidence_sequence,
    log_wealth_above,
    spent,
    standing,
)


def test_wealth_is_the_bets_played_one_by_one():
    values, mean = [1.0, 0.0, 1.0, 0.5, 1.0], 0.4
    purses = np.full(len(STAKES), 1 / len(STAKES))
    for value, log_wealth in zip(values, log_wealth_above(values, mean), strict=True):
        purses *= 1 + STAKES / mean * (value - mean)
        assert log_wealth == pytest.approx(math.log(purses.sum()))


def test_no_bet_is_favourable_when_the_claim_holds():
    """The expected wealth after n values with mean exactly at the claim is 1: here over all 2^8 outcomes of a
    coin.
    """
    outcomes = (np.arange(256)[:, None] >> np.arange(8)) & 1
    wealth = [np.exp(log_wealth_above(outcome.astype(float), 0.5)[-1]) for outcome in outcomes]
    assert np.mean(wealth) == pytest.approx(1.0)


@pytest.mark.parametrize("shares", [[0.09, 0.86, 0.05], [0.04, 0.96, 0.0]])
def test_false_calls_stay_rare_at_the_bar_itself(shares):
    """A true loss of exactly the margin, looked at after every one of 800 inputs: either call is wrong at
    most 5% of the time.
    """
    rng = np.random.default_rng(7)
    calls = [standing(rng.choice([-1.0, 0.0, 1.0], p=shares, size=800), 0.04, 0.05) for _ in range(300)]
    assert calls.count(Standing.MEETS) / 300 <= 0.05 + 0.025
    assert calls.count(Standing.FAILS) / 300 <= 0.05 + 0.025


def test_clear_cases_are_called_and_early():
    assert standing([0.0] * 200, 0.04) is Standing.MEETS
    assert standing([-1.0, 0.0] * 10, 0.04) is Standing.FAILS
    assert standing([0.0] * 10, 0.04) is Standing.OPEN
    assert standing([], 0.04) is Standing.OPEN


def test_a_call_does_not_depend_on_what_comes_after():
    early = [0.0] * 200
    assert standing(early, 0.04) is Standing.MEETS
    assert standing(early + [-1.0] * 100, 0.04) is Standing.MEETS


def test_set_aside_before_known_bad():
    losing = [-1.0, 0.0, 0.0, 0.0] * 8
    assert standing(losing, 0.04) is Standing.OPEN
    assert standing(losing, 0.04, beta=0.2) is Standing.UNLIKELY
    assert standing(losing * 8, 0.04, beta=0.2) is Standing.FAILS


def test_values_outside_their_bounds_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        log_wealth_above([0.5, 1.5], 0.5)


def test_confidence_sequence_covers_at_every_look():
    rng = np.random.default_rng(11)
    missed = 0
    for _ in range(60):
        values = rng.beta(2, 5, size=300)
        missed += any(
            not low <= 2 / 7 <= high for low, high in (confidence_sequence(values[:n], 0.1) for n in (10, 50, 150, 300))
        )
    assert missed / 60 <= 0.1 + 0.08


def test_confidence_sequence_directions():
    values = np.random.default_rng(1).uniform(size=400)
    wide, narrow = confidence_sequence(values[:50]), confidence_sequence(values)
    assert narrow.high - narrow.low < wide.high - wide.low
    shifted = confidence_sequence(values * 2 - 1, low=-1, high=1)
    assert shifted == pytest.approx((2 * narrow.low - 1, 2 * narrow.high - 1))
    assert all(map(math.isnan, confidence_sequence([])))


INPUTS = [Input(f"i{n}", ({"role": "user", "content": "?"},), ()) for n in range(400)]


def ladder(losses, seed=0):
    rng = np.random.default_rng(seed)
    truth = {level: rng.choice([-1.0, 0.0], p=[loss, 1 - loss], size=400) for level, loss in losses.items()}
    return lambda level, inputs: [float(truth[level][int(one.id[1:])]) for one in inputs]


def test_the_ladder_is_halved_and_stops_where_the_decision_is_clear():
    losses = {"Q8_0": 0.0, "Q6_K": 0.0, "Q4_K_M": 0.0, "Q3_K_M": 0.3, "Q2_K": 0.6}
    outcome = measure_ladder(list(losses), INPUTS, ladder(losses), margin=0.04)
    assert outcome.chosen == "Q4_K_M"
    assert outcome.decided
    assert outcome.standings == (Standing.OPEN, Standing.OPEN, Standing.MEETS, Standing.UNLIKELY, Standing.OPEN)
    assert [used > 0 for used in outcome.inputs_used] == [False, False, True, True, False]
    assert outcome.inputs_used[3] < outcome.inputs_used[2] < 400 / 2


@pytest.mark.parametrize(("boundary", "chosen"), [(0, None), (1, "L0"), (4, "L3"), (7, "L6")])
def test_every_place_of_the_boundary_is_found(boundary, chosen):
    losses = {f"L{n}": 0.0 if n < boundary else 0.5 for n in range(7)}
    outcome = measure_ladder(list(losses), INPUTS, ladder(losses), margin=0.04)
    assert (outcome.chosen, outcome.decided) == (chosen, True)
    assert sum(used > 0 for used in outcome.inputs_used) <= 3


def test_wrong_calls_stay_rare_on_a_whole_ladder():
    """Seven levels that all lose exactly the margin plus a hair: any of them called good is an error."""
    rng, wrong = np.random.default_rng(3), 0
    for seed in range(100):
        table = rng.choice([-1.0, 1.0, 0.0], p=[0.09, 0.045, 0.865], size=(7, 400))
        outcome = measure_ladder(
            [str(n) for n in range(7)],
            INPUTS,
            lambda level, wanted, table=table: [float(table[int(level), int(one.id[1:])]) for one in wanted],
            margin=0.045 - 1e-9,
            seed=seed,
        )
        wrong += outcome.chosen is not None
    assert wrong / 100 <= 0.05 + 0.04


def test_the_ladder_says_when_inputs_ran_out():
    losses = {"Q8_0": 0.0, "Q4_K_M": 0.0}
    outcome = measure_ladder(list(losses), INPUTS[:20], ladder(losses), margin=0.04)
    assert (outcome.chosen, outcome.decided, outcome.inputs_used) == (None, False, (20, 0))


def test_the_same_seed_asks_in_the_same_order():
    asked = []
    for _ in range(2):
        order = []
        measure_ladder(
            ["a"],
            INPUTS[:24],
            lambda _, inputs, order=order: [order.append(one.id) or 0.0 for one in inputs],
            margin=0.04,
        )
        asked.append(order)
    assert asked[0] == asked[1] != sorted(asked[0])


def test_a_margin_of_nothing_is_refused():
    with pytest.raises(ValueError, match="margin"):
        measure_ladder(["a"], INPUTS, ladder({"a": 0.0}), margin=0.0)


def test_looks_together_spend_the_error_rate_and_the_last_most_of_it():
    shares = (0.25, 0.5, 1.0)
    rates = np.diff([0.0, *(spent(share) for share in shares)])
    assert rates.sum() == pytest.approx(0.05) and rates[-1] > 0.7 * 0.05
    with pytest.raises(ValueError, match="share"):
        spent(1.1)


def test_intervals_looked_at_until_one_likes_them_hold_as_often_as_they_say():
    """Documents with lognormal KL, looked at after 3, 6 and 12 of them; the worst look counts."""
    rng, shares = np.random.default_rng(5), np.array([3, 6, 12]) / 12
    spending = np.diff([0.0, *map(spent, shares)])
    misses = {True: 0, False: 0}
    for _ in range(600):
        logs = rng.normal(0.0, 0.5, 12)
        for spends, rates in ((True, spending), (False, [0.05] * 3)):
            halves = [
                stats.t.ppf(1 - rate / 2, count - 1) * logs[:count].std(ddof=1) / math.sqrt(count)
                for count, rate in zip((3, 6, 12), rates, strict=True)
            ]
            off = [abs(logs[:count].mean()) for count in (3, 6, 12)]
            misses[spends] += any(one > half for one, half in zip(off, halves, strict=True))
    assert misses[True] / 600 < 0.06 < misses[False] / 600
