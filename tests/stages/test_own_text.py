"""Calibration text that the model writes itself, through the real engine."""

import json

import pytest

import bitladder.stages.own_text as own
from bitladder.describe.seed import Seed
from bitladder.errors import EngineError
from bitladder.files import texts as text_files
from bitladder.files.texts import shipped_texts
from bitladder.progress import StepsOnly
from bitladder.stages.calibration import calibration_texts
from bitladder.stages.job import SELF, SHIPPED, WIDE, Build, Journal, Work, opened
from tiny_engine import write_tiny

SEEDS = (
    Seed("en-salt", ("Tell me three things about salt.",), "Salt is a mineral that"),
    Seed(
        "en-chat",
        ("Write a letter about salt.", "Another one, about pepper."),
        "Q: What is pepper?\nA:",
        system="Answer at length.",
    ),
    Seed("en-pepper", ("Write a long story about a pepper mill.",), "Pepper grows on"),
    Seed("ru-sol", ("Расскажи о соли.",), "Соль добывают", script="Cyrillic"),
)


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Three seeds and short answers, and a cache of their own."""
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_files, "shipped_seeds", lambda: SEEDS)
    monkeypatch.setattr(own, "MOST_TOKENS", 40)


def written(tmp_path) -> list[dict]:
    return [json.loads(path.read_text("utf-8")) for path in sorted((tmp_path / "cache" / "own-text").glob("*/*.json"))]


def test_a_chat_model_writes_through_its_template_once(few, demo_gguf, tmp_path):
    with opened(str(demo_gguf), Work(threads=2)) as job:
        found = own.own_texts(job)
        assert not found.plain
        assert [one.name for one in found.texts] == [seed.name for seed in SEEDS]
        salt, chat, *_ = found.texts
        assert salt.text.startswith("<|im_start|>")
        assert SEEDS[0].ask[0] in salt.text
        assert chat.text.count("<|im_start|>user") == 2  # and its own first answer between them
        assert chat.text.count("<|im_start|>assistant") == 2
        assert chat.text.count("<|im_end|>") >= 4  # the answer in the middle ends once, not twice
        assert "<|im_end|><|im_end|>" not in chat.text.replace("\n", "")
        assert "Answer at length." in chat.text
        assert 24 <= salt.tokens <= 40

        def refuse(*_args, **_more):
            raise AssertionError("the model was asked again")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bitladder.engines.llama.LlamaServer.sample", refuse)
            assert own.own_texts(job) == found
            assert [one.text for one in own.own_documents(job)] == [one.text for one in found.kept]
    assert len(written(tmp_path)) == len(SEEDS)


def test_a_killed_call_goes_on(few, demo_gguf, tmp_path):
    class Killed(BaseException):
        pass

    def kill(_what, done, _total):
        if done == 1:
            raise Killed

    with opened(str(demo_gguf), Work(threads=2, progress=StepsOnly(kill))) as job, pytest.raises(Killed):
        own.own_texts(job)
    before = {one["name"]: one for one in written(tmp_path)}
    assert 0 < len(before) < len(SEEDS)
    folder = next((tmp_path / "cache" / "own-text").iterdir())
    (folder / "ru-sol.json").write_text('{"name": "ru-', encoding="utf-8")  # cut short: it is written again
    before.pop("ru-sol", None)
    with opened(str(demo_gguf), Work(threads=2)) as job:
        own.own_texts(job)
    after = {one["name"]: one for one in written(tmp_path)}
    assert set(after) == {seed.name for seed in SEEDS}
    assert before.items() <= after.items()


def test_a_base_model_writes_plain_text_which_is_said(few, tmp_path):
    model = write_tiny(tmp_path / "base.gguf", template="")
    lines: list[str] = []
    journal = Journal(lines.append)
    with opened(str(model), Work(journal=journal)) as job:
        found = own.own_texts(job)
        own.own_documents(job)
    assert found.plain
    assert journal.own_text == found.report
    assert sum(journal.own_text.dropped.values()) + journal.own_text.texts == len(SEEDS)
    assert any("in plain text, for it has no chat template" in line for line in lines)


def test_what_a_degenerate_model_writes_is_not_calibrated_on(few, tmp_path):
    """Random weights write bytes that make no characters."""
    model = write_tiny(tmp_path / "tiny.gguf")
    journal = Journal()
    with opened(str(model), Work(journal=journal)) as job:
        assert {one.dropped for one in own.own_texts(job).texts} <= {"broken characters", "too short"}
        assert calibration_texts(job, [SELF]) == shipped_texts("calibration")
    assert any("own text is not calibrated on: only 0 of 4" in line for line in journal.warnings)


def test_a_file_named_like_a_shipped_text_is_another_document(tmp_path):
    shipped = [one.name for one in shipped_texts("calibration")]
    (tmp_path / f"{shipped[0]}.txt").write_text("My own text.", encoding="utf-8")
    named = [one.name for one in calibration_texts(None, [SHIPPED, tmp_path / f"{shipped[0]}.txt"])]
    assert named == [*shipped, f"{shipped[0]} (2)"]


def test_mixes_are_in_the_order_in_which_they_are_named(few, demo_gguf, tmp_path):
    (tmp_path / "mine.txt").write_text("My own text.", encoding="utf-8")
    with opened(str(demo_gguf), Work(threads=2)) as job:
        names = [one.name for one in calibration_texts(job, [tmp_path / "mine.txt", SELF, SHIPPED, SELF])]
        shipped, more = ([one.name for one in shipped_texts(f"calibration{of}")] for of in ("", "/wide"))
        wide = [one.name for one in calibration_texts(job, [SHIPPED, WIDE, tmp_path / "mine.txt"])]
        kept = [one.name for one in own.own_texts(job).kept]
    assert kept
    assert names == ["mine", *kept, *shipped]
    assert wide == [*shipped, *more, "mine"]  # the shipped one is a part of the wide one
    by_effort = {effort: Build(out=tmp_path, effort=effort).calibration for effort in ("fast", "good", "best")}
    assert by_effort == {"fast": (SHIPPED,), "good": (SHIPPED,), "best": (WIDE,)}
    assert Build(out=tmp_path, effort="best").importance_text == (SHIPPED,)
    named = Build(out=tmp_path, effort="best", texts=(SELF,))
    assert named.calibration == named.importance_text == (SELF,)


def test_where_the_engine_does_not_run_it_other_text_is_named(few, tmp_path):
    model = write_tiny(tmp_path / "tiny.gguf")
    whole = model.read_bytes()
    model.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight"))
    with opened(str(model), Work()) as job, pytest.raises(EngineError) as caught:
        calibration_texts(job, [SELF])
    assert "--calibrate shipped" in caught.value.do
