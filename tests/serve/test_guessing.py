"""Guesses that are tried while serving: turned off where they cost, kept where they pay, seldom wrong."""

import asyncio
import math

import httpx
import numpy as np
import pytest

from bitladder.engines.speculation import Speculation
from bitladder.serve.app import build_app
from bitladder.serve.deploy import deployed
from bitladder.serve.guessing import BLOCK, REST, SLOWEST_LOAD_S, GuessTrial, GuessVerdict
from bitladder.serve.limits import Gate
from bitladder.serve.metrics import Metrics
from bitladder.serve.replicas import Replica, ReplicaSet
from bitladder.serve.settings import ServeSettings, TierSpec
from bitladder.serve.tiers import Tier
from tiny_engine import write_tiny_with_head
from upstreams import CHAT


def served(
    trial: GuessTrial,
    gain: float,
    answers: int,
    rng: np.random.Generator,
    *,
    noise=0.3,
    blocks=0.05,
    drift=0.0,
    tags=(),
) -> int:
    """Answers until the trial ends, or so many: with guesses ``gain`` times as fast, answers and blocks that differ,
    and a machine that becomes slower by ``drift`` from block to block. The engine changes as soon as it is wanted."""
    slower, of_block = 0.0, rng.normal(0, blocks)
    for number in range(answers):
        if trial.running is not trial.wanted:
            trial.runs(guessing=trial.wanted, load_seconds=0.2)
        if number % BLOCK == 0:
            slower, of_block = slower + drift, rng.normal(0, blocks)
        speed = 30 * (gain if trial.running else 1) * math.exp(rng.normal(0, noise) - of_block - slower)
        trial.saw(100, speed, tags)
        if not trial.in_trial:
            return number + 1
    return answers


@pytest.mark.parametrize(("gain", "verdict"), [(0.6, GuessVerdict.COSTS), (1.6, GuessVerdict.PAYS)])
def test_guesses_go_where_they_cost_and_stay_where_they_pay(gain, verdict):
    found, needed = [], []
    for seed in range(50):
        trial = GuessTrial()
        needed.append(served(trial, gain, 12 * 2 * BLOCK, np.random.default_rng(seed)))
        found.append(trial.verdict)
        assert trial.wanted is (gain > 1)
    assert found.count(verdict) >= 48
    assert np.median(needed) <= 6 * 2 * BLOCK
    assert f"{verdict}: " in trial.because and "times as fast" in trial.because


@pytest.mark.parametrize("drift", [0.0, 0.02])
def test_guesses_that_gain_and_cost_nothing_are_seldom_called_either(drift):
    """5 of 100 at most, all looks together, on a machine that becomes slower and slower, too."""
    wrong = 0
    for seed in range(300):
        trial = GuessTrial()
        served(trial, 1.0, 12 * 2 * BLOCK, np.random.default_rng(seed), blocks=0.1, drift=drift)
        assert trial.verdict is not GuessVerdict.NONE
        wrong += trial.verdict is not GuessVerdict.UNDECIDED
    assert wrong <= 24  # 15 on average at most; three standard errors more


def test_a_new_trial_begins_after_a_thousand_answers_and_finds_that_work_has_changed():
    trial, rng = GuessTrial(), np.random.default_rng(0)
    served(trial, 0.5, 10_000, rng)
    assert trial.verdict is GuessVerdict.COSTS and not trial.wanted
    trial.runs(guessing=False, load_seconds=0.2)
    for _ in range(REST):
        assert not trial.in_trial
        trial.saw(100, 30.0)
    assert trial.in_trial and trial.wanted and "being tried anew" in trial.because
    served(trial, 2.0, 10_000, rng)
    assert trial.verdict is GuessVerdict.PAYS and trial.wanted


def test_what_says_nothing_about_speed_is_not_counted():
    trial = GuessTrial()
    for tokens, speed in ((7, 30.0), (100, None), (100, 0.0), (100, math.inf), (100, math.nan)):
        trial.saw(tokens, speed, ["x"])
    assert not trial.all.with_guesses and not trial.by_tag
    trial.wanted = False  # the engine still guesses: no answer of the block that is wanted
    trial.saw(100, 30.0)
    assert len(trial.all.with_guesses) == 1 and not trial._block


def test_an_engine_that_loads_slowly_is_never_started_anew_for_a_trial():
    trial = GuessTrial()
    trial.runs(guessing=True, load_seconds=SLOWEST_LOAD_S + 1)
    for _ in range(200):
        trial.saw(100, 30.0)
    assert trial.wanted and not trial.in_trial and "never tried" in trial.because


def test_speeds_are_told_by_tag_and_tags_are_bounded():
    trial, rng = GuessTrial(), np.random.default_rng(3)
    served(trial, 0.5, 10_000, rng, tags=("code",))
    assert trial.by_tag["code"].times_as_fast == pytest.approx(0.5, rel=0.2)
    for number in range(500):
        trial.saw(100, 30.0, [f"t{number}"])
    assert len(trial.by_tag) == 64


@pytest.mark.model
def test_the_real_engines_guesses_turn_off_by_themselves_while_requests_are_answered(tmp_path, monkeypatch):
    """Heads of random weights guess wrongly every time, and cost four times the time."""
    monkeypatch.setattr("bitladder.serve.guessing.SLOWEST_LOAD_S", 120.0)  # however busy the machine is
    model = write_tiny_with_head(tmp_path / "heads.gguf")
    spec = TierSpec(level="heads", path=model, n_ctx=512, speculate=Speculation("mtp"))

    async def run() -> tuple[dict, str, int]:
        async with deployed(ServeSettings(quality=spec, port=0, threads=1)) as deployment:
            (tier,) = deployment.tiers
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
                asked = 0
                while tier.guessing.verdict is GuessVerdict.NONE and asked < 600:
                    body = {"model": "quality", "max_tokens": 24, "messages": [{"role": "user", "content": "abcabc"}]}
                    reply = await client.post(CHAT, json=body, headers={"x-bitladder-tag": "letters"})
                    assert reply.status_code == 200, reply.text
                    asked += 1
                    while tier.guessing.running is not tier.guessing.wanted:  # idle: now it may change
                        await asyncio.sleep(0.05)
                live = deployment.metrics.live(deployment.tiers)["tiers"][0]
                return live, deployment.metrics.text(deployment.tiers).decode(), tier.engine.restarts

    live, text, restarts = asyncio.run(run())
    told = live["guesses"]
    assert (told["from"], told["on"], restarts) == ("mtp", False, 0), told
    assert told["because"].startswith(("costs: ", "not told apart: ")) and told["times_as_fast"] < 0.8
    assert told["by_tag"]["letters"]["answers_without"] >= 3 * BLOCK
    assert 'bitladder_guessing{tier="quality"} 0.0' in text and "bitladder_guess_speedup" in text


class Changing:
    """An engine that is being started in another way, and is ready when somebody waited for it."""

    state = "changing"
    waited = 0.0

    async def wait_ready(self, seconds: float) -> None:
        self.waited, self.state = seconds, "ready"


def test_a_request_waits_for_an_engine_that_is_started_in_another_way_and_goes_nowhere_else():
    async def run() -> None:
        engine, spec = Changing(), TierSpec(level="plain", url="http://127.0.0.1:9")
        tier = Tier(("quality",), spec, ReplicaSet([Replica("plain", None, "")]), Gate(1, 4), engine)
        assert tier.usable  # else another tier would be asked
        async with tier.hold():
            assert engine.waited > 0 and tier.gate.running == 1

    asyncio.run(run())


def test_tiers_that_do_not_guess_have_no_word_of_it():
    async def run() -> tuple[dict, str]:
        spec = TierSpec(level="plain", url="http://127.0.0.1:9")
        async with deployed(ServeSettings(quality=spec, port=0)) as deployment:
            metrics: Metrics = deployment.metrics
            return metrics.live(deployment.tiers)["tiers"][0], metrics.text(deployment.tiers).decode()

    live, text = asyncio.run(run())
    assert "guesses" not in live and "bitladder_guessing{" not in text
