"""Error feedback inside blocks: known answers, costs by plain algebra, files that any reader of GGUF reads, kills."""

import math
from dataclasses import replace

import gguf
import numpy as np
import pytest

import tiny_models
from bitladder import system
from bitladder.describe.windows import Window
from bitladder.errors import BadInput
from bitladder.files.gguf import GgufFile
from bitladder.formats.recipes import is_quantizable
from bitladder.kernels import dequantize, feedback, gptq, gptq_gpu, quantize
from bitladder.kernels.codes import CODE_BITS, grid_of, with_codes
from bitladder.kernels.feedback import chunk_of, quantize_heads, quantize_with_feedback, share_left
from bitladder.kernels.refine import refine
from bitladder.kernels.scales import units_of
from bitladder.records.recipe import Recipe
from bitladder.stages import feedback as feedback_stage
from bitladder.stages.feedback import method_name, write_with_feedback
from bitladder.walk import keep
from bitladder.walk.driver import Member, Observer, Stream
from bitladder.walk.feedback import FedLevel, FeedbackSettings, factor_of, fit_matrix
from bitladder.walk.inputs import InputStatistics, Wants
from bitladder.walk.layers import LayeredModel
from bitladder.walk.source_inputs import SourceInputs
from bitladder.walk.states import batches_of
from bitladder.walk.weights import FileWeights


def _inputs(columns, tokens=2000):
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((tokens, 8)) @ rng.standard_normal((8, columns))
    return (mixed + 0.3 * rng.standard_normal((tokens, columns))).astype(np.float32)


@pytest.mark.parametrize("qtype", CODE_BITS)
def test_feedback_loses_less_of_the_outputs_than_rounding(qtype):
    x = _inputs(512)
    weights = np.random.default_rng(1).standard_normal((24, 512)).astype(np.float32)
    energies = (x * x).sum(0)
    factor = gptq.prepare(x.T @ x, damp=0.01, together=chunk_of(512))
    fed = quantize_with_feedback(weights, qtype, factor, hessian=x.T @ x, importance=energies)
    plain = quantize(weights, qtype, importance=energies)

    def lost(data):
        return np.square(x @ (dequantize(data, qtype) - weights).T).sum(0)

    assert lost(fed.data).sum() < 0.6 * lost(plain).sum()
    assert fed.cost <= fed.plain_cost


def _curvature(heads, size, related):
    """Positive definite blocks f64[heads, size, size]; ``related``: what all rows of a head have in common."""
    lines = np.random.default_rng(4).standard_normal((heads, 3, size))
    return np.stack([related * own.T @ own + np.eye(size) for own in lines])


@pytest.mark.parametrize("qtype", ["Q2_K", "Q4_K", "IQ4_XS", "Q5_1", "IQ3_XXS"])
def test_rows_of_a_head_make_up_for_one_another(qtype):
    """The cost under what rows have in common falls by about as much as foreseen, without a worse one where nothing is
    in common."""
    x = _inputs(256)
    weights = np.random.default_rng(1).standard_normal((3 * 16, 256)).astype(np.float32)
    hessian = x.T @ x
    factor = gptq.prepare(hessian, damp=0.01, together=chunk_of(256))

    def fit(weights):
        return quantize_with_feedback(weights, qtype, factor, hessian=hessian, importance=np.diagonal(hessian).copy())

    def lost(blocks, curvature):
        wrong = (dequantize(blocks.data, qtype) - weights).reshape(3, 16, 256).astype(np.float64)
        return np.einsum("hij,hjk,kl,hil->", curvature, wrong, hessian, wrong)

    each = fit(weights)
    curvature = _curvature(3, 16, 5.0)
    together = quantize_heads(weights, qtype, curvature, fit)
    share = share_left(curvature)
    assert share < 0.5
    assert lost(together, curvature) / lost(each, curvature) == pytest.approx(share, rel=0.35)
    apart = quantize_heads(weights, qtype, _curvature(3, 16, 0.0), fit)
    np.testing.assert_array_equal(apart.data, each.data)
    assert share_left(_curvature(3, 16, 0.0)) == pytest.approx(1)


@pytest.mark.parametrize("qtype", ["Q2_K", "Q6_K", "IQ4_XS", "Q5_1"])
def test_unrelated_inputs_leave_nothing_to_feed_back(qtype):
    weights = np.random.default_rng(1).standard_normal((5, 256)).astype(np.float32)
    energies = np.linspace(1, 3, 256).astype(np.float32)
    hessian = np.diag(energies)
    factor = gptq.prepare(hessian)
    fed = quantize_with_feedback(weights, qtype, factor, hessian=hessian, importance=energies, effort="fast")
    plain = quantize(weights, qtype, importance=energies, effort="fast")
    nearest = with_codes(plain, qtype, grid_of(plain, qtype).nearest(weights))
    np.testing.assert_array_equal(dequantize(fed.data, qtype), dequantize(nearest, qtype))


@pytest.mark.parametrize("qtype", ["Q2_K", "Q3_K", "Q6_K", "IQ4_XS", "Q8_0"])
def test_the_twin_for_other_devices_chooses_the_same_codes(qtype):
    x = _inputs(256)
    weights = np.random.default_rng(3).standard_normal((9, 256)).astype(np.float32)
    factor = gptq.prepare(x.T @ x, damp=0.01)
    grid = grid_of(quantize(weights, qtype), qtype)
    codes, cost = gptq.apply(factor, weights, grid)
    others, other_cost = gptq_gpu.apply(factor, weights, grid, "cpu")
    assert np.mean(codes != others) < 1e-3  # ties within rounding, and what follows them
    np.testing.assert_allclose(other_cost, cost, rtol=1e-3)


def test_the_stated_cost_is_that_of_the_decoded_weights():
    x = _inputs(256)
    weights = np.random.default_rng(2).standard_normal((6, 256)).astype(np.float32)
    hessian = x.T @ x
    factor = gptq.prepare(hessian, damp=0.01)
    fed = quantize_with_feedback(weights, "Q3_K", factor, hessian=hessian, importance=np.diagonal(hessian))
    wrong = (dequantize(fed.data, "Q3_K") - weights).astype(np.float64)
    damped = hessian + factor.damp * np.diagonal(hessian).mean() * np.eye(256)
    assert fed.cost == pytest.approx(np.trace(wrong @ damped @ wrong.T), rel=1e-3)


@pytest.mark.parametrize("qtype", ["Q3_K", "Q5_1"])
def test_scales_are_searched_for_weights_that_make_up_for_what_went_before(qtype, monkeypatch):
    """By plain algebra: the errors e of the first chunk are best made up for by moving the second by -H22^-1 H21 e."""
    x, weights = _inputs(512), np.random.default_rng(5).standard_normal((6, 512)).astype(np.float32)
    hessian = x.T @ x + 50 * np.eye(512, dtype=np.float32)
    asked = []

    def recording(own, *arguments, **options):
        asked.append(own.copy())
        return quantize(own, *arguments, **options)

    monkeypatch.setattr(feedback, "quantize", recording)
    factor = gptq.prepare(hessian, damp=0, together=256)
    fed = quantize_with_feedback(
        weights, qtype, factor, hessian=hessian, importance=np.diagonal(hessian), effort="fast"
    )
    _, first, second = asked  # the very first is the plain rounding it is compared with
    one, two = (slice(start, start + 256) for start in ((0, 256) if factor.order[0] < 256 else (256, 0)))
    np.testing.assert_array_equal(first, weights[:, one])
    errors = (dequantize(fed.data, qtype) - weights)[:, one].astype(np.float64)
    moved = weights[:, two] - np.linalg.solve(hessian[two, two], hessian[two, one] @ errors.T).T
    np.testing.assert_allclose(second, moved, atol=2e-3)


def _cost(errors, hessian):
    return np.einsum("ri,ij,rj->r", errors, hessian, errors, dtype=np.float64)


@pytest.mark.parametrize("qtype", CODE_BITS)
def test_no_sweep_makes_any_row_worse(qtype):
    x, weights = _inputs(512), np.random.default_rng(1).standard_t(4, (9, 512)).astype(np.float32)
    hessian = x.T @ x
    data = quantize(weights, qtype, importance=np.diagonal(hessian))
    damped = hessian + 3.0 * np.eye(512)
    costs = [_cost(dequantize(data, qtype) - weights, damped)]
    for _ in range(3):
        data = refine(data, qtype, weights, hessian, ridge=3.0, chunk=256, sweeps=1)
        costs.append(_cost(dequantize(data, qtype) - weights, damped))
        assert (costs[-1] <= costs[-2] * (1 + 1e-4)).all()
    assert costs[1].sum() < 0.8 * costs[0].sum()


@pytest.mark.parametrize("qtype", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "Q4_0", "Q5_1", "IQ4_NL"])
def test_in_the_end_no_single_change_helps(qtype):
    """Every neighbour tried out: each code one up and down, each scale and minimum one step up and down."""
    x, weights = _inputs(256), np.random.default_rng(2).standard_normal((1, 256)).astype(np.float32)
    hessian = (x.T @ x).astype(np.float32)
    data = quantize(weights, qtype, importance=np.diagonal(hessian), effort="fast")
    data = refine(data, qtype, weights, hessian, ridge=0.0, chunk=256, sweeps=60)
    grid, units = grid_of(data, qtype), units_of(data, qtype)
    codes = grid.nearest(dequantize(data, qtype))
    tried = [codes]
    for step in (-1, 1):
        for k in range(256):
            if grid.lowest <= codes[0, k] + step <= grid.highest:
                tried.append(codes.copy())
                tried[-1][0, k] += step
    best = _cost(grid.values(codes) - weights, hessian)[0]
    others = np.concatenate([grid.values(one) for one in tried]) - weights
    assert _cost(others, hessian).min() >= best * (1 - 1e-5)
    for name, unit in (("scale", units.scale), ("offset", units.offset)):
        for group in range(grid.scale.shape[1]):
            for step in (-1, 1):
                values = getattr(grid, name).copy()
                values[0, group] += step * (unit[0, group] if unit[0, group] else values[0, group] * 2.0**-9)
                other = replace(grid, **{name: values})
                if units.most and name == "offset" and values[0, group] > 0 and unit[0, group]:
                    continue  # minima are taken away, never added
                assert _cost(other.values(codes) - weights, hessian)[0] >= best * (1 - 1e-5)


@pytest.mark.parametrize("qtype", ["Q2_K", "Q3_K", "IQ4_XS", "Q5_1"])
def test_channels_that_were_never_active_are_rounded_like_others(qtype):
    """A whole chunk of them, and a row of zeros: nothing is known of what their errors cost, so they stay small."""
    x, weights = _inputs(512), np.random.default_rng(4).standard_normal((6, 512)).astype(np.float32)
    x[:, 256:] = 0
    weights[3] = 0
    hessian = x.T @ x
    factor = gptq.prepare(hessian, damp=0.01, together=256)
    fed = quantize_with_feedback(weights, qtype, factor, hessian=hessian, importance=np.diagonal(hessian).copy())
    decoded = dequantize(fed.data, qtype)
    assert (decoded[3] == 0).all()
    plain = dequantize(quantize(weights, qtype), qtype)
    lost, usual = (np.square(one - weights)[:, 256:].sum() for one in (decoded, plain))
    assert lost < 1.3 * usual


def test_a_factor_solves_for_its_hessian():
    x, right = _inputs(96), np.random.default_rng(6).standard_normal((5, 96)).astype(np.float32)
    factor = gptq.prepare(x.T @ x, damp=0.01, together=32)
    damped = (x.T @ x + factor.ridge * np.eye(96)).astype(np.float64)
    np.testing.assert_allclose(gptq.solve(factor, right) @ damped, right, atol=1e-3)


def test_weights_make_up_by_half_for_what_came_before():
    """Against plain regression: of the outputs that the source has there on the level's inputs."""
    source = _inputs(64)
    level = source + np.random.default_rng(7).standard_normal(source.shape).astype(np.float32)
    weights = np.random.default_rng(8).standard_normal((6, 64)).astype(np.float32)
    seen = InputStatistics(
        gram=level.T @ level,
        largest=np.zeros(0, np.float32),
        squares=(level * level).sum(0).astype(np.float64),
        tokens=10**9,  # nothing is taken for noise
        held_out=np.zeros((0, 0), np.float32),
        drift=(source - level).T @ level,
    )
    settings = FeedbackSettings(damp=0)
    fitted = fit_matrix("Q8_0", weights, seen, factor_of("matrix", seen, settings), settings)
    whole = np.linalg.lstsq(level, source @ weights.T, rcond=None)[0].T
    np.testing.assert_allclose(dequantize(fitted.data, "Q8_0"), (weights + whole) / 2, atol=0.03)
    assert np.abs(whole - weights).max() > 0.3


@pytest.fixture
def tiny(tmp_path):
    case = tiny_models.CASES["llama"]
    path = tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")
    rng = np.random.default_rng(0)
    windows = [Window(f"text {n}", rng.integers(0, tiny_models.N_VOCAB, 100)) for n in range(12)]
    with GgufFile.open(path) as source:
        yield source, windows


def _recipe(source, qtype):
    qtypes = {info.name: qtype if is_quantizable(info) else info.qtype for info in source.model.tensors}
    return Recipe("test", "llama", qtypes, 0, math.nan, 0.25)


def test_a_file_by_a_recipe_is_an_ordinary_gguf(tiny, tmp_path):
    source, windows = tiny
    recipe = _recipe(source, "IQ4_NL")
    fitted = write_with_feedback(source, recipe, tmp_path / "out", windows)
    reader = gguf.GGUFReader(fitted.file.path)
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors} == recipe.qtypes
    with GgufFile.open(fitted.file.path) as file:
        assert file.metadata["bitladder.recipe"] == "test"
        assert file.metadata["bitladder.expected_kl"] == "0.25"
    assert all(loss.loss < 0.1 for loss in fitted.losses)
    assert write_with_feedback(source, recipe, tmp_path / "out", windows).file.reused


def test_the_source_goes_along_as_it_is(tiny, monkeypatch):
    """What its modules read is kept as they read it, beside a level that is fitted; its states are its own."""
    source, windows = tiny
    weights, batches = FileWeights(source), batches_of(windows)
    model, qtypes = LayeredModel(source.model, weights), _recipe(source, "Q4_0").qtypes
    settings = FeedbackSettings(effort="fast", half=False)
    found, expected, read = [], [], []

    class Everything(Observer):
        wants = Wants(gram=True)

        def reads(self, shared):
            return True

        def take(self, layer, block, seen):
            expected.append(seen)

    pop = SourceInputs.pop

    def looking(self, shared):
        states = pop(self, shared)
        read.append((shared, np.concatenate([states.get(batch)[batch.valid] for batch in batches])))
        return states

    monkeypatch.setattr(SourceInputs, "pop", looking)
    level = FedLevel(model, weights, qtypes, settings, batches, found.append, budget_bytes=1 << 30)
    members = [Member(weights, [level.source_inputs]), level]
    both = Stream(model, members, batches, state_bytes=1 << 30)
    alone = Stream(model, [Member(weights, [Everything()])], batches, state_bytes=1 << 30)
    for stream in (both, alone):
        stream.enter()
    for layer in range(2):
        both.through(layer)
        alone.through(layer)
        assert len(read) == 4
        for shared, x in read:
            [seen] = expected[layer][shared]
            np.testing.assert_allclose(x.T @ x, seen.gram, rtol=1e-4, atol=1e-6 * seen.gram.max())
        read.clear()
        np.testing.assert_array_equal(both.states_of(0).everything, alone.states_of(0).everything)
        assert not np.array_equal(both.states_of(1).everything, alone.states_of(0).everything)


def test_what_is_made_up_for_begins_where_something_was_lost(tiny, tmp_path, monkeypatch):
    source, windows = tiny
    asked, solve = [], gptq.solve
    monkeypatch.setattr(gptq, "solve", lambda factor, right: asked.append(np.abs(right).max()) or solve(factor, right))
    write_with_feedback(source, _recipe(source, "Q4_0"), tmp_path, windows)
    assert len(asked) == 7 * source.model.dims.n_layer  # the head is fitted for itself
    assert asked[:3] == [0, 0, 0]  # query, key and value of the first layer read what the source's do
    assert min(asked[3:]) > 0


def test_what_a_tensor_keeps_is_copied(tiny, tmp_path):
    source, windows = tiny
    recipe = _recipe(source, "Q4_0")
    kept = replace(recipe, qtypes={**recipe.qtypes, "blk.1.ffn_up.weight": source.info("blk.1.ffn_up.weight").qtype})
    fitted = write_with_feedback(source, kept, tmp_path / "out", windows)
    with GgufFile.open(fitted.file.path) as file:
        for name in ("blk.1.ffn_up.weight", "blk.0.attn_norm.weight", "output_norm.weight"):
            np.testing.assert_array_equal(file.raw(name), source.raw(name))


class _Killed(BaseException):
    pass


def test_a_killed_run_goes_on_at_its_layer(tiny, tmp_path, monkeypatch):
    source, windows = tiny
    recipe = _recipe(source, "Q4_0")
    whole = write_with_feedback(source, recipe, tmp_path / "whole", windows).file.path
    monkeypatch.setattr(keep, "SECONDS_BETWEEN", 0.0)
    # systems read at most 2 GiB at a time, so what is longer is read in pieces; here it is a kilobyte
    monkeypatch.setattr(feedback_stage, "_PIECE_BYTES", 1000)
    read_at = system.read_at
    monkeypatch.setattr(system, "read_at", lambda file, count, at: read_at(file, min(count, 1000), at))
    steps = []

    def killed_in_the_third_layer(what, done, _):
        if done == 2:
            raise _Killed

    with pytest.raises(_Killed):
        write_with_feedback(source, recipe, tmp_path / "cut", windows, progress=killed_in_the_third_layer)
    resumed = write_with_feedback(
        source, recipe, tmp_path / "cut", windows, progress=lambda what, done, total: steps.append(done)
    ).file.path
    assert steps[0] == 2
    assert resumed.read_bytes() == whole.read_bytes()
    assert [path.name for path in resumed.parent.iterdir()] == [resumed.name]


def test_too_little_text_is_refused(tiny, tmp_path):
    source, windows = tiny
    with pytest.raises(BadInput, match="200 tokens"):
        write_with_feedback(source, _recipe(source, "Q4_0"), tmp_path, windows[:2])


@pytest.mark.parametrize("name", ["mixtral", "phi3", "gemma2", "qwen2moe", "glm4", "ernie4_5moe"])
def test_other_families(name, tmp_path):
    case = next((case for key, case in tiny_models.CASES.items() if key.startswith(name)), None)
    if case is None:
        pytest.skip(f"no tiny {name}")
    path = tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")
    rng = np.random.default_rng(0)
    windows = [Window(f"text {n}", rng.integers(0, tiny_models.N_VOCAB, 100)) for n in range(12)]
    with GgufFile.open(path) as source:
        qtypes = {
            info.name: "Q8_0" if is_quantizable(info) and info.shape[-1] % 32 == 0 else info.qtype
            for info in source.model.tensors
        }
        fitted = write_with_feedback(
            source, Recipe("q8", "", qtypes, 0, 0.0, None), tmp_path, windows, settings=FeedbackSettings(effort="fast")
        )
    assert len(fitted.losses) > 10
    assert all(loss.loss < 1e-3 or loss.note for loss in fitted.losses)


def test_files_say_in_which_arithmetic_they_were_fitted():
    windows = [Window("a", np.arange(1024))]
    names = {method_name(windows, FeedbackSettings(half=half)) for half in (True, False)}
    assert {name.partition("passes ")[2].partition(",")[0] for name in names} == {"bfloat16", "f32"}
