"""What errors of the embedding cost: found once, kept, and what its codes are fitted under."""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load, save
from typer.testing import CliRunner

import tiny_models
from bitladder.cli.app import app
from bitladder.describe.windows import Window, weighing_part
from bitladder.files.gguf import GgufFile
from bitladder.formats.recipes import is_quantizable
from bitladder.kernels import dequantize, quantize
from bitladder.plan import preflight
from bitladder.progress import silent
from bitladder.records.recipe import Recipe
from bitladder.stages import feedback
from bitladder.stages import recipe as recipes
from bitladder.stages.curvature import keep_curvatures, kept_curvatures
from bitladder.stages.feedback import write_with_feedback
from bitladder.stages.job import Build, Job, Journal
from bitladder.stages.sensitivity import BlockTypes, weigh
from bitladder.walk.layers import LayeredModel
from bitladder.walk.products import wants_half_products
from bitladder.walk.sensitivity import CurvaturePass, Curvatures, SensitivityPass
from bitladder.walk.weights import FileWeights


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _opened(name, tmp_path, count=60):
    case = tiny_models.CASES[name]
    path = tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")
    rng = np.random.default_rng(0)
    return path, [Window(f"t{n}", rng.integers(0, tiny_models.N_VOCAB, 100)) for n in range(count)]


def _found(source, windows, tmp_path, *, half=False):
    weights = FileWeights(source)
    return kept_curvatures(
        source, LayeredModel(source.model, weights), weights, windows,
        half=half, state_bytes=1 << 30, spill=tmp_path, progress=silent,
    )  # fmt: skip


def _same(one, other):
    np.testing.assert_array_equal(one.embedding, other.embedding)
    assert one.heads.keys() == other.heads.keys()
    for name, blocks in one.heads.items():
        np.testing.assert_array_equal(blocks, other.heads[name], name)


class _Asked(Exception):
    """Gradients were taken."""


def _refuse(*_, **__):
    raise _Asked


@pytest.mark.parametrize("name", ["llama", "llama with biases"])
def test_weighing_finds_what_fitting_finds(name, tmp_path, monkeypatch):
    """Bytes of a file do not depend on whether its model was weighed before."""
    path, windows = _opened(name, tmp_path)
    with GgufFile.open(path) as source:
        alone = _found(source, windows, tmp_path)
        weighed = weigh(source, weighing_part(windows), half=False)
        _same(weighed.curvatures, alone)
        monkeypatch.setattr(CurvaturePass, "run", _refuse)
        _same(_found(source, windows, tmp_path), alone)
        with pytest.raises(_Asked):
            _found(source, windows[:30], tmp_path)


HOSTILE = {
    "another shape": lambda arrays: arrays | {"token_embd.weight": arrays["token_embd.weight"][1:]},
    "another type": lambda arrays: {name: one.astype("f2") for name, one in arrays.items()},
    "no embedding": lambda arrays: {name: one for name, one in arrays.items() if name != "token_embd.weight"},
    "other heads": lambda arrays: arrays | {"blk.0.attn_q.weight": np.ones((3, 5, 5), np.float32)},
    "no blocks": lambda arrays: arrays | {"blk.0.attn_q.weight": np.ones((5, 5), np.float32)},
    "an unknown tensor": lambda arrays: arrays | {"blk.0.what.weight": np.ones((1, 5, 5), np.float32)},
    "no numbers": lambda arrays: arrays | {"token_embd.weight": arrays["token_embd.weight"] * np.nan},
}  # fmt: skip


@pytest.mark.parametrize("kept", [b"", b"no array", b"\xff" * 100, (1 << 60).to_bytes(8, "little") + b"{}", *HOSTILE])
def test_what_was_kept_and_is_no_curvature_is_found_again(kept, tmp_path, cache):
    path, windows = _opened("llama", tmp_path, 12)
    with GgufFile.open(path) as source:
        found = _found(source, windows, tmp_path)
        assert found.heads.keys() == {f"blk.{layer}.attn_{one}.weight" for layer in range(3) for one in "qk"}
        [file] = (cache / "sensitivity").iterdir()
        before = file.read_bytes()
        file.write_bytes(kept if isinstance(kept, bytes) else save(HOSTILE[kept](load(before))))
        _same(_found(source, windows, tmp_path), found)
        assert file.read_bytes() == before


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, cache):
    path, windows = _opened("llama", tmp_path, 12)
    cache.write_text("a file where the folder belongs")
    with GgufFile.open(path) as source:
        found = _found(source, windows, tmp_path)
        assert np.isfinite(found.embedding).all()
        keep_curvatures(source, windows, False, found)


def test_feedback_is_expected_to_leave_less_of_what_the_embedding_loses(tmp_path):
    path, windows = _opened("llama with biases", tmp_path)
    with GgufFile.open(path) as source:
        losses = weigh(source, windows, half=False).table.losses["token_embd.weight"]
    assert all(0.2 * one.plain < one.fed < 0.99 * one.plain for one in losses if one.plain)


def test_a_recipe_takes_gradients_once(tmp_path, monkeypatch):
    path, windows = _opened("llama", tmp_path, 36)
    monkeypatch.setattr(Job, "windows", lambda *_: windows)  # tiny models have no tokenizer
    monkeypatch.setattr(CurvaturePass, "run", _refuse)
    made = CliRunner().invoke(app, ["recipe", str(path), "--bpw", "5.5", "--out", str(tmp_path / "out")])
    assert made.exit_code == 0, made.output


def test_gradients_are_foreseen_until_they_are_kept(tmp_path, monkeypatch):
    """Of files whose embedding or heads of attention are quantized; others need none."""
    path, windows = _opened("llama", tmp_path, 36)
    monkeypatch.setattr(preflight, "ASSUMED_FLOPS", 1e6)

    def fitting(source, kinds):
        """Seconds that are foreseen; nothing is written."""
        asked = []
        job = SimpleNamespace(
            source=source, executor=None, journal=Journal(), threads=1, device="cpu", progress=silent
        )  # fmt: skip
        recipe = Recipe("test", "llama", kinds, 0, math.nan, None)
        monkeypatch.setattr(recipes, "forecast", lambda need, *_: asked.append(need) or nullcontext())
        monkeypatch.setattr(feedback, "write_with_feedback", lambda *_, **__: None)
        recipes.write_recipe(job, recipe, windows, Build(out=tmp_path / "out"))
        return asked[0].seconds

    with GgufFile.open(path) as source:
        kinds = {info.name: "Q4_0" if is_quantizable(info) else info.qtype for info in source.model.tensors}
        same = [name for name in kinds if name.endswith(("attn_q.weight", "attn_k.weight", "token_embd.weight"))]
        plain = kinds | {name: source.info(name).qtype for name in same}
        whole, layers = fitting(source, kinds), fitting(source, plain)
        assert whole > 1.3 * layers
        _found(source, windows, tmp_path, half=wants_half_products(None, "cpu"))
        assert fitting(source, kinds) == layers


@pytest.mark.parametrize("name", ["llama", "llama with biases"])
def test_the_embedding_is_fitted_under_what_its_errors_cost(name, tmp_path, monkeypatch):
    """Under a curvature with lines that cost much, which the head of a random model knows nothing of."""
    path, windows = _opened(name, tmp_path, 12)
    with GgufFile.open(path) as source:
        kinds = {info.name: "Q4_0" if is_quantizable(info) else info.qtype for info in source.model.tensors}
        recipe = Recipe("test", "llama", kinds, 0, math.nan, None)
        original = FileWeights(source)("token_embd.weight")
        lines = np.random.default_rng(1).standard_normal((8, original.shape[1]))
        steep = 1e6 * (lines.T @ lines + 0.01 * np.eye(original.shape[1]))

        def cost(data):
            wrong = (dequantize(data, "Q4_0") - original).astype(np.float64)
            return np.einsum("rk,kl,rl->", wrong, steep, wrong)

        monkeypatch.setattr(feedback, "kept_curvatures", lambda *_, **__: Curvatures(steep, {}))
        fitted = write_with_feedback(source, recipe, tmp_path / "out", windows)
        monkeypatch.setattr(feedback, "kept_curvatures", _refuse)  # where the embedding stays as it is
        same = [name for name in kinds if name.endswith(("attn_q.weight", "attn_k.weight", "token_embd.weight"))]
        kept = kinds | {name: source.info(name).qtype for name in same}
        write_with_feedback(source, Recipe("kept", "llama", kept, 0, math.nan, None), tmp_path / "out", windows)
    with GgufFile.open(fitted.file.path) as file:
        assert cost(file.raw("token_embd.weight")) < 0.3 * cost(quantize(original, "Q4_0"))


@pytest.mark.parametrize("name", ["llama", "llama with biases"])
def test_gradients_that_overflow_say_nothing_and_end_nothing(name, tmp_path, monkeypatch):
    """An embedding that is looked up only is rounded to nearest, one that is the output matrix fitted as that."""
    path, windows = _opened(name, tmp_path, 12)
    embedding = SensitivityPass._embedding
    monkeypatch.setattr(
        SensitivityPass, "_embedding",
        lambda self, states: replace(one := embedding(self, states), curvature=one.curvature * np.inf),
    )  # fmt: skip
    with GgufFile.open(path) as source:
        kinds = {info.name: "Q4_0" if is_quantizable(info) else info.qtype for info in source.model.tensors}
        fitted = write_with_feedback(source, Recipe("test", "llama", kinds, 0, math.nan, None), tmp_path, windows)
        nearest = quantize(FileWeights(source)("token_embd.weight"), "Q4_0")
        tied = "output.weight" not in {info.name for info in source.model.tensors}
    with GgufFile.open(fitted.file.path) as file:
        assert np.array_equal(file.raw("token_embd.weight").reshape(nearest.shape), nearest) != tied


def test_rows_of_heads_are_fitted_together(tmp_path, monkeypatch):
    """Under a curvature that all rows of a head have in common; tensors that none is given for stay as they were."""
    path, windows = _opened("llama", tmp_path, 12)
    name = "blk.1.attn_q.weight"
    with GgufFile.open(path) as source:
        kinds = {info.name: "Q4_0" if is_quantizable(info) else info.qtype for info in source.model.tensors}
        recipe, heads = Recipe("test", "llama", kinds, 0, math.nan, None), source.model.dims.n_head
        found, original = _found(source, windows, tmp_path), FileWeights(source)(name)
        size = len(original) // heads
        steep = np.tile(np.eye(size, dtype=np.float32) + 20, (heads, 1, 1))
        made = []
        for given in ({}, {name: steep}):
            monkeypatch.setattr(feedback, "kept_curvatures", lambda *_, g=given, **__: Curvatures(found.embedding, g))
            fitted = write_with_feedback(source, recipe, tmp_path / str(len(given)), windows)
            with GgufFile.open(fitted.file.path) as file:
                made.append({one.name: bytes(file.raw(one.name)) for one in file.model.tensors})
    costs = []
    for one in made:
        stored = np.frombuffer(one[name], np.uint8).reshape(len(original), -1)
        wrong = (dequantize(stored, "Q4_0") - original).astype(np.float64).reshape(heads, size, -1)
        costs.append(np.einsum("hij,hik,hjk->", steep, wrong, wrong))
    assert costs[1] < 0.5 * costs[0]
    assert made[0]["blk.1.attn_v.weight"] == made[1]["blk.1.attn_v.weight"]


def test_heads_are_expected_to_lose_less_where_their_rows_are_fitted_together(tmp_path):
    class Apart(BlockTypes):
        by_head = False

    path, windows = _opened("llama", tmp_path)
    with GgufFile.open(path) as source:
        both = [weigh(source, windows, half=False, choices=own).table.losses for own in (BlockTypes(), Apart())]
    for name in ("blk.0.attn_q.weight", "blk.1.attn_k.weight"):
        for together, apart in zip(*(losses[name] for losses in both), strict=True):
            assert together.plain == apart.plain
            assert 0.1 * apart.fed < together.fed < 0.99 * apart.fed or not apart.fed
    assert both[0]["blk.0.attn_v.weight"] == both[1]["blk.0.attn_v.weight"]
