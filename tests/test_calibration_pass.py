"""One layer, many passes: statistics do not depend on how windows are batched or where a pass stops."""

import numpy as np
import pytest
import torch

import tiny_models
from bitladder.describe.windows import Window
from bitladder.files.gguf import GgufFile
from bitladder.records.calibration import LinearLoss
from bitladder.walk.calibration import LayerPass
from bitladder.walk.checkpoint_walk import held_out, said
from bitladder.walk.layers import LayeredModel
from bitladder.walk.states import States, batches_of
from bitladder.walk.streams import LayerOutput
from bitladder.walk.weights import FileWeights


@pytest.fixture
def layer(tmp_path):
    """A function that opens layer 0 of a tiny Llama over windows in batches of some tokens."""
    case = tiny_models.CASES["llama"]
    path = tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")
    rng = np.random.default_rng(0)
    windows = [Window("text", rng.integers(0, tiny_models.N_VOCAB, n)) for n in (48, 48, 40, 24)]

    with GgufFile.open(path) as file:
        weights = FileWeights(file)
        model = LayeredModel(file.model, weights)

        def opened(batch_tokens: int) -> LayerPass:
            batches = batches_of(windows, batch_tokens=batch_tokens)
            states = States(batches, file.model.dims.n_embd, spill=None)
            for batch in batches:
                states.put(batch, model.embed(batch.tokens, weights))
            return LayerPass(model, 0, model.layer(0, weights), states, batches)

        yield model, opened


def test_passes_that_stop_see_what_one_whole_pass_sees(layer):
    model, opened = layer
    inputs = [shared for shared in model.family.inputs if shared.kind == "linear"]
    whole = opened(64).gather_all(inputs)
    stopping = opened(64)
    torch.full((1 << 16,), float("nan"))  # memory that a pass must not mistake for activations
    for shared, [expected] in zip(inputs, whole, strict=True):
        [found] = stopping.gather(shared)
        assert found.tokens == expected.tokens == 160
        np.testing.assert_allclose(found.gram, expected.gram, rtol=1e-4, atol=1e-4)


def test_how_far_inputs_are_from_the_sources(layer):
    """A source that has 1 in every channel: (1 - X)^T X is the sum of X's rows, in every row, less X^T X."""
    model, opened = layer
    through = opened(64)
    for shared in (one for one in model.family.inputs if one.kind == "linear"):
        [seen] = opened(64).gather(shared)
        ones = States(through._batches, len(seen.gram), spill=None)
        ones.everything.fill_(1)
        [found] = through.gather(shared, ones)
        sums = found.drift + seen.gram
        np.testing.assert_allclose(sums, sums[:1].repeat(len(sums), axis=0), atol=1e-5 * seen.gram.max())
        assert np.ptp(sums[0]) > 0.1
        assert seen.drift.size == 0


def test_batches_change_nothing(layer):
    model, opened = layer
    few, many = opened(1 << 20), opened(48)
    for shared in model.family.inputs:
        for one, other in zip(few.gather(shared), many.gather(shared), strict=True):
            np.testing.assert_allclose(one.gram, other.gram, rtol=1e-4, atol=1e-4)


def test_progress_says_each_loss_where_they_fit():
    few = LayerOutput(losses=[LinearLoss("self_attn.q_proj", 0.0012, 9), LinearLoss("mlp.down_proj", 0.02, 9)])
    assert said(few) == " (error: q 0.12%, down 2.00%)"
    experts = LayerOutput(losses=[LinearLoss(f"mlp.experts.{n}.up_proj", n / 1000, 9) for n in range(9)])
    assert said(experts) == " (error up to 0.80%, up)"
    assert said(LayerOutput(losses=[LinearLoss("mlp.up_proj", float("nan"), 0)])) == ""


def test_windows_held_out_are_summed_apart_and_in_all(layer):
    model, opened = layer
    inputs = [shared for shared in model.family.inputs if shared.kind == "linear"]
    apart, others, whole = (
        opened(64).gather_all(inputs, held_out=frozenset(places)) for places in ((0, 3), (1, 2), ())
    )
    for [one], [other], [plain] in zip(apart, others, whole, strict=True):
        np.testing.assert_allclose(one.held_out + other.held_out, plain.gram, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one.gram, plain.gram, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(one.squares, plain.squares)
        assert plain.held_out.shape == (0, 0)
        assert np.abs(one.held_out - other.held_out).max() > 1e-3


def test_whole_documents_are_held_out():
    def places(names: str) -> set[int]:
        return set(held_out([Window(name, np.arange(4)) for name in names]))

    assert places("aaaa") == {1, 3}
    assert places("aabcc") == {2, 3, 4}
    assert places("a") == places("") == set()
