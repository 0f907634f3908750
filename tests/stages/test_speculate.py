"""Speculative decoding: what guesses gain, when they are called lossless and paying, and the real engine's guesses."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitladder.describe.workload import Input, Workload
from bitladder.engines.base import Chat, Launch
from bitladder.engines.llama import with_speculation
from bitladder.engines.registry import start
from bitladder.engines.speculation import Speculation, check_draft, draft_gap, parse_speculation
from bitladder.errors import BadInput, UsageError
from bitladder.files.gguf import read_header
from bitladder.records import to_json
from bitladder.records.reading import from_json
from bitladder.records.speculation import SpeculationResult
from bitladder.serve.deploy import deployed
from bitladder.serve.settings import ServeSettings, TierSpec
from bitladder.stages.job import Work
from bitladder.stages.speculate import Asked, SpeculateRequest, known_to_pay, report_of, try_speculation
from tiny_engine import write_tiny

MODE = Speculation("ngram")
INPUTS = 12


def workload() -> Workload:
    inputs = [
        Input(f"in{at}", [{"role": "user", "content": "x"}], (), tags=("copy",) if at % 2 else ("free",))
        for at in range(INPUTS)
    ]
    return Workload("test", tuple(inputs))


def answers(
    gain: float, *, tag_gain: float | None = None, noise: float = 0.05, seed: int = 0, texts=None, base_texts=None
):
    """Two rounds of each input, ``gain`` times as fast with guesses, those tagged ``copy`` ``tag_gain`` times."""
    rng = np.random.default_rng(seed)
    asked = {}
    for at in range(INPUTS):
        name = f"in{at}"
        own = tag_gain if tag_gain and at % 2 else gain
        for mode, factor in ((None, 1.0), (MODE, own)):
            text = ((base_texts if mode is None else texts) or {}).get(name, ("same", "same"))
            times = 0.02 / factor * np.exp(rng.normal(0, noise, 2))
            asked[name, mode] = [
                Asked(one, time, 40 if mode else 0, 30 if mode else 0) for one, time in zip(text, times, strict=True)
            ]
    return asked


def report(**given):
    return report_of("model", workload(), [MODE], answers(**given), {MODE: 0})


def test_what_is_surely_faster_pays_and_what_is_not_does_not():
    assert report(gain=1.5).best.mode == "ngram"
    assert report(gain=0.7).best is None
    found = report(gain=1.0).results[0]
    assert not found.pays and found.gains[0].low < 1 < found.gains[0].high


def test_equal_speeds_are_rarely_called_faster():
    called = sum(report(gain=1.0, noise=0.2, seed=seed).best is not None for seed in range(200))
    assert called <= 12  # 2.5% of 200 on average


def test_gains_are_told_by_tag():
    everything, free, copy = report(gain=0.8, tag_gain=2.0).results[0].gains[0:1] + tuple(
        next(gain for gain in report(gain=0.8, tag_gain=2.0).results[0].gains if gain.tag == tag)
        for tag in ("free", "copy")
    )
    assert copy.low > 1.5 and free.high < 1
    assert (everything.inputs, copy.inputs, copy.drafted, copy.accepted) == (12, 6, 480, 360)
    assert copy.acceptance == pytest.approx(0.75)


def test_another_answer_is_a_loss_and_does_not_pay_however_fast():
    found = report(gain=3.0, texts={"in3": ("other", "other")})
    assert found.results[0].differing == ("in3",)
    assert found.best is None


def test_an_answer_that_is_not_the_same_twice_says_nothing_about_guesses():
    found = report(gain=3.0, texts={"in3": ("other", "same")}, base_texts={"in3": ("same", "third")})
    assert found.unstable == ("in3",)
    assert found.results[0].lossless and found.best


def test_answers_too_short_to_time_have_no_rate():
    asked = {key: [one._replace(seconds=math.nan) for one in each] for key, each in answers(1.5).items()}
    found = report_of("model", workload(), [MODE], asked, {MODE: 0})
    assert found.best is None and found.results[0].gains[0].inputs == 0
    assert from_json(SpeculationResult, to_json(found.results[0])).mode == "ngram"


@pytest.mark.parametrize("text", ["", "ngrams", "draft", "draft:", "ngram:3", "mtp"])
def test_what_is_no_way_to_guess_is_refused(text):
    with pytest.raises(UsageError, match="no way to speculate"):
        parse_speculation(text)


def test_a_draft_that_is_not_there_is_told():
    with pytest.raises(BadInput, match="no file"):
        parse_speculation("draft:/nowhere/small.gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("speculate") / "tiny.gguf")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokenizer.ggml.model", "llama", "its model is 'llama'"),
        ("tokenizer.ggml.pre", "qwen2", "its pre is 'qwen2'"),
        ("tokenizer.ggml.tokens", ["a", "b"], "2 tokens"),
        ("tokenizer.ggml.tokens", None, "no tokens"),
    ],
)
def test_a_draft_with_another_tokenizer_is_named(model, key, value, said):
    own = read_header(model)
    assert draft_gap(own, own) == ""
    assert said in draft_gap(own, replace(own, metadata=own.metadata | {key: value}))


def test_a_token_that_differs_is_named_and_padding_is_no_difference(model):
    own = read_header(model)
    tokens = [*own.metadata["tokenizer.ggml.tokens"], *(f"pad{n}" for n in range(100))]
    draft = replace(own, metadata=own.metadata | {"tokenizer.ggml.tokens": tokens})
    assert draft_gap(own, draft) == ""
    tokens[65] = "other"
    assert "its token 65 is 'other'" in draft_gap(own, draft)


def test_no_model_drafts_for_nothing(model, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF nonsense")
    with pytest.raises(BadInput):
        check_draft(model, Speculation("draft", bad))


@pytest.mark.model
def test_the_real_engine_guesses_and_answers_the_same(model, tmp_path):
    """A draft that is the model itself is right nearly always; n-grams of a text that repeats itself often are."""
    question = Chat.of("abcabcabcabcabcabc", 48)
    found = {}
    for mode in (None, MODE, Speculation("draft", model)):
        with start(with_speculation(Launch(model, n_ctx=512, threads=1), mode)) as engine:
            found[mode] = engine.chat(question)
    plain, _, drafted = found.values()
    assert plain.timings.drafted == 0
    assert drafted.timings.accepted >= 0.8 * drafted.timings.drafted > 0
    assert len({one.text for one in found.values()}) == 1


@pytest.mark.model
def test_the_verb_measures_stores_and_auto_takes_only_what_pays(model, tmp_path, monkeypatch):
    path = tmp_path / "w.yaml"
    lines = [f"  - {{id: i{n}, prompt: Say {n}., max_tokens: 12, expect: {{contains_any: [a]}}}}" for n in range(2)]
    path.write_text("name: t\ninputs:\n" + "\n".join(lines) + "\n")
    found = try_speculation(SpeculateRequest(str(model), workload=path, drafts=[str(model)]), Work(threads=1))
    assert [one.mode for one in found.results] == ["ngram", f"draft:{model}"]
    assert found.results[1].extra_bytes > 0
    best = known_to_pay(model, threads=1)
    assert (str(best) if best else None) == (found.best.mode if found.best else None)
    assert known_to_pay(model, threads=99) is None


@pytest.mark.model
def test_a_tier_that_guesses_tells_how_good_its_guesses_are(model):
    async def served():
        spec = TierSpec(level="tiny", path=model, n_ctx=512, speculate=Speculation("draft", model))
        async with deployed(ServeSettings(quality=spec, port=0, threads=1)) as deployment:
            (tier,) = deployment.tiers
            for _ in range(40):
                process = tier.engine._process
                await asyncio.to_thread(process.chat, Chat.of("abcabcabc", 24))
                await asyncio.sleep(0.5)
                (told,) = deployment.metrics.live(deployment.tiers)["tiers"]
                if told["guesses"]["guessed"]:
                    return told["guesses"], deployment.metrics.text(deployment.tiers).decode()
            return None

    guesses, text = asyncio.run(served())
    assert guesses["from"] == "draft" and guesses["acceptance"] > 0.5
    assert 'bitladder_guessed_tokens{tier="quality"}' in text
