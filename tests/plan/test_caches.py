"""Levels and caches on one ladder: bytes, the choice over both, and caches that forget."""

import dataclasses

import numpy as np
import pytest

from bitladder.describe.cache_types import F16_CACHE, parse_cache
from bitladder.describe.depths import DepthWindows
from bitladder.describe.windows import Window
from bitladder.plan.decide import decide
from bitladder.plan.ladder import over_caches
from bitladder.plan.whatif import what_if
from bitladder.records import to_json
from bitladder.records.fidelity import Fidelity, Way
from bitladder.records.plan import ContextBytes
from bitladder.records.reading import from_json
from bitladder.stages.fidelity import fidelity_by_depth
from bitladder.walk.head import TokenScores
from ladder_examples import MiB, fidelities, plan, run_record

DEPTHS = (512, 4096)
DOCUMENTS, EACH = 12, 128


def measured(level: str, *kl_by_depth: float, seed: int = 1) -> Fidelity:
    """A level whose mean KL at each depth is about this, with documents that differ and tokens that differ more."""
    rng = np.random.default_rng(seed)
    hard = rng.lognormal(0, 0.3, DOCUMENTS).repeat(EACH)  # a document that is hard is so at every depth
    windows, kl = [], []
    for depth, mean in zip(DEPTHS, kl_by_depth, strict=True):
        own = tuple(Window(f"text {at}", np.zeros(depth, np.int64), begin=depth - 1 - EACH) for at in range(DOCUMENTS))
        windows.append(DepthWindows(depth, own))
        kl.append(mean * hard * rng.lognormal(-0.5, 1, DOCUMENTS * EACH))
    zeros = np.zeros(2 * DOCUMENTS * EACH)
    scores = TokenScores(np.concatenate(kl), zeros + 3, zeros.astype(np.int64))
    return fidelity_by_depth(level, scores, dataclasses.replace(scores, kl=zeros), windows)


def cached_plan(*caches: str, levels=("Q8_0", "Q6_K", "Q4_K_M"), budget=2048 * MiB):
    """With 50 MiB of 16-bit cache, and the rest in proportion."""
    share = {"f16": 1, "q8_0": 34 / 64, "q4_0": 18 / 64}
    plans = {}
    for name in caches:
        base = plan(levels=levels, budget=budget)
        rows = [
            dataclasses.replace(
                row, kv_bytes=int(row.kv_bytes * share[name]),
                total_bytes=row.total_bytes - row.kv_bytes + int(row.kv_bytes * share[name]),
                fits=row.total_bytes - row.kv_bytes + int(row.kv_bytes * share[name]) <= budget,
            )
            for row in base.levels
        ]  # fmt: skip
        plans[parse_cache(name)] = dataclasses.replace(base, levels=tuple(rows))
    return over_caches(plans)


def reason(decision, level):
    return next(verdict.reason for verdict in decision.verdicts if verdict.level == level)


def test_every_level_stands_with_every_cache_and_without_caches_nothing_changes():
    assert [row.level for row in cached_plan("f16", "q8_0", levels=("Q8_0", "Q4_K_M")).levels] == [
        "Q8_0", "Q8_0+q8_0", "Q4_K_M", "Q4_K_M+q8_0",
    ]  # fmt: skip
    assert over_caches({F16_CACHE: plan()}) == plan()


def test_a_cache_that_forgets_is_found_named_and_costs_the_tier():
    losses = [
        measured("Q8_0", 0.004, 0.004), measured("Q8_0+q8_0", 0.005, 0.005),
        measured("Q8_0+q4_0", 0.005, 0.4, seed=2),  # fine at 512 tokens, lost at 4,096
    ]  # fmt: skip
    decision = decide(cached_plan("f16", "q8_0", "q4_0", levels=("Q8_0",)), losses, bar="kl < 0.1")
    assert decision.quality == "Q8_0+q8_0"
    said = reason(decision, "Q8_0+q4_0")
    assert "at 4,096 tokens of context" in said and "times" in said and "as much as at 512" in said
    assert next(one.status for one in decision.verdicts if one.level == "Q8_0+q4_0") == "fails the bar"


def test_a_mean_over_all_depths_does_not_hide_the_deepest():
    """0.005 and 0.12 are 0.06 on average, under the limit; the deep context is over it."""
    forgets = measured("Q8_0+q4_0", 0.005, 0.16)
    assert forgets.kl_mean < 0.1 < forgets.depths[1].kl_mean
    decision = decide(cached_plan("q4_0", levels=("Q8_0",)), [forgets], bar="kl < 0.1")
    assert decision.quality is None


@pytest.mark.parametrize("seed", range(8))
def test_losses_that_do_not_rise_are_not_called_rising(seed):
    level = measured("Q8_0+q8_0", 0.005, 0.005, seed=seed)
    assert not level.depths[1].rises
    assert measured("Q8_0+q4_0", 0.005, 0.01, seed=seed).depths[1].rises  # documents are paired


def test_a_smaller_level_with_a_whole_cache_is_taken_before_a_larger_one_with_a_poor_one():
    losses = [
        measured("Q8_0", 0.002, 0.002), measured("Q8_0+q4_0", 0.03, 0.09),
        measured("Q6_K", 0.008, 0.008), measured("Q6_K+q4_0", 0.035, 0.1),
        measured("Q4_K_M", 0.07, 0.07), measured("Q4_K_M+q4_0", 0.1, 0.2),
    ]  # fmt: skip
    # There is room for Q8_0 with the small cache only, and for Q6_K with either.
    decision = decide(cached_plan("f16", "q4_0", budget=240 * MiB), losses, bar="kl < 0.12")
    assert (decision.quality, decision.speed) == ("Q6_K", "Q4_K_M")
    assert "Q6_K" in decision.front


def test_the_front_is_over_bytes_at_the_context():
    losses = [measured("Q8_0", 0.002, 0.002), measured("Q8_0+q8_0", 0.003, 0.003), measured("Q6_K", 0.004, 0.004)]
    front = decide(cached_plan("f16", "q8_0", levels=("Q8_0", "Q6_K")), losses, bar="kl < 0.1").front
    assert "Q8_0+q8_0" in front  # of the same file as Q8_0, and smaller in memory


def test_figures_by_depth_are_read_back_and_left_out_where_there_are_none():
    level = measured("Q8_0+q8_0", 0.005, 0.05)
    assert from_json(Fidelity, to_json(level)) == level
    assert level.way is Way.DEPLOYED
    assert all("depths" not in to_json(one) for one in fidelities())


def test_another_context_keeps_a_caches_share():
    record = run_record()
    levels = cached_plan("f16", "q8_0", levels=("Q8_0", "Q4_K_M"))
    contexts = (ContextBytes(2048, 50 * MiB, 20 * MiB), ContextBytes(4096, 100 * MiB, 20 * MiB))
    record = dataclasses.replace(record, plan=dataclasses.replace(levels, contexts=contexts))
    moved, _ = what_if(record, n_ctx=4096)
    by_name = {row.level: row.kv_bytes for row in moved.levels}
    assert by_name["Q8_0"] == 100 * MiB
    assert by_name["Q8_0+q8_0"] == pytest.approx(100 * MiB * 34 / 64, rel=1e-6)
