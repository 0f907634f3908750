"""The layered forward pass gives the logits of transformers' own full model, family by family."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from bitladder.errors import BadFile, BadInput, UnknownArchitecture
from bitladder.files.gguf import GgufFile
from bitladder.formats.families import FAMILIES
from bitladder.formats.roles import EMBEDDING, layer_tensor
from bitladder.walk import products
from bitladder.walk.layers import LayeredModel, inference
from bitladder.walk.weights import FileWeights
from tiny_models import CASES, N_VOCAB, Case

# float32 sums in another order; logits here are of the order of ten.
TOLERANCE = 1e-4


def layered_logits(path: Path, tokens: np.ndarray) -> torch.Tensor:
    with GgufFile.open(path) as file, inference():
        weights = FileWeights(file)
        model = LayeredModel(file.model, weights)
        states = model.embed(tokens, weights)
        for layer in range(model.n_layer):
            states = model.run(model.layer(layer, weights), layer, states)
        logits = model.norm(weights)(states) @ torch.from_numpy(weights(model.output)).T
        cap = model.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_the_whole_model(name: str, tmp_path: Path):
    case = CASES[name]
    whole = tiny_models.make(case)
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, (2, 24))
    with torch.no_grad():
        expected = whole(torch.from_numpy(tokens)).logits
    found = layered_logits(tiny_models.write(case, whole, tmp_path / "tiny.gguf"), tokens)
    assert expected.std() > 0.3, "a model that says the same everywhere tests nothing"
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch is built without oneDNN")
@pytest.mark.parametrize("name", CASES)
def test_logits_by_one_dnn_are_the_same(name: str, tmp_path: Path, monkeypatch):
    """Every linear layer and all plainly causal attention, however small, on every processor."""
    monkeypatch.setattr(products, "one_dnn_pays", lambda: True)
    monkeypatch.setattr(products, "_FEWEST_STEPS", 1)
    monkeypatch.setattr(products, "_FEWEST_ATTENDING", 1)
    asked, one_dnn = [], products._one_dnn
    monkeypatch.setattr(products, "_one_dnn", lambda *given: asked.append(given) or one_dnn(*given))
    case = CASES[name]
    path = tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, (2, 150))
    expected = layered_logits(path, tokens)
    assert not asked
    with products.products(half=False):
        found = layered_logits(path, tokens)
    assert asked
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_every_family_has_a_case():
    rows = {
        (row.architecture, one.model_type)
        for row in FAMILIES.values()
        for one in (row.layers, row.expert_layers)
        if one
    }
    covered = {(case.architecture, case.model_type) for case in CASES.values()}
    assert covered - {("llama", "mistral")} == rows


def test_only_embedding_rows_that_occur_are_read(tmp_path: Path):
    path = tiny_models.write(CASES["llama"], tiny_models.make(CASES["llama"]), tmp_path / "tiny.gguf")
    asked = []
    with GgufFile.open(path) as file:
        weights = FileWeights(file)

        def spy(name, rows=None):
            asked.append((name, rows))
            return weights(name, rows)

        states = LayeredModel(file.model, spy).embed(np.array([[3, 5, 3]]), spy)
        table = weights(EMBEDDING)
    assert [(name, rows.tolist()) for name, rows in asked] == [(EMBEDDING, [3, 5])]
    np.testing.assert_array_equal(states[0].numpy(), table[[3, 5, 3]])


def broken(tmp_path: Path, case: Case, **keys: object) -> GgufFile:
    changed = Case(case.model_type, case.architecture, case.fields, {**case.keys, **keys}, case.permuted)
    return GgufFile.open(tiny_models.write(changed, tiny_models.make(case), tmp_path / "tiny.gguf"))


def test_unknown_family_names_the_known_ones(tmp_path: Path):
    case = CASES["llama"]
    model = tiny_models.make(case)
    path = tiny_models.write(case, model, tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"exaon").replace(b"exaon", b"bloom"))
    with (
        GgufFile.open(path) as file,
        pytest.raises(UnknownArchitecture, match=r"'bloom'.*\n.*gemma2.*qwen3moe"),
    ):
        LayeredModel(file.model, FileWeights(file))


def test_unknown_position_scaling_is_refused(tmp_path: Path):
    with (
        broken(tmp_path, CASES["llama"], **{"rope.scaling.type": "dynamic"}) as file,
        pytest.raises(BadInput, match=r"'dynamic'"),
    ):
        LayeredModel(file.model, FileWeights(file))


def test_partly_rotated_heads_are_refused_where_the_layer_cannot(tmp_path: Path):
    with (
        broken(tmp_path, CASES["llama"], **{"rope.dimension_count": 8}) as file,
        pytest.raises(UnknownArchitecture, match=r"rotates 8 of 16"),
    ):
        LayeredModel(file.model, FileWeights(file))


def test_layers_of_two_kinds(tmp_path: Path):
    """Each layer has its own kind's parameters and inputs, and a tensor of the other kind has no place in it."""
    case = CASES["ernie4_5moe"]
    model = tiny_models.make(case)
    with GgufFile.open(tiny_models.write(case, model, tmp_path / "tiny.gguf")) as file:
        layered = LayeredModel(file.model, FileWeights(file))
        dense, mixture = (layered.kind(layer) for layer in (0, 1))
        assert dense != mixture == layered.kind(2)
        assert [layer for layer, _ in layered.first_of_each_kind()] == [0, 1]
        assert "blk.0.ffn_down.weight" in layered.layer_names(0)
        assert "blk.1.ffn_down_exps.weight" in layered.layer_names(1)
    strange = replace(case, tensors=lambda _: {"blk.1.ffn_down.weight": np.ones((64, 96))})
    with (
        GgufFile.open(tiny_models.write(strange, model, tmp_path / "strange.gguf")) as file,
        pytest.raises(UnknownArchitecture, match=r"'blk.1.ffn_down.weight' has no place"),
    ):
        LayeredModel(file.model, FileWeights(file))


def test_a_variant_that_its_header_gives_away_is_refused(tmp_path: Path):
    with (
        broken(tmp_path, CASES["glm4"], **{"rope.dimension_sections": 2}) as file,
        pytest.raises(UnknownArchitecture, match=r"'glm4' model has 'rope.dimension_sections'"),
    ):
        LayeredModel(file.model, FileWeights(file))


def test_tensor_without_a_place_is_refused(tmp_path: Path):
    case = Case(
        "llama",
        "llama",
        {"tie_word_embeddings": True},
        permuted=True,
        tensors=lambda _: {"blk.1.attn_sinks.weight": np.ones(4)},
    )
    path = tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")
    with GgufFile.open(path) as file, pytest.raises(UnknownArchitecture, match=r"'blk.1.attn_sinks.weight'"):
        LayeredModel(file.model, FileWeights(file))


def test_shape_that_contradicts_the_header_is_named(tmp_path: Path):
    with broken(tmp_path, CASES["llama"], feed_forward_length=112) as file:
        model = LayeredModel(file.model, FileWeights(file))
        with pytest.raises(BadFile, match=r"ffn_\w+.weight give a parameter of shape \(.*96.*\n?.*112"):
            model.layer(0, FileWeights(file))


def test_missing_tensor_is_named(tmp_path: Path):
    path = tiny_models.write(CASES["llama"], tiny_models.make(CASES["llama"]), tmp_path / "tiny.gguf")
    with GgufFile.open(path) as file:
        weights = FileWeights(file)
        model = LayeredModel(file.model, weights)
        model._names.discard(layer_tensor(1, "ffn_up.weight"))
        with pytest.raises(BadFile, match=r"'blk\.1\.ffn_up\.weight' is missing"):
            model.layer(1, weights)
