"""AWQ before K-quants: folding changes no prediction, packing loses no more than without it, any llama.cpp runs it."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from bitladder.describe.windows import Window
from bitladder.errors import UnknownLevel, UsageError
from bitladder.files.gguf import GgufFile
from bitladder.kernels import dequantize, quantize
from bitladder.kernels.awq import Fold
from bitladder.levels import FoldedLevel, RecipeLevel, parse_level, parse_levels
from bitladder.levels.products import ImportanceVectors
from bitladder.stages.calibrate import Calibrated, Calibration, Reading
from bitladder.stages.fidelity import file_candidate, walk
from bitladder.stages.imatrix import importance_matrix
from bitladder.stages.job import Build, Work
from bitladder.stages.quantize import build_levels, sort_levels
from bitladder.stages.write_levels import quantize_levels
from bitladder.walk.folding import KQuantFolder
from bitladder.walk.layers import LayeredModel
from bitladder.walk.weights import FileWeights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What is calibrated here is found by no other test."""
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))


def windows_of(seed: int, count: int = 24, n: int = 64) -> list[Window]:
    rng = np.random.default_rng(seed)
    return [Window(f"text {at}", rng.integers(0, tiny_models.N_VOCAB, n)) for at in range(count)]


def loud(name: str, path: Path, **sizes: int) -> Path:
    """A tiny model whose norms and up projections make a few channels twenty times louder than the others."""
    case = tiny_models.CASES[name]
    model = tiny_models.make(case, **sizes)
    with torch.no_grad():
        for at, (parameter, value) in enumerate(model.named_parameters()):
            if parameter.endswith(("layernorm.weight", "up_proj.weight")):
                value[at % 7 :: 23] *= 20
    return tiny_models.write(case, model, path)


def calibrated(source: GgufFile, *wanted) -> Calibrated:
    return Calibration(source, wanted, Reading(windows_of(1)), out_dir=Path(), name="tiny").run()


@pytest.mark.parametrize("name", sorted(tiny_models.CASES))
def test_folding_changes_no_prediction(name, tmp_path):
    with GgufFile.open(loud(name, tmp_path / "tiny.gguf")) as source:
        found = calibrated(source, FoldedLevel("Q2_K"))
        folds = found.folds["AWQ-Q2_K"]
        assert folds
        assert found.report.folded[0].scaled == sum(fold.columns is not None for fold in folds.values())
        [made] = quantize_levels(source, ["F32"], tmp_path / "out", folds=folds)
        assert made.path.name == "tiny-AWQ-F32.gguf"
        with GgufFile.open(made.path) as folded:
            changed = [name for name in folds if not np.array_equal(source.read(name), folded.read(name))]
            assert sorted(changed) == sorted(folds)
            [fidelity] = walk(source, [file_candidate(source, folded)], windows_of(2, count=4))
    assert fidelity.kl_mean < 1e-7


def test_an_inputs_error_on_held_out_text_is_never_above_that_without_scales(tmp_path):
    """The closed form against errors of real outputs, with the very files' types and search."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    with GgufFile.open(loud("llama", tmp_path / "tiny.gguf", **sizes)) as source:
        weights = FileWeights(source)
        model = LayeredModel(source.model, weights)
        block = model.layer(1, weights)
        qtypes = {f"blk.1.{role}": "Q3_K" for shared in model.family.inputs for role in shared.roles}
        folder = KQuantFolder(model, 1, block, qtypes, 1)
        rng = np.random.default_rng(0)
        better = 0
        for shared in reversed(model.family.inputs):
            columns = block.get_submodule(shared.module).weight.shape[1]
            x = rng.normal(size=(400, columns)).astype(np.float32) * rng.lognormal(0, 1.5, columns).astype(np.float32)
            seen = rng.normal(size=(400, columns)).astype(np.float32) * np.sqrt((x**2).mean(axis=0))
            before = {role: block_weights(block, model, role) for role in shared.roles}
            losses = folder.fold(shared, seen.T @ seen, x.T @ x)
            wrong = plain = 0.0
            for role, weight in before.items():
                name = f"blk.1.{role}"
                fold = folder.folds.get(name, Fold())
                factors = np.ones(columns, np.float32) if fold.columns is None else fold.columns
                energy = (seen**2).sum(axis=0)
                stored = round_trip(weight * factors, energy / factors**2) / factors
                error = ((x @ (stored - weight).T) ** 2).sum()
                assert losses[name] == pytest.approx(error / ((x @ weight.T) ** 2).sum(), rel=1e-3)
                wrong += error
                plain += ((x @ (round_trip(weight, energy) - weight).T) ** 2).sum()
            assert wrong <= plain * (1 + 1e-6)
            better += wrong < 0.95 * plain
        assert better >= 2


def test_scales_that_fit_other_text_only_are_dropped(tmp_path):
    """What is loud where scales are searched is silent where they are judged, and the other way round."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    with GgufFile.open(loud("llama", tmp_path / "tiny.gguf", **sizes)) as source:
        weights = FileWeights(source)
        model = LayeredModel(source.model, weights)
        qtypes = {f"blk.1.{role}": "Q3_K" for shared in model.family.inputs for role in shared.roles}
        rng = np.random.default_rng(0)
        shared = model.family.inputs[-1]
        loudness = rng.lognormal(0, 1.5, 512)
        x, y = ((rng.normal(size=(400, 512)) * own).astype(np.float32) for own in (loudness, 1 / loudness))
        for held_out, folds in ((x.T @ x, True), (y.T @ y, False), (np.zeros((512, 512), np.float32), False)):
            folder = KQuantFolder(model, 1, model.layer(1, weights), qtypes, 1)
            folder.fold(shared, x.T @ x, held_out)
            assert bool(folder.folds) is folds


def block_weights(block, model, role: str) -> np.ndarray:
    [parameter] = [one for one in model.family.parameters if one.roles == (role,)]
    return block.get_parameter(parameter.path).detach().numpy().copy()


def round_trip(weights: np.ndarray, importance: np.ndarray) -> np.ndarray:
    packed = quantize(np.ascontiguousarray(weights), "Q3_K", importance=importance.astype(np.float32))
    return dequantize(packed, "Q3_K")


def test_a_fold_by_hand():
    fold = Fold(np.array([2, 4], np.float32), np.array([1, 10], np.float32))
    weights = np.array([[1, 1], [5, 5]], np.float32)
    np.testing.assert_array_equal(fold.apply(weights), [[2, 4], [1, 2]])
    np.testing.assert_array_equal(fold.apply(weights[1:], slice(1, 2)), [[1, 2]])
    np.testing.assert_array_equal(fold.apply(np.array([3, 3], np.float32)), np.array([3, 0.3], np.float32))
    np.testing.assert_array_equal(fold.importance(np.array([[8, 8]], np.float32)), [[2, 0.5]])


def test_one_walk_gathers_what_two_would(tmp_path):
    """The importance matrix beside scales is llama-imatrix's own; a second call finds both in the cache."""
    with GgufFile.open(loud("qwen2moe", tmp_path / "tiny.gguf")) as source:
        both = calibrated(source, FoldedLevel("Q3_K_M"), ImportanceVectors())
        apart = importance_matrix(source, windows_of(1))
        for name, means in apart.mean_squares.items():
            np.testing.assert_array_equal(both.importance.mean_squares[name], means, err_msg=name)
            np.testing.assert_array_equal(both.importance.counts[name], apart.counts[name])
        assert set(both.importance.mean_squares) == set(apart.mean_squares)
        assert both.report.measured is not None
        again = calibrated(source, FoldedLevel("Q3_K_M"), ImportanceVectors())
    assert again.report.measured is None
    assert again.report.folded == both.report.folded
    for name, fold in both.folds["AWQ-Q3_K_M"].items():
        for kind, vector in fold.vectors().items():
            np.testing.assert_array_equal(again.folds["AWQ-Q3_K_M"][name].vectors()[kind], vector)


def test_names():
    assert parse_level("awq-q3_k_m") == FoldedLevel("Q3_K_M")
    with pytest.raises(UnknownLevel, match="AWQ-IQ4_XS"):
        parse_level("AWQ-IQ4_XS")  # AWQ works before K-quants
    with pytest.raises(UnknownLevel) as caught:
        parse_level("AWQ-Q3_KM")
    assert "Did you mean AWQ-Q3_K_M" in caught.value.means
    asked = sort_levels(parse_levels(["q8_0", "AWQ-Q2_K", "GPTQ-4bit-g64", "AWQ-4bit-g64"]))
    assert (asked.files, asked.folded) == ((RecipeLevel("Q8_0"),), (FoldedLevel("Q2_K"),))
    assert [level.name for level in asked.checkpoints] == ["GPTQ-4bit-g64", "AWQ-4bit-g64"]
    assert not sort_levels(parse_levels(["Q8_0", "F16"])).use_importance
    assert sort_levels(parse_levels(["Q8_0", "Q5_1"])).use_importance


def test_scales_need_an_importance_matrix(tmp_path):
    with pytest.raises(UsageError, match="AWQ-Q2_K was asked for with --imatrix none"):
        build_levels("x", parse_levels(["AWQ-Q2_K"]), Build(out=tmp_path, imatrix="none"), Work())


@pytest.mark.model
def test_the_real_engine_runs_a_folded_file(demo_gguf, tmp_path):
    """Made-up scales in three layers, stored in eight bits: llama.cpp answers as it does without them."""
    from bitladder.engines.base import Chat, Launch
    from bitladder.engines.registry import start

    rng = np.random.default_rng(0)
    folds = {}
    with GgufFile.open(demo_gguf) as source:
        dims = source.model.dims
        for layer in (0, 12, 29):
            blk = f"blk.{layer}."
            norm, mlp, down = (
                np.exp(rng.normal(size=n)).astype(np.float32) for n in (dims.n_embd, dims.n_embd, dims.n_ff)
            )
            folds |= {f"{blk}attn_norm.weight": Fold(rows=norm), f"{blk}ffn_norm.weight": Fold(rows=mlp)}
            folds |= {f"{blk}attn_{part}.weight": Fold(columns=norm) for part in "qkv"}
            folds |= {f"{blk}ffn_gate.weight": Fold(mlp), f"{blk}ffn_up.weight": Fold(mlp, down)}
            folds[f"{blk}ffn_down.weight"] = Fold(columns=down)
        files = quantize_levels(source, ["Q8_0"], tmp_path)
        files += quantize_levels(source, ["Q8_0"], tmp_path, folds=folds)
    answers = []
    for file in files:
        with start(Launch(file.path, n_ctx=128, threads=1)) as engine:
            answers.append(engine.chat(Chat.of("Name the capital of France.", 12)))
    assert "Paris" in answers[1].text
    assert answers[0].text == answers[1].text
