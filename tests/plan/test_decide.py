"""The decision: bars in words, one table of cases, and the reasons."""

import dataclasses
import math
import random
import re

import pytest
from scipy.optimize import minimize_scalar

from bitladder.errors import UsageError
from bitladder.plan.bar import parse_bar
from bitladder.plan.decide import decide
from bitladder.plan.front import Standpoint, pareto
from bitladder.records.decision import Outcome
from bitladder.records.evaluation import WorkloadResult
from bitladder.records.fidelity import Fidelity
from bitladder.stats.noninferiority import inputs_needed, loss_interval
from ladder_examples import KL, SIZES, MiB, fidelities, fidelity, plan, result, results


def statuses(decision):
    return {verdict.level: verdict.status for verdict in decision.verdicts}


def reason(decision, level):
    return next(verdict.reason for verdict in decision.verdicts if verdict.level == level)


# ---- bars


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kl < 0.05", ("kl", "<", 0.05, False, "")),
        ("KL under 5e-2", ("kl", "<", 0.05, False, "")),
        ("kl p99 <= 1", ("kl p99", "<=", 1, False, "")),
        ("ppl ratio < 1.02", ("ppl ratio", "<", 1.02, False, "")),
        ("ppl < +2%", ("ppl ratio", "<", 1.02, False, "")),
        ("top1 > 95%", ("top1", ">", 0.95, False, "")),
        ("top-1 ≥ 0.95", ("top1", ">=", 0.95, False, "")),
        ("passes >= 80%", ("passes", ">=", 0.8, False, "")),
        ("passes >= reference - 4 points", ("passes", ">=", 0.04, True, "")),
        ("passes at least the reference", ("passes", ">=", 0, True, "")),
        ("arithmetic: no loss", ("no loss", "", 0, False, "arithmetic")),
        ("no known loss", ("no known loss", "", 0, False, "")),
        ("recall >= 98%", ("recall", ">=", 0.98, False, "")),
        ("item recall at least 0.9", ("recall", ">=", 0.9, False, "")),
        ("speed >= 20 tok/s", ("speed", ">=", 20, False, "")),
        ("memory < 6GiB", ("memory", "<", 6 * 1024**3, False, "")),
    ],
)
def test_a_bar_is_read(text, expected):
    (clause,) = parse_bar(text).clauses
    metric, op, value, relative, tag = expected
    assert (clause.metric, clause.op, clause.relative, clause.tag) == (metric, op, relative, tag)
    assert clause.value == pytest.approx(value)


def test_clauses_are_joined():
    assert [c.metric for c in parse_bar("kl < 0.05 and no loss, top1 > 90%").clauses] == [
        "kl",
        "no loss",
        "top1",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "The bar is empty"),
        ("good", "cannot be read"),
        ("kl > 0.05", "wrong way"),
        ("top1 < 95%", "wrong way"),
        ("klx < 1", "Did you mean 'kl'"),
        ("kl < soon", "cannot be read"),
        ("passes >= 120%", "more than 100%"),
        ("math: kl < 0.1", "Only clauses on passes"),
    ],
)
def test_a_bad_bar_says_what_is_wrong(text, said):
    with pytest.raises(UsageError, match=said):
        parse_bar(text)


# ---- the choice


CASES = [
    # (bar, fidelities, lost inputs per level, budget MiB, quality, speed, outcome, pair)
    ("kl < 0.1", {}, {}, 2048, "Q6_K", "Q4_K_M", "met", "together"),
    ("kl < 0.05", {}, {}, 2048, "Q6_K", "Q5_K_M", "met", "together"),
    ("kl < 0.02", {}, {}, 2048, "Q6_K", "Q6_K", "met", "one level"),
    ("kl < 0.001", {}, {}, 2048, None, None, "not met", ""),
    ("kl < 0.072", {"Q5_K_M": 0.071}, {}, 2048, "Q6_K", "Q6_K", "met", "one level"),  # two straddle the limit
    ("kl < 0.1", {}, {}, 300, "Q6_K", "Q4_K_M", "met", "swap"),
    ("kl < 0.1", {}, {}, 215, "Q5_K_M", "Q4_K_M", "met", "swap"),  # Q6_K does not fit: the closest that does
    ("kl < 0.1", {}, {}, 100, None, None, "not met", ""),
    ("kl < 0.1 and no known loss", {}, {"Q4_K_M": 8}, 2048, "Q6_K", "Q5_K_M", "met", "together"),
    ("kl < 0.1 and no loss", {}, {"Q4_K_M": 1}, 2048, "Q6_K", "Q5_K_M", "met", "together"),
    ("kl < 0.1", {"Q6_K": 0.03, "Q8_0": 0.025}, {}, 2048, "Q8_0", "Q4_K_M", "met", "together"),
    (
        "kl < 0.1",
        {},
        {"Q6_K": 1},
        2048,
        "Q6_K",
        "Q4_K_M",
        "met",
        "together",
    ),  # an input lost on the workload is no evidence: the smaller of two that are near-lossless
    ("kl < 0.1", {}, {"Q6_K": 1, "Q8_0": 1}, 2048, "Q6_K", "Q4_K_M", "met", "together"),  # nothing to tell them apart
    ("kl < 0.1", {}, {"Q6_K": 9, "Q8_0": 9}, 2048, "Q8_0", "Q4_K_M", "met", "together"),  # a known loss is not near
    ("passes >= reference - 4 points", {}, {}, 2048, None, None, "cannot tell", ""),
    ("passes >= reference - 20 points", {}, {}, 2048, "Q6_K", "Q2_K", "met", "together"),
    ("kl < 2 and speed >= 130", {}, {}, 2048, "Q4_K_M", "Q2_K", "met", "together"),
    ("kl < 0.1 and memory < 200MiB", {}, {}, 2048, "Q4_K_M", "Q4_K_M", "met", "one level"),
]


@pytest.mark.parametrize("case", CASES)
def test_the_choice(case):
    bar, kl, lost, budget, *chosen = case
    decision = decide(plan(budget=budget * MiB), fidelities(**kl), results(**lost), bar=bar, reference="F16")
    assert [decision.quality, decision.speed, decision.outcome, decision.pair] == chosen
    assert len(decision.verdicts) == 7
    assert all(verdict.reason for verdict in decision.verdicts)


@pytest.mark.parametrize(("bar", "status"), [("kl < 0.07", "fails the bar"), ("kl <= 0.07", "both tiers")])
def test_a_level_exactly_at_the_limit(bar, status):
    exact = fidelity("Q4_K_M", 0.07, width=0.0)
    decision = decide(plan(levels=("F16", "Q4_K_M")), [exact], bar=bar, reference="F16")
    assert statuses(decision)["Q4_K_M"] == status


def test_a_near_lossless_speed_tier_serves_both():
    # Q5_K_M is near-lossless here and fastest; Q6_K is so too, but buys nothing.
    decision = decide(plan(), fidelities(Q5_K_M=0.012), results(), bar="kl < 0.05", reference="F16")
    assert (decision.quality, decision.speed) == ("Q5_K_M", "Q5_K_M")
    said = reason(decision, "Q6_K")
    assert "larger than Q5_K_M, which shows no loss either" in said
    assert re.search(r"as good as the original, as far as \d+ inputs and [\d,]+ tokens can tell", decision.summary)


def test_without_speeds_the_smallest_is_the_speed_tier():
    decision = decide(plan(), fidelities(), bar="kl < 0.3", reference="F16")
    assert decision.speed == "Q3_K_M"
    assert "smallest" in reason(decision, "Q3_K_M")


def timed(rates: dict[str, float], noise: float, rounds: int = 5, seed: int = 0) -> list[WorkloadResult]:
    """Results with rates of rounds: each level's own, the round's drift, and noise."""
    rng = random.Random(seed)
    drift = [rng.gauss(0, 0.3) for _ in range(rounds)]
    found = []
    for level in SIZES:
        own = tuple(rates.get(level, 50.0) * math.exp(each + rng.gauss(0, noise)) for each in drift)
        found.append(
            dataclasses.replace(result(level), decode_rounds=own, decode_tokens_per_s=sorted(own)[rounds // 2])
        )
    return found


def test_without_a_surely_faster_level_one_serves_both():
    measured = [dataclasses.replace(result(level), decode_tokens_per_s=100 - n) for n, level in enumerate(KL)]
    decision = decide(plan(), fidelities(), measured, bar="kl < 0.1", reference="F16")
    assert (decision.quality, decision.speed) == ("Q6_K", "Q6_K")
    assert "no level that meets the bar is measurably faster" in reason(decision, "Q6_K")
    assert "not measurably faster" in reason(decision, "Q4_K_M")


def test_what_slows_whole_rounds_hides_no_difference_between_levels():
    rates = {"Q6_K": 50, "Q5_K_M": 60, "Q4_K_M": 62}
    decision = decide(plan(), fidelities(), timed(rates, 0.005), bar="kl < 0.1", reference="F16")
    assert (decision.quality, decision.speed) == ("Q6_K", "Q4_K_M")
    assert "times as fast" in decision.summary


def test_a_difference_of_speed_that_may_be_chance_is_none():
    rates = {"Q6_K": 50, "Q5_K_M": 60, "Q4_K_M": 62}
    decision = decide(plan(), fidelities(), timed(rates, 0.3), bar="kl < 0.1", reference="F16")
    assert (decision.quality, decision.speed) == ("Q6_K", "Q6_K")


def test_a_level_that_left_the_turns_is_compared_over_the_rounds_that_it_saw():
    rates = {"Q6_K": 50, "Q5_K_M": 60, "Q4_K_M": 62}
    whole = timed(rates, 0.005, rounds=10)
    left = [
        dataclasses.replace(one, decode_rounds=one.decode_rounds[:3]) if one.level == "Q5_K_M" else one for one in whole
    ]
    assert (
        min(left[3].decode_rounds) / max(left[3].decode_rounds) < 0.9
    )  # the machine drifts by more than levels differ
    decision = decide(plan(), fidelities(), left, bar="kl < 0.1", reference="F16")
    assert (decision.quality, decision.speed) == ("Q6_K", "Q4_K_M")
    assert decision.certainty[0].share > 0.95


def test_what_was_not_done_of_a_level_is_said_and_speeds_alone_are_no_answers():
    def only_timed(one):
        return dataclasses.replace(one, inputs=0, passes=0, lost=(), gained=(), p_value=math.nan, pass_rate=math.nan)

    known = [only_timed(one) if one.level == "Q5_K_M" else one for one in results() if one.level != "Q3_K_M"]
    short = [dataclasses.replace(one, units=10) if one.level == "Q3_K_M" else one for one in fidelities()]
    decision = decide(plan(), short, known, bar="kl < 0.1", reference="F16")
    assert decision.quality == "Q6_K"
    assert reason(decision, "Q3_K_M").endswith("; KL on 10 of 30 documents, neither asked nor timed")
    assert reason(decision, "Q5_K_M").endswith("; not asked") and "tokens/s" not in reason(decision, "Q2_K")
    assert not reason(decision, "Q6_K").endswith("asked")
    assert decision == decide(plan(), short, known, bar="kl < 0.1", reference="F16")
    untimed = [dataclasses.replace(one, decode_tokens_per_s=math.nan) if one.level == "Q8_0" else one for one in known]
    assert reason(decide(plan(), short, untimed, bar="kl < 0.1", reference="F16"), "Q8_0").endswith("; not timed")
    unmeasured = decide(plan(), fidelities(), bar="kl < 0.1", reference="F16")
    assert not any(one.reason.endswith(("asked", "timed")) for one in unmeasured.verdicts)


def test_levels_whose_kl_cannot_be_told_apart_are_equal_and_the_smaller_wins():
    def with_units(level: str, mean: float, pattern: tuple[float, ...]) -> Fidelity:
        units = tuple(mean * each for each in pattern)
        return dataclasses.replace(fidelity(level, mean), unit_kl=units, unit_tokens=(300,) * len(units))

    up, down = (0.5, 1.5) * 15, (1.5, 0.5) * 15
    bar = "kl < 0.1"
    apart = [with_units("Q8_0", 0.030, up), with_units("Q6_K", 0.040, up)]
    assert decide(plan(), apart, bar=bar, reference="F16").quality == "Q8_0"
    alike = [with_units("Q8_0", 0.030, up), with_units("Q6_K", 0.031, down)]
    assert decide(plan(), alike, bar=bar, reference="F16").quality == "Q6_K"
    short = dataclasses.replace(alike[0], unit_kl=alike[0].unit_kl[:8], unit_tokens=alike[0].unit_tokens[:8])
    assert (
        decide(plan(), [short, alike[1]], bar=bar, reference="F16").quality == "Q6_K"
    )  # on what both were measured on


@pytest.mark.parametrize(
    ("units", "tokens", "rounds"),
    [
        ((0.1, 0.2), (300,), (50.0, math.nan)),
        ((0.1, math.nan), (300, 300), (50.0, math.inf)),
        ((0.1, 0.2), (0, 0), (50.0, -1.0)),
        ((0.1,), (300,), (0.0, 0.0)),
    ],
)
def test_units_and_rounds_that_make_no_sense_are_as_good_as_none(units, tokens, rounds):
    odd = [dataclasses.replace(each, unit_kl=units, unit_tokens=tokens) for each in fidelities()]
    measured = [dataclasses.replace(each, decode_rounds=rounds) for each in results()]
    plain = [dataclasses.replace(each, decode_rounds=()) for each in results()]
    found = decide(plan(), odd, measured, bar="kl < 0.1", reference="F16")
    assert found.quality == decide(plan(), fidelities(), plain, bar="kl < 0.1", reference="F16").quality
    assert len(found.certainty) >= 1


def test_a_decision_says_how_often_its_evidence_would_choose_the_same():
    clear = decide(plan(), fidelities(), timed({"Q6_K": 50, "Q4_K_M": 80}, 0.005), bar="kl < 0.1", reference="F16")
    assert (clear.certainty[0].quality, clear.certainty[0].speed) == (clear.quality, clear.speed)
    assert clear.certainty[0].share > 0.95
    assert "the same in" in clear.summary
    near_the_bar = [fidelity(level, 0.09 if level == "Q4_K_M" else None) for level in KL]
    open_one = decide(plan(), near_the_bar, timed({"Q4_K_M": 80}, 0.005), bar="kl < 0.1", reference="F16")
    assert 0.2 < open_one.certainty[0].share < 0.95
    assert len(open_one.certainty) > 1
    assert open_one == decide(plan(), near_the_bar, timed({"Q4_K_M": 80}, 0.005), bar="kl < 0.1", reference="F16")


def test_a_loss_not_seen_and_one_known_are_told_apart():
    decision = decide(plan(), fidelities(), results(Q2_K=9), bar="kl < 0.1 and no known loss", reference="F16")
    losses = {verdict.level: verdict.loss for verdict in decision.verdicts}
    assert losses["F16"] == "none"
    assert losses["Q6_K"] == "not told from zero"
    assert losses["Q4_K_M"] == "measurable"
    assert losses["Q2_K"] == "known bad"


def test_what_was_not_measured_cannot_be_told():
    decision = decide(plan(), [], bar="kl < 0.1", reference="F16")
    assert decision.outcome == "cannot tell"
    assert set(statuses(decision).values()) == {"reference", "cannot tell"}
    assert all(verdict.loss == "not known" for verdict in decision.verdicts[1:])


def test_without_any_kl_the_default_bar_asks_more_of_the_workload():
    decision = decide(plan(), [], results(Q4_K_M=1, Q3_K_M=2, Q2_K=9), reference="F16")
    assert (decision.bar, decision.quality, decision.speed) == ("no loss", "Q8_0", "Q5_K_M")
    assert decide(plan(), fidelities(), reference="F16").bar == "kl < 0.1 and no known loss"


def test_a_weighted_pass_rate_is_what_the_bar_sees():
    weighted = dataclasses.replace(result("Q4_K_M"), pass_rate=0.95, pass_low=0.91, pass_high=0.99)
    decision = decide(plan(), [], [weighted], bar="passes >= 90%", reference="F16")
    assert "passes 95.0%" in reason(decision, "Q4_K_M")


def test_what_to_measure_next_says_how_much():
    decision = decide(
        plan(), fidelities(Q4_K_M=0.096), results(), bar="kl < 0.1", reference="F16"
    )  # 0.0864 to 0.1056, so the half width must shrink from 0.0096 to 0.004: 5.76 times the documents
    assert statuses(decision)["Q4_K_M"] == "cannot tell"
    assert decision.next == ("Q4_K_M: measure KL on about 143 more documents (30 so far)",)


def test_more_inputs_asked_for_are_enough():
    """As many inputs as the reason asks for do settle it."""
    decision = decide(plan(), [], [result("Q4_K_M")], bar="passes >= reference - 4 points", reference="F16")
    assert "about 68 more inputs (25 so far)" in reason(decision, "Q4_K_M")
    settled = decide(plan(), [], [result("Q4_K_M", inputs=93)], bar="passes >= reference - 4 points", reference="F16")
    assert statuses(settled)["Q4_K_M"] == "both tiers"


def test_equal_needs_are_said_once():
    decision = decide(plan(), [], results(), bar="passes >= reference - 4 points", reference="F16")
    assert decision.next == ("Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M, Q2_K: about 68 more inputs (25 so far)",)


def test_tags_are_judged_on_their_own_inputs():
    tags = {f"in{n}": ("arithmetic",) if n < 8 else ("recall",) for n in range(25)}
    measured = results(Q4_K_M=1, Q2_K=8)
    decision = decide(plan(), fidelities(), measured, bar="arithmetic: no loss", reference="F16", tags=tags)
    assert statuses(decision)["Q4_K_M"] == "fails the bar"
    assert statuses(decision)["Q5_K_M"] != "fails the bar"
    told = {(one.level, one.tag): one for one in decision.tags}
    assert told["Q2_K", "arithmetic"].status == "loss known"
    assert told["Q4_K_M", "arithmetic"].status == "loss seen"
    assert told["Q2_K", "recall"].status == "no loss seen"
    assert (told["Q2_K", "arithmetic"].inputs, told["Q2_K", "recall"].inputs) == (8, 17)


def test_an_unknown_tag_is_a_question_not_a_pass():
    decision = decide(plan(), fidelities(), results(), bar="poetry: no loss", reference="F16")
    assert "no input carries the tag 'poetry'" in reason(decision, "Q4_K_M")
    assert decision.outcome == "cannot tell"


def test_the_reference_is_never_chosen():
    everything = [*fidelities(), fidelity("Q8_0", 0.0)]
    decision = decide(plan(levels=("F16",)), everything, results(), bar="kl < 0.1", reference="F16")
    assert (decision.quality, decision.speed) == (None, None)
    assert decision.summary == "No level besides the reference was asked for."
    poor = decide(plan(budget=1 << 20), everything, results(), bar="kl < 0.1", reference="F16")
    assert "asked for" not in poor.summary


def test_the_same_evidence_gives_the_same_decision_in_any_order():
    shuffled_fidelities, shuffled_results = fidelities(), results(Q3_K_M=3)
    first = decide(plan(), shuffled_fidelities, shuffled_results, reference="F16")
    rng = random.Random(5)
    for _ in range(5):
        rng.shuffle(shuffled_fidelities)
        rng.shuffle(shuffled_results)
        assert decide(plan(), shuffled_fidelities, shuffled_results, reference="F16") == first


def test_many_levels_do_not_turn_chance_into_a_known_loss():
    measured = [dataclasses.replace(result(level, lost=6), p_value=0.03) for level in KL]
    decision = decide(plan(), fidelities(), measured, bar="no known loss", reference="F16")
    assert "fails the bar" not in statuses(decision).values()  # 0.03 * 6 levels
    alone = decide(plan(), fidelities(), measured[:1], bar="no known loss", reference="F16")
    assert statuses(alone)["Q8_0"] == "fails the bar"


# ---- the numbers beneath


def slow_score(lost, gained, inputs, delta):
    """The statistic from its definition: the restricted likelihood maximized numerically."""

    def loss_of(q):
        lost_share, kept = q + delta, 1 - 2 * q - delta
        parts = ((lost, lost_share), (gained, q), (inputs - lost - gained, kept))
        return -sum(count * math.log(max(share, 1e-300)) for count, share in parts if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = minimize_scalar(loss_of, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (lost - gained - inputs * delta) / math.sqrt(inputs * (2 * q + delta - delta**2))


@pytest.mark.parametrize(("lost", "gained", "inputs"), [(12, 2, 44), (3, 1, 25), (1, 1, 25), (5, 0, 30), (40, 31, 200)])
def test_loss_interval_against_the_definition(lost, gained, inputs):
    low, high = loss_interval(lost, gained, inputs)
    assert slow_score(lost, gained, inputs, low) == pytest.approx(1.959964, abs=2e-3)
    assert slow_score(lost, gained, inputs, high) == pytest.approx(-1.959964, abs=2e-3)


def test_loss_interval_without_changes_is_not_a_point():
    z2 = 1.959964**2
    assert loss_interval(0, 0, 25) == pytest.approx((-z2 / (25 + z2), z2 / (25 + z2)), abs=1e-6)


def test_loss_interval_of_nothing_is_undefined():
    assert all(map(math.isnan, loss_interval(0, 0, 0)))
    with pytest.raises(ValueError, match="must be counts among 3 inputs"):
        loss_interval(2, 2, 3)


def test_loss_interval_covers():
    """Of 400 simulated workloads of 40 inputs, 95% intervals hold the true loss in 92 to 98 of a hundred."""
    rng = random.Random(11)
    p_lost, p_gained, inputs, hits = 0.15, 0.05, 40, 0
    for _ in range(400):
        draws = [rng.random() for _ in range(inputs)]
        lost = sum(draw < p_lost for draw in draws)
        gained = sum(p_lost <= draw < p_lost + p_gained for draw in draws)
        low, high = loss_interval(lost, gained, inputs)
        hits += low <= p_lost - p_gained <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_inputs_needed():
    assert inputs_needed(0.04, 0.05, 0.05) is None
    needed = inputs_needed(0.1, 0.0, 0.1)
    lost = gained = round(needed * 0.05)
    assert loss_interval(lost, gained, needed)[1] == pytest.approx(0.1, abs=0.01)


def test_pareto_front():
    points = [
        ("big", 10, 1, 0.1),
        ("same", 10, 1, 0.2),
        ("slow", 5, 2, 0.5),
        ("fast", 6, 9, 0.5),
        ("lost", 5, 2, math.inf),
    ]
    points = [Standpoint(*point) for point in points]
    assert pareto(points) == ("big", "slow", "fast")
    assert pareto([Standpoint("a", 5, math.nan, 0.5), Standpoint("b", 4, 3, 0.5)]) == ("b",)


def test_an_interval_that_cannot_be_estimated_asks_for_more_text():
    """A single document gives a mean and no interval: undefined, so nothing is decided on it."""
    one = dataclasses.replace(fidelity("Q4_K_M", 0.07), units=1, kl_low=math.nan, kl_high=math.nan)
    decision = decide(plan(levels=("Q4_K_M",)), [one], bar="kl < 0.1")
    assert [verdict.status for verdict in decision.verdicts] == ["cannot tell"]
    assert any("more text" in step for step in decision.next)


def test_several_levels_give_chance_several_tries():
    """Just under the limit alone is met; among levels that are not, the same evidence is open."""

    def status(*others):
        near = fidelity("Q4_K_M", 0.1 / 1.5, width=0.48)  # its interval ends at 0.0987
        return decide(plan(), [near, *others], bar="kl < 0.1", reference="F16")

    assert statuses(status())["Q4_K_M"] == "both tiers"
    crowd = status(fidelity("Q3_K_M", 0.5), fidelity("Q2_K", 0.9))
    assert statuses(crowd)["Q4_K_M"] == "cannot tell"
    assert "among 3 levels" in reason(crowd, "Q4_K_M")
    assert any("name fewer levels" in step for step in crowd.next)
    # Holm: levels that are clearly under the limit cost the others nothing.
    clear = status(fidelity("Q8_0", 0.001), fidelity("Q6_K", 0.002))
    assert statuses(clear)["Q4_K_M"] == "speed tier"


def test_models_elsewhere_are_judged_and_not_chosen():
    here = result("Q4_K_M", inputs=120)
    results = [here, dataclasses.replace(here, level="m@host")]
    decision = decide(plan(), [], results, bar="passes >= reference - 4 points", reference="F16", elsewhere=["m@host"])
    assert statuses(decision)["m@host"] == "meets the bar"
    assert "runs elsewhere" in reason(decision, "m@host")
    assert decision.quality == decision.speed == "Q4_K_M"
    assert "m@host" not in decision.front
    small = decide(plan(), [], results, bar="memory < 6GiB", reference="F16", elsewhere=["m@host"])
    assert statuses(small)["m@host"] == "cannot tell"  # nothing is known of it, which is not nothing
    kl = decide(plan(), [], results, bar="kl < 1", reference="F16", elsewhere=["m@host"])
    assert "through an address" in reason(kl, "m@host")


@pytest.mark.parametrize(
    ("lost", "bar"),
    [
        ({}, None),  # all meet the bar: one level serves both
        ({"Q2_K": 9, "Q3_K_M": 9}, None),
        (dict.fromkeys(KL, 9), None),  # none does
        ({}, "no known loss and speed >= 1"),
        ({"Q2_K": 9}, "kl < 0.1"),  # what cannot be told without KL
    ],
)
def test_what_was_not_measured_is_not_spoken_of(lost, bar):
    """Without any KL nothing is closer to the reference than anything else, further from it, or infinitely far."""
    decision = decide(plan(), [], results(**lost), bar=bar, reference="F16")
    words = " ".join([decision.summary, *(verdict.reason for verdict in decision.verdicts)])
    assert not re.search(r"\binf\b|\bnan\b|closer|closest|further|as good as the original", words), words
    if decision.outcome == Outcome.MET:
        assert "KL was not measured" in decision.summary


def test_a_level_without_kl_beside_levels_with_it():
    """Only what was measured is compared."""
    decision = decide(
        plan(), [one for one in fidelities() if one.level != "Q5_K_M"], results(), bar="no known loss", reference="F16"
    )
    assert "its KL was not measured" in reason(decision, "Q5_K_M")
    assert "reference" not in reason(decision, "Q5_K_M")


def caught(level, kept, low, high):
    return dataclasses.replace(result(level), items=99, items_kept=kept, recall_low=low, recall_high=high)


@pytest.mark.parametrize(
    ("bar", "one", "status", "said"),
    [
        (
            "recall >= 90%",
            caught("Q6_K", 98, 0.945, 0.998),
            "both tiers",
            "item recall 99.0% (94.5% to 99.8%), 98 of 99",
        ),
        ("recall >= 90%", caught("Q6_K", 80, 0.72, 0.87), "fails the bar", "80 of 99 items"),
        ("recall >= 97%", caught("Q6_K", 98, 0.945, 0.998), "cannot tell", "add inputs with items"),
        ("recall >= 90%", result("Q6_K"), "cannot tell", "no item of a 'set_recall' criterion"),
        ("recall >= 90%", None, "cannot tell", "no workload was run"),
    ],
)
def test_a_bar_on_items_is_judged_by_their_interval(bar, one, status, said):
    found = decide(plan(levels=("F16", "Q6_K")), fidelities(), [one] if one else [], bar=bar, reference="F16")
    assert statuses(found)["Q6_K"] == status
    assert said in reason(found, "Q6_K") + found.summary


def test_how_sure_a_decision_on_items_is_depends_on_their_interval():
    def share(low, high):
        results = [caught("Q8_0", 99, 0.99, 1.0), caught("Q6_K", 95, low, high)]
        found = decide(
            plan(levels=("F16", "Q8_0", "Q6_K")), fidelities(), results, bar="recall >= 90%", reference="F16"
        )
        return found.certainty[0].share

    assert share(0.955, 0.962) > 0.95
    assert share(0.905, 0.99) < 0.9
