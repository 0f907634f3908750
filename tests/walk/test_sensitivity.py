"""Predicted against real: small errors in one tensor raise the divergence by what its sensitivity says."""

import numpy as np
import pytest
import torch

import tiny_models
from bitladder.describe.windows import Window
from bitladder.errors import BadInput
from bitladder.files.gguf import GgufFile
from bitladder.formats.recipes import is_quantizable, types_for
from bitladder.plan.recipe import predicted
from bitladder.progress import silent
from bitladder.stages.fidelity import Candidate, walk
from bitladder.stages.imatrix import importance_matrix
from bitladder.stages.sensitivity import sensitivity_table, weigh
from bitladder.walk import sensitivity
from bitladder.walk.layers import LayeredModel
from bitladder.walk.sensitivity import (
    CurvaturePass,
    EmbeddingSensitivity,
    HeadCurvature,
    Sensitivity,
    SensitivityPass,
    embedding_curvature,
)
from bitladder.walk.states import batches_of
from bitladder.walk.weights import FileWeights


def _opened(name, tmp_path):
    case = tiny_models.CASES[name]
    path = tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")
    rng = np.random.default_rng(0)
    return GgufFile.open(path), [Window(f"t{n}", rng.integers(0, tiny_models.N_VOCAB, 100)) for n in range(24)]


class _Disturbed:
    """The source with noise in one tensor."""

    def __init__(self, source, name, noise):
        self.source, self.name, self.noise = FileWeights(source), name, noise

    def __call__(self, name, rows=None):
        values = self.source(name, rows)
        return values if name != self.name else values + (self.noise if rows is None else self.noise[rows])

    def identity(self, name):
        return (name, id(self)) if name == self.name else self.source.identity(name)

    def qtype(self, name):
        return self.source.qtype(name)

    def forget(self, name):
        self.source.forget(name)


def _predicted(sensitivity, noise):
    """Half the sum over rows of G_r D_r H D_r / tokens / predictions, written out."""
    if isinstance(sensitivity, EmbeddingSensitivity):
        squares = noise[sensitivity.tokens].astype(np.float64) ** 2
        return float((sensitivity.weights * squares).sum()) / 2 / sensitivity.predictions
    [seen] = sensitivity.inputs
    along = np.einsum("rk,kl,rl->r", noise, seen.gram, noise, dtype=np.float64)
    return float(sensitivity.rows[0] @ along) / seen.tokens / 2 / sensitivity.predictions


def test_small_errors_cost_what_is_predicted(tmp_path):
    source, windows = _opened("llama with biases", tmp_path)
    with source:
        found = {}
        batches = batches_of(windows)
        model = LayeredModel(source.model, FileWeights(source))

        def take(one):
            found["token_embd.weight" if isinstance(one, EmbeddingSensitivity) else one.name] = one

        SensitivityPass(model, FileWeights(source), batches, state_bytes=1 << 30).run(take, silent)
        matrices = [info for info in source.model.tensors if is_quantizable(info)]
        assert set(found) == {info.name for info in matrices}
        rng = np.random.default_rng(1)
        noises = {}
        for info in matrices:
            size = 0.05 * FileWeights(source)(info.name).std()
            noises[info.name] = (rng.standard_normal(info.shape) * size).astype(np.float32)
        candidates = [Candidate(name, _Disturbed(source, name, noise)) for name, noise in noises.items()]
        measured = {one.level: one.kl_mean for one in walk(source, candidates, windows)}
    ratios = {name: _predicted(found[name], noise) / measured[name] for name, noise in noises.items()}
    assert all(0.4 < ratio < 2.5 for ratio in ratios.values()), ratios
    assert 0.8 < np.exp(np.mean(np.log(list(ratios.values())))) < 1.25


@pytest.mark.parametrize("name", ["llama with biases", "llama", "gemma2"])
def test_errors_of_the_embedding_along_one_line_cost_what_its_curvature_says(name, tmp_path, monkeypatch):
    """Rows wrong by either sign along the line that costs most, and along one that costs little: no sum over channels
    tells these apart. "llama" and "gemma2" read the matrix at the head, too; "gemma2" multiplies what it looks up."""
    monkeypatch.setattr(sensitivity.gptq, "shrink", lambda *_: None)
    source, windows = _opened(name, tmp_path)
    with source:
        found = []
        weights = FileWeights(source)
        model, batches = LayeredModel(source.model, weights), batches_of(windows)
        SensitivityPass(model, weights, batches, state_bytes=1 << 30).run(found.append, silent)
        head, embedding = found[0], found[-1]
        whole, share = embedding_curvature(head, embedding), 1.0
        if head.name == "token_embd.weight":
            whole = whole + head.inputs[0].gram / head.inputs[0].tokens
            share = head.rows.sum() / head.predictions
        n_vocab, width = source.info("token_embd.weight").shape
        lines = np.linalg.eigh(whole)[1][:, [-1, width // 4]].T
        size = np.sqrt(0.02 / (share * lines[0] @ whole @ lines[0]))
        signs = np.random.default_rng(1).choice([-1.0, 1.0], (n_vocab, 1))
        noises = [(size * signs * line).astype(np.float32) for line in lines]
        files = [Candidate(str(n), _Disturbed(source, "token_embd.weight", noise)) for n, noise in enumerate(noises)]
        measured = [one.kl_mean for one in walk(source, files, windows)]
    predicted = [size**2 * share * (line @ whole @ line) / 2 for line in lines]
    assert predicted[0] > 3 * predicted[1]
    assert measured[0] == pytest.approx(predicted[0], rel=0.25)
    assert 0.7 < measured[1] / predicted[1] < 2, "what seems to cost little in so few tokens costs more"


@pytest.mark.parametrize("name", ["llama with biases", "gemma2"])
def test_gradients_for_curvatures_alone_are_the_same(name, tmp_path):
    source, windows = _opened(name, tmp_path)
    with source:
        weights = FileWeights(source)
        model, batches = LayeredModel(source.model, weights), batches_of(windows)
        found = {}
        for kind in (SensitivityPass, CurvaturePass):
            own = found[kind] = []
            kind(model, weights, batches, state_bytes=1 << 30).run(own.append, silent)
    [head, *blocks, embedding] = found[CurvaturePass]
    np.testing.assert_array_equal(head.rows, found[SensitivityPass][0].rows)
    np.testing.assert_array_equal(embedding.curvature, found[SensitivityPass][-1].curvature)
    # what each row costs, summed, and nothing more: who factors it shrinks it by its tokens
    own = embedding.weights.sum(axis=0) / embedding.counts.sum()
    np.testing.assert_allclose(embedding.curvature.diagonal(), own, rtol=1e-6)
    others = [one for one in found[SensitivityPass] if isinstance(one, HeadCurvature)]
    assert [one.name for one in blocks] == [one.name for one in others]
    for one, other in zip(blocks, others, strict=True):
        np.testing.assert_array_equal(one.blocks, other.blocks)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma2", "mixtral", "glm4"])
def test_heads_are_weighed_in_the_order_of_their_rows(name, tmp_path):
    """A head's curvature has the rows of the tensor, as a number per row has them, whatever order a layer has."""
    source, windows = _opened(name, tmp_path)
    with source:
        weights = FileWeights(source)
        model = LayeredModel(source.model, weights)
        found = []
        batches = batches_of(windows)
        SensitivityPass(model, weights, batches, state_bytes=1 << 30).run(found.append, silent)
    heads = {one.name: one.blocks for one in found if isinstance(one, HeadCurvature)}
    rows = {one.name: one.rows[0] for one in found if isinstance(one, Sensitivity)}
    fused = not any(one.endswith("attn_q.weight") for one in rows)
    assert bool(heads) != fused
    for tensor, blocks in heads.items():
        own = np.log(blocks.diagonal(axis1=1, axis2=2).reshape(-1))
        assert len(blocks) == (source.model.dims.n_head if "attn_q" in tensor else source.model.dims.n_head_kv)
        assert np.corrcoef(own, np.log(rows[tensor]))[0, 1] > 0.9, tensor
        np.linalg.cholesky(blocks)


def test_windows_of_other_lengths_beside_it_change_nothing_of_a_heads_curvature(tmp_path, monkeypatch):
    """Shorter windows are filled up in a batch; what fills them up is no token."""
    source, windows = _opened("llama", tmp_path)
    windows = [Window(one.document, one.tokens[: 100 - 4 * at]) for at, one in enumerate(windows)]
    monkeypatch.setattr(sensitivity.torch, "rand", lambda count, **_: torch.full((count,), 0.5))  # one label each
    with source:
        weights = FileWeights(source)
        model = LayeredModel(source.model, weights)
        found = []
        for batches in (batches_of(windows), batches_of(windows, batch_tokens=1)):
            own = []
            CurvaturePass(model, weights, batches, state_bytes=1 << 30).run(own.append, silent)
            found.append({one.name: one for one in own if isinstance(one, HeadCurvature)})
    together, apart = found
    assert together
    for name, one in together.items():
        np.testing.assert_allclose(one.blocks, apart[name].blocks, rtol=1e-3, atol=1e-4 * one.blocks.max())


def test_slices_of_the_vocabulary_change_nothing(tmp_path, monkeypatch):
    """Labels are drawn across slices: in which one a token lies must not matter.

    Where a uniform number falls within rounding of the sum at which one label ends and the next begins, the last bit of
    a product decides, and no two processors need agree: in a sum of 96 shares of 1 in f32 that is 96 * 2**-24.
    """
    source, _ = _opened("llama", tmp_path)
    with source:
        weights = FileWeights(source)
        model = LayeredModel(source.model, weights)
        normed = torch.randn(3000, source.model.dims.n_embd, generator=torch.Generator().manual_seed(3))
        found = []
        for rows_at_once in (tiny_models.N_VOCAB, tiny_models.N_VOCAB // 5):
            monkeypatch.setattr(sensitivity, "_SLICE", rows_at_once)
            through = SensitivityPass(model, weights, [], state_bytes=0)
            uniform = torch.rand(len(normed), generator=through._random.clone_state()).double() * (1 - 1e-4)
            shares = np.zeros(tiny_models.N_VOCAB)
            found.append((through._through_vocabulary(normed, shares), shares))
        head = torch.from_numpy(weights(model.output)).double()
    (whole, whole_shares), (sliced, sliced_shares) = found
    ends = (normed.double() @ head.T).softmax(-1).cumsum(-1)
    clear = (ends - uniform[:, None]).abs().amin(-1) > 4 * tiny_models.N_VOCAB * 2**-24
    assert clear.float().mean() > 0.99
    np.testing.assert_allclose(sliced_shares, whole_shares, rtol=1e-4)
    torch.testing.assert_close(sliced[clear], whole[clear], rtol=1e-4, atol=1e-4)
    drawn = torch.searchsorted(ends, uniform[:, None])
    expected = head[drawn[:, 0]] - (normed.double() @ head.T).softmax(-1) @ head
    torch.testing.assert_close(whole[clear].double(), expected[clear], rtol=1e-4, atol=1e-4)


def test_rows_are_those_of_the_file(tmp_path):
    """llama.cpp stores the rows of queries and keys in another order than the layer that gradients go through."""
    source, windows = _opened("llama", tmp_path)
    name = "blk.1.attn_q.weight"
    with source:
        batches = batches_of(windows)
        weights = FileWeights(source)
        model = LayeredModel(source.model, weights)
        rows = {}
        SensitivityPass(model, weights, batches, state_bytes=1 << 30).run(
            lambda one: rows.update({getattr(one, "name", ""): getattr(one, "rows", None)}), silent
        )
        heaviest = int(np.argmax(rows[name][0]))
        lightest = int(np.argmin(rows[name][0]))
        candidates = []
        for row in (heaviest, lightest):
            noise = np.zeros(source.info(name).shape, np.float32)
            noise[row] = 0.02
            candidates.append(Candidate(str(row), _Disturbed(source, name, noise)))
        heavy, light = walk(source, candidates, windows)
    assert heavy.kl_mean > 1.5 * light.kl_mean


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2moe", "gemma2", "phi3", "glm4", "ernie4_5moe"])
def test_a_table_of_every_family(name, tmp_path):
    source, windows = _opened(name, tmp_path)
    with source:
        table = sensitivity_table(source, windows)
        for info in source.model.tensors:
            if is_quantizable(info) and types_for(info):
                losses = {one.qtype: one.plain for one in table.losses[info.name]}
                assert losses["Q8_0"] < losses["Q5_0"] < losses["Q4_0"], info.name
        coarse = dict.fromkeys(table.losses, "Q4_0")
        assert predicted(table, coarse, feedback=True) < predicted(table, coarse, feedback=False)


@pytest.mark.parametrize("name", ["llama", "qwen2moe"])
def test_weighing_sees_the_inputs_that_an_importance_matrix_sees(name, tmp_path):
    source, windows = _opened(name, tmp_path)
    with source:
        found = weigh(source, windows, half=False).importance
        expected = importance_matrix(source, windows, half=False).vectors()
        quantized = [info.name for info in source.model.tensors if is_quantizable(info) and info.name in expected]
        assert len(quantized) > 10
        for tensor in quantized:
            np.testing.assert_allclose(found[tensor], expected[tensor], rtol=1e-3, atol=1e-6)


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("name", ["llama", "qwen2moe"])
def test_a_killed_weighing_goes_on_on_its_way_back(name, tmp_path, monkeypatch):
    source, windows = _opened(name, tmp_path)
    monkeypatch.setattr("bitladder.walk.keep.SECONDS_BETWEEN", 0.0)
    keep, steps = tmp_path / "kept", []

    def killed(what, done, total):
        if what == "sensitivity: back through layer 1 of 3":
            raise Killed

    with source:
        whole = weigh(source, windows)
        with pytest.raises(Killed):
            weigh(source, windows, keep=keep, progress=killed)
        assert list(keep.iterdir())
        resumed = weigh(source, windows, keep=keep, progress=lambda what, *_: steps.append(what))
    assert "sensitivity: the head" not in steps
    assert [step for step in steps if "back" in step] == ["sensitivity: back through layer 1 of 3"]
    assert resumed.table == whole.table
    assert resumed.importance.keys() == whole.importance.keys()
    for tensor, values in whole.importance.items():
        np.testing.assert_array_equal(resumed.importance[tensor], values)
    assert not list(keep.iterdir())


def test_too_little_text_is_refused(tmp_path):
    source, windows = _opened("llama", tmp_path)
    with source, pytest.raises(BadInput, match="300 tokens"):
        sensitivity_table(source, windows[:3])
