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
from bitladder.engines.speculation import Speculation, check_speculation, draft_gap, heads_gap, parse_speculation
from bitladder.errors import BadInput, UsageError
from bitladder.files.gguf import read_header
from bitladder.levels import parse_levels
from bitladder.pipeline import run
from bitladder.plan.speculation import TierRoom, guesses_of_tiers, in_words, paying
from bitladder.progress import silent
from bitladder.records import to_json
from bitladder.records.reading import from_json
from bitladder.records.run import RunRecord
from bitladder.records.speculation import SpeculationResult
from bitladder.serve.deploy import deployed
from bitladder.serve.settings import ServeSettings, TierSpec
from bitladder.stages.job import Work
from bitladder.stages.run_facts import RunSettings
from bitladder.stages.serve import guess_bytes
from bitladder.stages.speculate import (
    Asked,
    SpeculateRequest,
    check_ways,
    known_to_pay,
    report_of,
    try_speculation,
    ways_of,
)
from tiny_engine import write_tiny, write_tiny_with_head

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


def best(found):
    return next(iter(paying(found.results)), None)


def report(**given):
    return report_of("model", workload(), [MODE], answers(**given), {MODE: 0})


def test_what_is_surely_faster_pays_and_what_is_not_does_not():
    assert best(report(gain=1.5)).mode == "ngram"
    assert best(report(gain=0.7)) is None
    found = report(gain=1.0)
    assert best(found) is None and found.results[0].gains[0].low < 1 < found.results[0].gains[0].high


def test_equal_speeds_are_rarely_called_faster():
    called = sum(best(report(gain=1.0, noise=0.2, seed=seed)) is not None for seed in range(200))
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
    assert best(found) is None


def test_an_answer_that_is_not_the_same_twice_says_nothing_about_guesses():
    found = report(gain=3.0, texts={"in3": ("other", "same")}, base_texts={"in3": ("same", "third")})
    assert found.unstable == ("in3",)
    assert found.results[0].lossless and best(found)


def test_answers_too_short_to_time_have_no_rate():
    asked = {key: [one._replace(seconds=math.nan) for one in each] for key, each in answers(1.5).items()}
    found = report_of("model", workload(), [MODE], asked, {MODE: 0})
    assert best(found) is None and found.results[0].gains[0].inputs == 0
    assert from_json(SpeculationResult, to_json(found.results[0])).mode == "ngram"


def tier_reports(*gains: float, noise: float = 0.05, seed: int = 0):
    return [
        replace(report(gain=gain, noise=noise, seed=seed + 97 * at), level=f"L{at}") for at, gain in enumerate(gains)
    ]


def test_a_tier_guesses_with_what_pays_and_only_where_it_does():
    reports = tier_reports(1.5, 0.8)
    rooms = [TierRoom("L0", 100), TierRoom("L1", 50)]
    (found,) = guesses_of_tiers(rooms, reports, 200, together=True)
    assert (found.level, found.guesses) == ("L0", "ngram") and found.low > 1
    assert "L0 guesses tokens ahead (ngram): 1.47 times" in in_words([found])
    assert in_words(()) == ""


@pytest.mark.parametrize(
    ("extra", "budget", "together", "fits"),
    [(50, 200, True, True), (51, 200, True, False), (51, 200, False, True), (101, 200, False, False)],
)
def test_guesses_that_do_not_fit_beside_the_tiers_are_not_taken(extra, budget, together, fits):
    reports = tier_reports(1.5, 0.8)
    (result,) = reports[0].results
    reports[0] = replace(reports[0], results=(replace(result, extra_bytes=extra),))
    rooms = [TierRoom("L0", 100), TierRoom("L1", 50)]
    assert bool(guesses_of_tiers(rooms, reports, budget, together=together)) == fits


def test_the_larger_gain_is_taken_and_several_tries_pay_for_their_number():
    (one,) = tier_reports(1.5)
    faster = replace(report(gain=2.0).results[0], mode="mtp")
    (found,) = guesses_of_tiers([TierRoom("L0", 0)], [replace(one, results=(*one.results, faster))], 0, together=True)
    assert found.guesses == "mtp"
    noisy = [report(gain=1.15, noise=0.2, seed=seed).results[0] for seed in range(60)]
    alone = [one for one in noisy if 0.01 < one.gains[0].p_value < 0.025]
    assert alone and paying(alone[:1]) and not paying([*alone[:1], *report(gain=0.9).results * 4])


def test_guesses_that_gain_nothing_are_rarely_decided_on():
    """2.5% at most over both tiers and all ways together; 400 decisions of four ways each."""
    wrong = sum(
        bool(guesses_of_tiers(
            [TierRoom("L0", 0), TierRoom("L1", 0)], tier_reports(1.0, 1.0, noise=0.2, seed=seed), 0, together=True
        ))
        for seed in range(400)
    )  # fmt: skip
    assert wrong <= 20


@pytest.mark.parametrize("text", ["", "ngrams", "draft", "draft:", "ngram:3", "mtp:1"])
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
        check_speculation(model, Speculation("draft", bad))


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
    known = known_to_pay(model, threads=1)
    pays = best(found)
    assert (str(known) if known else None) == (pays.mode if pays else None)
    assert known_to_pay(model, threads=99) is None


@pytest.mark.model
def test_heads_guess_and_answer_the_same_and_files_without_are_refused(tmp_path):
    held, lost = write_tiny_with_head(tmp_path / "held.gguf"), write_tiny_with_head(tmp_path / "lost.gguf", head=False)
    mode = parse_speculation("mtp")
    check_speculation(held, mode)
    with pytest.raises(BadInput, match="written without those that its header speaks of"):
        check_speculation(lost, mode)
    found = {}
    for one in (None, mode):
        with start(with_speculation(Launch(held, n_ctx=512, threads=1), one)) as engine:
            found[one] = engine.chat(Chat.of("abcabcabc", 48))
    assert found[None].timings.drafted == 0 < found[mode].timings.drafted
    assert found[None].text == found[mode].text


def test_heads_that_the_engine_does_not_run_are_refused_with_a_word(model):
    own = read_header(model)
    tensors = (*own.tensors, replace(own.tensors[0], name="blk.1.nextn.eh_proj.weight"))
    assert "holds no heads" in heads_gap(own)
    assert "does not run the heads of 'llama'" in heads_gap(replace(own, tensors=tensors))


def test_what_guessing_takes_in_memory(model, tmp_path):
    """The heads' cache is one layer of 2 heads of 64 weights for keys and values each, in 16 bits, at every token."""
    held = write_tiny_with_head(tmp_path / "held.gguf")
    assert guess_bytes(held, None, 512, (1, 2)) == guess_bytes(held, Speculation("ngram"), 512, (1, 2)) == (0, 0)
    small, large = (guess_bytes(held, Speculation("mtp"), n_ctx, (1,))[0] for n_ctx in (512, 1024))
    cache = 2 * 2 * 64 * 2
    mask = 2 * 512
    assert large - small == 512 * (cache + mask)
    assert guess_bytes(held, Speculation("draft", model), 512, (1,))[0] > model.stat().st_size


def test_ways_of_a_run(model, tmp_path):
    small = write_tiny(tmp_path / "Q2.gguf")
    large = tmp_path / "F32.gguf"
    large.write_bytes(model.read_bytes() + bytes(2 * model.stat().st_size))
    files = {"Q2": small, "F32": large}
    assert ways_of(["auto"], large, files) == (Speculation("ngram"), Speculation("draft", small))
    assert ways_of(["auto", "ngram", "draft:Q2"], small, files) == (Speculation("ngram"),)
    check_ways(["auto", "draft:Q2"], model, ["Q2"])
    for wrong in (["mtp"], ["draft:Q3"], ["often"]):
        with pytest.raises((BadInput, UsageError)):
            check_ways(wrong, model, ["Q2"])


@pytest.mark.model
def test_a_run_tries_guesses_on_its_tiers_and_decides_as_the_evidence_says(model, tmp_path):
    path = tmp_path / "w.yaml"
    lines = [f"  - {{id: i{n}, prompt: Say {n}., max_tokens: 12, expect: {{max_words: 90}}}}" for n in range(3)]
    path.write_text("name: t\ninputs:\n" + "\n".join(lines) + "\n")
    settings = RunSettings(
        model=str(model), workload=path, levels=tuple(parse_levels(["Q8_0", "Q4_K_M"])), out=tmp_path / "out",
        imatrix="none", n_ctx=512, threads=1, bar="speed > 0", speculate=("auto", "draft:Q4_K_M"),
    )  # fmt: skip
    record = run(settings, silent).record
    tiers = list(dict.fromkeys([record.decision.quality, record.decision.speed]))
    assert {one.level for one in record.speculation} >= set(tiers)  # and rivals that may be faster with guesses
    assert all(one.results[0].mode == "ngram" for one in record.speculation)
    surely = paying([result for one in record.speculation for result in one.results])
    assert {one.level: one.guesses for one in record.decision.speculate} == {
        report.level: next(mode.mode for mode in surely if mode in report.results)
        for report in record.speculation
        if report.level in tiers and any(mode in report.results for mode in surely)
    }
    assert "--speculate auto,draft:Q4_K_M" in record.commands[0] and "speculate" in record.timings
    assert from_json(RunRecord, to_json(record)).speculation == record.speculation
    again = run(settings, silent).record
    first = {one.level: one for one in record.speculation}
    kept = [one for one in again.speculation if one.level in first]  # a busy machine may choose others to try
    assert kept == [first[one.level] for one in kept]
    assert bool(kept) == any("speculation" in line for line in again.reused)


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
