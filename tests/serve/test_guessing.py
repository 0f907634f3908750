"""Guesses that are tried while serving: turned off where they cost, kept where they pay, seldom wrong."""

import asyncio
import math

import httpx
import numpy as np
import pytest

from bitladder.engines.speculation import Speculation
from bitladder.errors import EngineError
from bitladder.serve.app import build_app
from bitladder.serve.aside import Aside
from bitladder.serve.deploy import deployed, has_room_again
from bitladder.serve.guessing import BLOCK, REST, SLOWEST_LOAD_S, GuessTrial, GuessVerdict, Told
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


def mixed(trial: GuessTrial, gains: dict[str, float], trials: int, rng: np.random.Generator, noise=0.3) -> None:
    """So many trials of answers of several tags in turns, each with what guesses gain for it."""
    ended = 0
    while ended < trials:
        was_on = trial.in_trial
        if trial.running is not trial.wanted:
            trial.runs(guessing=trial.wanted, load_seconds=0.2)
        tag = str(rng.choice(list(gains)))
        way = trial.running ^ trial.goes_aside([tag])
        speed = 30 * (gains[tag] if way else 1) * math.exp(rng.normal(0, noise))
        trial.saw(100, speed, [tag], guessing=way, told=Told(10, 6 if way else 0))
        ended += was_on and not trial.in_trial


@pytest.mark.parametrize(
    ("gains", "usual", "apart"),
    [
        ({"code": 2.2, "copy": 2.0, "chat": 0.5}, True, {"chat"}),
        ({"code": 2.0, "chat": 0.5, "prose": 0.6, "mail": 0.5}, False, {"code"}),
    ],
)
def test_work_that_is_faster_the_other_way_is_told_apart(gains, usual, apart):
    found = []
    for seed in range(24):
        trial = GuessTrial()
        mixed(trial, gains, 2, np.random.default_rng(seed))
        assert trial.usual is usual
        found.append(set(trial.apart))
    assert sum(one == apart for one in found) >= 20
    assert all(one <= apart for one in found)


@pytest.mark.parametrize("gain", [1.0, 1.5])
def test_tags_that_are_all_alike_are_seldom_told_apart(gain):
    """5 of 100 at most, over all tags and trials."""
    wrong = 0
    for seed in range(24):
        trial = GuessTrial()
        mixed(trial, dict.fromkeys(("a", "b", "c"), gain), 3, np.random.default_rng(seed))
        wrong += bool(trial.apart)
    assert wrong <= 4  # 1.2 on average at most; three standard errors more


def test_what_goes_aside_and_when():
    trial = GuessTrial()
    mixed(trial, {"code": 3.0, "copy": 3.0, "chat": 0.3}, 1, np.random.default_rng(1), noise=0.05)
    assert trial.apart == {"chat"} and trial.goes_aside(["chat"])
    assert not trial.goes_aside([]) and not trial.goes_aside(["chat", "code"]) and not trial.goes_aside(["code"])
    assert trial.by_tag["code"].acceptance == pytest.approx(0.6, abs=0.4)
    for _ in range(REST):
        trial.saw(100, 30.0)
    assert trial.in_trial and not trial.goes_aside(["chat"])
    mixed(trial, {"code": 3.0, "copy": 3.0, "chat": 0.3}, 1, np.random.default_rng(2), noise=0.05)
    trial.runs(guessing=True, load_seconds=SLOWEST_LOAD_S + 1)
    assert not trial.apart


class Second:
    """A second engine that starts, or does not."""

    name = "quality, second engine"

    def __init__(self, *, fails: bool = False) -> None:
        self.state, self.starts, self.fails = "stopped", 0, fails

    async def start(self) -> None:
        self.starts += 1
        self.state = "starting"
        if self.fails:
            raise EngineError("It does not start.")
        self.state = "ready"

    async def stop(self) -> None:
        self.state = "stopped"


def test_a_second_engine_runs_while_there_is_work_for_it():
    trial, replicas = GuessTrial(), ReplicaSet([Replica("one", None, "")])
    aside = Aside(trial, Second(), replicas)

    def look() -> str:
        asyncio.run(aside.look())
        return aside.engine.state

    assert look() == "stopped"
    mixed(trial, {"code": 3.0, "copy": 3.0, "chat": 0.3}, 1, np.random.default_rng(1), noise=0.05)
    assert not aside.takes(["chat"])
    assert look() == look() == "ready" and aside.engine.starts == 1
    assert aside.takes(["chat"]) and not aside.takes(["code"])
    for _ in range(REST):
        trial.saw(100, 30.0)
    assert look() == "ready" and not aside.takes(["chat"])  # a new trial: nobody's, and not stopped for it
    trial._end(GuessVerdict.PAYS, guessing=True)
    trial._apart = frozenset()
    (replica,) = replicas
    replica.outstanding = 1
    assert look() == "ready"
    replica.outstanding = 0
    assert look() == "stopped"


def test_a_second_engine_that_does_not_start_is_not_started_again_for_the_same_work():
    trial = GuessTrial()
    mixed(trial, {"code": 3.0, "copy": 3.0, "chat": 0.3}, 1, np.random.default_rng(1), noise=0.05)
    aside = Aside(trial, Second(fails=True), ReplicaSet([Replica("one", None, "")]))
    for _ in range(3):
        asyncio.run(aside.look())
    assert (aside.engine.starts, aside.engine.state) == (1, "stopped") and not aside.takes(["chat"])


def test_a_second_engine_needs_room_for_the_tier_once_more(tmp_path):
    ngram = Speculation("ngram")
    quality = TierSpec(level="q", path=tmp_path / "q", memory_bytes=100, speculate=ngram)
    speed = TierSpec(level="s", path=tmp_path / "s", memory_bytes=50)
    assert has_room_again([quality, speed], quality, 250) and has_room_again([quality, speed], quality, 0)
    assert not has_room_again([quality, speed], quality, 249)
    assert not has_room_again([quality, speed], speed, 0)


@pytest.mark.model
def test_the_real_engines_answer_one_kind_of_work_with_guesses_and_another_without(tmp_path, monkeypatch):
    monkeypatch.setattr("bitladder.serve.guessing.SLOWEST_LOAD_S", 120.0)
    monkeypatch.setattr("bitladder.serve.aside.LOOK_S", 0.05)
    spec = TierSpec(
        level="heads", path=write_tiny_with_head(tmp_path / "heads.gguf"), n_ctx=512, speculate=Speculation("mtp")
    )

    async def run() -> tuple[list[dict], dict]:
        async with deployed(ServeSettings(quality=spec, port=0, threads=1)) as deployment:
            (tier,) = deployment.tiers
            tier.guessing._end(GuessVerdict.PAYS, guessing=True)
            tier.guessing._apart = frozenset({"letters"})
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
                await tier.aside.engine.wait_ready(60)
                for tag in ("letters", "other"):
                    for stream in (False, True):
                        body = {"model": "quality", "max_tokens": 24, "stream": stream}
                        body |= {"messages": [{"role": "user", "content": "abcabc"}]}
                        reply = await client.post(CHAT, json=body, headers={"x-bitladder-tag": tag})
                        assert reply.status_code == 200, reply.text
                live = deployment.metrics.live(deployment.tiers)
                return live["recent"][::-1], live["tiers"][0]["guesses"]

    recent, told = asyncio.run(run())
    assert [one["guessing"] for one in recent] == [False, False, True, True]
    assert [one["guesses"][0] > 0 for one in recent] == [False, False, True, True]
    assert told["second_engine"] == "ready" and told["by_tag"]["letters"]["apart"]
    assert told["by_tag"]["other"]["acceptance"] is not None and told["by_tag"]["letters"]["acceptance"] is None


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
