"""Rotated models: the same predictions in the walk and in the engine, other numbers, and clear words where a model
cannot be rotated."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny_families
from bitladder.cli.app import app
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.errors import BadInput, BadWeights, UsageError
from bitladder.files.gguf import GgufFile
from bitladder.files.sources import resolve
from bitladder.formats import residual
from bitladder.formats.residual import Meets, Part, residual_parts
from bitladder.formats.tensors import TensorInfo
from bitladder.kernels.rotation import MOST_ODD, odd_part, rotation
from bitladder.stages import rotate
from bitladder.stages.fidelity import Candidate, file_candidate, token_scores
from bitladder.stages.job import Work
from bitladder.walk.rotated import RotatedWeights
from bitladder.walk.weights import FileWeights
from engine_model import TEXT, write_engine_model
from tiny_checkpoints import tiny, windows_of

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = 1e-7
"""Mean KL of what is only rounded to 16 bits: 3e-9 was seen."""


@pytest.mark.parametrize("width", [1, 2, 3, 45, 64, 576, 2880, 4096, 5120])
def test_a_rotation_is_orthogonal_and_mixes_everything(width):
    turned = rotation(width)
    rows = turned.columns(np.eye(width, dtype=np.float32)[: min(width, 64)])
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-5)
    assert np.abs(rows).max() <= 1.01 * np.sqrt(2 / width) or width == 1
    rng = np.random.default_rng(0)
    values, matrix = rng.normal(size=(5, width)).astype(np.float32), rng.normal(size=(width, 3)).astype(np.float32)
    np.testing.assert_allclose(turned.columns(values) @ turned.rows(matrix), values @ matrix, rtol=1e-3, atol=1e-3)


def test_widths_without_a_cheap_rotation():
    assert [odd_part(width) for width in (1, 7, 4096, 5120)] == [1, 7, 1, 5]
    for width in (0, 2 * (MOST_ODD + 1) + 1):
        with pytest.raises(ValueError, match="no rotation"):
            rotation(width)


def _divergence(source):
    weights = RotatedWeights(
        FileWeights(source), residual_parts(source.model.tensors, source.model.dims.n_embd),
        rotation(source.model.dims.n_embd),
    )  # fmt: skip
    [_, own] = token_scores(source, [Candidate("rotated", weights)], windows_of(1, count=4, n=24))
    return float(own.kl.mean())


@pytest.mark.parametrize(
    "family",
    [
        "llama with biases", "mistral, wide heads", "mixtral", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3",
        "phi3 longrope, part of a head",
    ],
)  # fmt: skip
def test_families_predict_what_they_did(family, tmp_path):
    *_, gguf = tiny(family, tmp_path)
    with GgufFile.open(gguf) as source:
        assert _divergence(source) < SAME


@pytest.mark.parametrize("family", ["granite", "hunyuan dense"])
def test_families_without_a_row_as_well(family, tmp_path):
    """Their layers are not known by a file alone, so `rotate` refuses them; tensors mean the same there."""
    [(_, _, gguf)] = tiny_families.write_all(tmp_path, [family]).values()
    with GgufFile.open(gguf) as source:
        assert _divergence(source) < SAME


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("llama", "output matrix is its embedding"),
        ("gemma3", "output matrix is its embedding"),
        ("olmo2", "attn_q.weight"),
        ("glm4", "post_attention_norm.weight"),
    ],
)
def test_models_that_cannot_be_rotated(family, found, tmp_path):
    *_, gguf = tiny(family, tmp_path)
    with GgufFile.open(gguf) as source, pytest.raises(BadInput, match=found):
        residual_parts(source.model.tensors, source.model.dims.n_embd)


def test_a_matrix_of_another_width_is_not_known():
    tensors = [
        TensorInfo(name, shape, "F16")
        for name, shape in (
            ("token_embd.weight", (96, 64)), ("output.weight", (96, 64)), ("output_norm.weight", (64,)),
            ("blk.0.attn_norm.weight", (64,)), ("blk.0.attn_q.weight", (64, 32)),
        )
    ]  # fmt: skip
    with pytest.raises(BadInput, match=r"blk\.0\.attn_q"):
        residual_parts(tensors, 64)


@pytest.fixture
def model(tmp_path):
    return write_engine_model(tmp_path / "tiny-F16.gguf", untied=True)


def test_the_engine_continues_as_with_the_source(model, tmp_path):
    result = CliRunner().invoke(app, ["rotate", str(model), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    made = tmp_path / "out" / "tiny-rotated-F16.gguf"
    assert (told["path"], told["bytes"], told["reused"]) == (str(made), made.stat().st_size, False)
    assert told["kl"] < 1e-5
    found = []
    for path in (model, made):
        with LlamaServer(Launch(path, n_ctx=256, threads=1)) as server:
            found.append(server.continue_tokens(server.tokenize(TEXT), max_tokens=24, top=3))
    assert [one.token_id for one in found[0]] == [one.token_id for one in found[1]]
    np.testing.assert_allclose(*[[one.logprob for one in own] for own in found], atol=0.02)
    with GgufFile.open(model) as source, GgufFile.open(made) as turned:
        np.testing.assert_array_equal(turned.read("blk.1.ffn_norm.weight"), 1)
        assert np.abs(turned.read("blk.0.attn_q.weight") - source.read("blk.0.attn_q.weight")).max() > 0.05
        [_, own] = token_scores(source, [file_candidate(source, turned)], windows_of(1, count=2))
        assert own.kl.mean() < 1e-5


def test_a_second_call_finds_the_file_and_a_killed_one_goes_on(model, tmp_path, monkeypatch):
    plain, made, dies_at = rotate.quantize, [], 0

    def counting(values, qtype):
        made.append(qtype)
        if len(made) == dies_at:
            raise KeyboardInterrupt
        return plain(values, qtype)

    monkeypatch.setattr(rotate, "quantize", counting)
    first = rotate.rotate_model(str(model), tmp_path / "a", Work())
    whole = len(made)
    assert rotate.rotate_model(str(model), tmp_path / "a", Work()).reused
    assert len(made) == whole
    made.clear()
    dies_at = 9
    with pytest.raises(KeyboardInterrupt):
        rotate.rotate_model(str(model), tmp_path / "b", Work())
    assert not list((tmp_path / "b").glob("*.gguf"))
    made.clear()
    dies_at = 0
    second = rotate.rotate_model(str(model), tmp_path / "b", Work())
    assert len(made) == whole - 8
    assert second.path.read_bytes() == first.path.read_bytes()
    assert [path.name for path in (tmp_path / "b").iterdir()] == [second.path.name]


def test_recipes_are_made_of_it(model, tmp_path):
    made = rotate.rotate_model(str(model), tmp_path, Work()).path
    arguments = ["recipe", str(made), "--bpw", "5", "--out", str(tmp_path / "out"), "--effort", "fast"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [line for line in told["warnings"] if line.startswith("It is rotated")]
    assert not resolve(str(model)).warnings
    file = Path(told["fitted"]["file"]["path"])
    assert file.name.startswith("tiny-rotated-bpw")
    with GgufFile.open(model) as source, GgufFile.open(made) as turned, GgufFile.open(file) as level:
        candidates = [file_candidate(source, turned), file_candidate(source, level)]
        scores = token_scores(source, candidates, windows_of(1, count=2))
    assert scores[1].kl.mean() < 1e-5 < scores[2].kl.mean() < 0.1


def test_what_is_wired_otherwise_is_found_out(model, tmp_path, monkeypatch):
    """Names may be those of another wiring: predictions tell."""
    plain = residual._part

    def forgets_a_writer(name):
        return Part(Meets.NEITHER) if name == "blk.1.ffn_down.weight" else plain(name)

    monkeypatch.setattr(residual, "_part", forgets_a_writer)
    result = CliRunner().invoke(app, ["rotate", str(model), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "predicts something else" in result.output
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def _too_large(monkeypatch):
    plain = FileWeights.__call__
    monkeypatch.setattr(FileWeights, "__call__", lambda self, *of: plain(self, *of) * (1e7 if "attn_q" in of[0] else 1))


BAD = {
    "another file": (UsageError, "tiny-rotated-F16", lambda _: None),
    "too large": (BadWeights, "F16 ends at", _too_large),
    "a projector": (
        BadInput,
        "pictures",
        lambda to: to.setattr(rotate, "projector_of", lambda *_: Path("mmproj.gguf")),
    ),
    "no row": (BadInput, "could not be weighed", lambda to: to.setattr(rotate, "walk_gap", lambda _: "unknown layers")),
    "trained": (BadInput, "was trained", lambda to: to.setattr(rotate, "TRAINED", {"F16"})),
    "wide": (BadInput, "cheap", lambda to: to.setattr(rotate, "MOST_ODD", 0)),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_leaves_everything_as_it_was(what, model, tmp_path, monkeypatch):
    error, words, arrange = BAD[what]
    out = tmp_path / "out"
    out.mkdir()
    if what == "another file":
        (out / "tiny-rotated-F16.gguf").write_bytes(b"mine")
    arrange(monkeypatch)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.gguf")}
    with pytest.raises(error, match=words):
        rotate.rotate_model(str(model), out, Work())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.gguf*")} == before
