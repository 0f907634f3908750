"""Fidelity and importance through llama.cpp's library: beside the walk where both can go, alone where only it can."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from bitladder.describe.cache_types import CacheTypes
from bitladder.describe.machine import Machine
from bitladder.describe.windows import Window
from bitladder.engines import llama_library
from bitladder.engines.base import Launch
from bitladder.engines.library_process import answers
from bitladder.engines.llama_library import Library, LibraryError, piece_length
from bitladder.engines.logit_scores import distribution, divergence
from bitladder.engines.messages import BadMessage, Sender, receive
from bitladder.engines.registry import start
from bitladder.errors import BadInput, BadWeights, EngineError, EngineGone, NothingFits, UnknownArchitecture
from bitladder.files import engine_package
from bitladder.files.engine_package import library_missing
from bitladder.files.gguf import GgufFile, read_header
from bitladder.formats.families import walked
from bitladder.plan.engine_need import attention_operations, engine_need, together
from bitladder.plan.preflight import require
from bitladder.records.fidelity import Way
from bitladder.stages.engine_importance import engine_importance
from bitladder.stages.engine_scores import engine_scores
from bitladder.stages.engine_way import engine_fidelities, way_for
from bitladder.stages.fidelity import fidelity, file_candidate, token_scores
from bitladder.stages.imatrix import importance_matrix
from bitladder.stages.job import Work, opened
from bitladder.stages.write_levels import quantize_levels
from bitladder.units import GiB
from engine_models import FAMILIES, N_VOCAB, write_family
from tiny_engine import write_tiny

pytestmark = pytest.mark.model


def windows_of(*lengths: int, n_vocab: int = tiny_models.N_VOCAB) -> list[Window]:
    rng = np.random.default_rng(5)
    return [Window(f"text {at // 2}", rng.integers(1, n_vocab, n)) for at, n in enumerate(lengths)]


def tiny_pair(name: str, folder: Path) -> tuple[Path, Path]:
    """A tiny model and another that differs from it by a few percent, both in 32 bits: nothing is rounded on either
    way."""
    case = tiny_models.CASES[name]
    model = tiny_models.make(case)
    source = tiny_models.write(case, model, folder / "source.gguf", tokenizer=tiny_models.with_merges)
    with tiny_models.torch.no_grad():
        generator = tiny_models.torch.Generator().manual_seed(9)
        for parameter in model.parameters():
            parameter.add_(0.02 * tiny_models.torch.randn(parameter.shape, generator=generator))
    return source, tiny_models.write(case, model, folder / "other.gguf", tokenizer=tiny_models.with_merges)


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3moe"])
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    return tiny_pair(request.param, tmp_path_factory.mktemp(request.param))


TABLED = {
    tiny_models.CASES[name].architecture: name
    for name in (
        "llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "olmo", "olmo2", "smollm3",
        "ernie4_5moe", "glm4",
    )
}  # fmt: skip
"""A case of each architecture that the walk has rows for."""


@pytest.fixture(scope="module", params=[*TABLED.values(), "mixtral"])
def every(request, tmp_path_factory) -> tuple[Path, Path]:
    return tiny_pair(request.param, tmp_path_factory.mktemp(request.param))


def test_no_family_with_rows_is_left_out():
    assert TABLED.keys() == set(walked())


def test_both_ways_give_the_same_figures(every):
    windows = windows_of(100, 90, 64, 33)
    with GgufFile.open(every[0]) as source, GgufFile.open(every[1]) as other:
        own = token_scores(source, [file_candidate(source, other)], windows)
        found = engine_scores(source, [other], windows, threads=1)
    assert own[1].kl.mean() > 0.003
    near = 10 if source.model.dims.architecture.startswith("gemma") else 1
    for ours, theirs in zip(found, own, strict=True):  # it looks GELU up in a table of 16-bit floats
        np.testing.assert_allclose(ours.nll, theirs.nll, rtol=near * 1e-4, atol=near * 1e-4)
        np.testing.assert_allclose(ours.kl, theirs.kl, rtol=near * 2e-3, atol=near * 1e-6)
        assert (ours.top1 == theirs.top1).mean() > 0.98
    one, two = (fidelity("x", scores[1], scores[0], windows) for scores in (found, own))
    for name, value in vars(one).items():
        if isinstance(value, float):
            assert value == pytest.approx(vars(two)[name], rel=near * 2e-3, abs=near * 1e-6), name


def test_the_engines_rounding_is_all_that_parts_the_ways(tmp_path):
    """The walk that rounds inputs as the engine does gives its figures of quantized levels; without that it gives
    less."""
    case = tiny_models.CASES["qwen3"]
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "max_position_embeddings": 256}
    wide = dataclasses.replace(case, keys={"attention.key_length": 64, "attention.value_length": 64})
    model = tiny_models.make(case, **sizes)
    with tiny_models.torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.25)  # of a size at which rounding is small beside what the weights lose
    path = tiny_models.write(wide, model, tmp_path / "tiny.gguf", tokenizer=tiny_models.with_merges)
    windows = windows_of(200, 200, 120)
    with GgufFile.open(path) as source:
        files = quantize_levels(source, ["Q8_0", "Q4_K_M"], tmp_path, threads=1)
        levels = [GgufFile.open(file.path) for file in files]
        candidates = [file_candidate(source, level) for level in levels]
        plain = [one.kl.mean() for one in token_scores(source, candidates, windows)[1:]]
        rounded = [one.kl.mean() for one in token_scores(source, candidates, windows, engine_rounding=True)[1:]]
        found = [one.kl.mean() for one in engine_scores(source, levels, windows, threads=1)[1:]]
    np.testing.assert_allclose(found, rounded, rtol=0.05)
    assert found[0] > 1.1 * plain[0]


def test_both_ways_gather_the_same_importance(every):
    """Within a thousandth of each channel's mean square, experts' counts equal; the last layer sees all tokens."""
    windows = windows_of(100, 90, 64, 33)
    with GgufFile.open(every[0]) as source:
        own = importance_matrix(source, windows, half=False)
        found = engine_importance(source, windows, dataset="words", threads=1)
    vectors = {name for name in own.mean_squares if name.endswith("ffn_gate_inp_shexp.weight")}
    assert found.mean_squares.keys() == own.mean_squares.keys() - vectors, "files hold those in one dimension"
    for name in found.mean_squares:
        means = own.mean_squares[name]
        np.testing.assert_array_equal(found.counts[name], own.counts[name], err_msg=name)
        np.testing.assert_allclose(found.mean_squares[name], means, rtol=1e-3, err_msg=name)
    assert (found.chunks, found.chunk_size, found.datasets) == (4, 100, ("words",))


def test_pieces_of_a_window_give_what_the_whole_gives(pair, monkeypatch):
    """Large vocabularies are computed a piece at a time, here nine tokens; the child has the same constants."""
    windows = windows_of(61, 40)
    with GgufFile.open(pair[0]) as source, GgufFile.open(pair[1]) as other:
        whole = engine_scores(source, [other], windows, threads=1)
        library = Library()
        monkeypatch.setattr(llama_library, "piece_length", lambda _: 9)
        from bitladder.engines.library_child import _scores

        models = [
            llama_library.OpenModel(library, file.path, n_ctx=61, n_vocab=tiny_models.N_VOCAB, threads=1)
            for file in (source, other)
        ]
        parts = [_scores(models, window.tokens, window.first, 0) for window in windows]
        for model in models:
            model.close()
    pieces = np.concatenate(parts, axis=2)
    np.testing.assert_allclose(pieces[1, 0], whole[1].kl, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(pieces[:, 1], [one.nll for one in whole], rtol=1e-5)
    assert piece_length(262144) == 128
    assert piece_length(32000) == 512
    assert piece_length(1 << 30) == 32


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_the_walk_does_not_know(family, tmp_path):
    """Nothing is lost against itself, more with fewer bits; importance of all that is multiplied, and it serves."""
    windows = windows_of(300, 120, 80, n_vocab=250)
    path = write_family(tmp_path / "tiny.gguf", family)
    with GgufFile.open(path) as source:
        assert way_for(source) is Way.ENGINE
        importance = engine_importance(source, windows, threads=1)
        wanted = {
            tensor.name
            for tensor in source.model.tensors
            if len(tensor.shape) > 1 and tensor.name.startswith("blk.") and tensor.qtype == "F16"
        }
        assert {name for name in wanted if "_exps.bias" not in name} <= importance.counts.keys()
        for name, counts in importance.counts.items():
            routed = "exps" in name
            assert counts.sum() == (500 * 2 if routed else 500 * len(counts)), name
        files = quantize_levels(source, ["Q8_0", "Q4_K_M"], tmp_path, threads=1, importance=importance.vectors())
    levels = [("F16", path), *((file.level, file.path) for file in files)]
    with opened(str(path), Work()) as job:
        found = list(engine_fidelities(job, path, levels, windows))
    assert [one.level for one in found] == ["F16", "Q8_0", "Q4_K_M"]
    assert {one.way for one in found} == {Way.ENGINE}
    same, q8, q4 = found
    assert (same.kl_max, same.ppl_ratio, same.top1) == (0.0, 1.0, 1.0)
    assert 0 < q8.kl_mean < q4.kl_mean / 3
    assert q8.tokens == sum(window.scored for window in windows)


def test_heads_of_latent_attention_are_kept_apart(tmp_path):
    """A head whose queries are made ten times as large weighs a hundred times as much in its own matrix alone."""
    windows = windows_of(200, n_vocab=250)
    found = []
    for factor in (1.0, 10.0):
        path = write_family(
            tmp_path / f"{factor}.gguf", "deepseek2", scaled={"blk.0.attn_q_b.weight": (64, 128, factor)}
        )
        with GgufFile.open(path) as source:
            found.append(engine_importance(source, windows, threads=1).mean_squares["blk.0.attn_k_b.weight"])
    assert found[0].shape == (4, 32)
    np.testing.assert_allclose(found[1][1] / found[0][1], 100, rtol=0.02)
    np.testing.assert_allclose(found[1][[0, 2, 3]], found[0][[0, 2, 3]], rtol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "free", "groups"),
    [
        ([4, 3, 2], 100, [(0, 3)]),  # all beside the reference of 10
        ([4, 3, 2], 22, [(0, 2), (2, 3)]),
        ([4, 3, 2], 1, [(0, 1), (1, 2), (2, 3)]),  # one at least, whatever is free
        ([], 100, []),
    ],
)
def test_as_many_levels_are_open_as_fit(sizes, free, groups):
    assert [(one.start, one.stop) for one in together(sizes, 10, 0, free)] == groups


def test_files_beyond_the_free_memory_are_not_refused_and_said():
    machine = Machine("x", 4, (), 16 * GiB, 8 * GiB, 100 * GiB)
    small = engine_need("measure Q8_0", [GiB, GiB], 0, [1e9, 1e9], machine, 4)
    large = engine_need("measure Q8_0", [20 * GiB, GiB], 0, [1e9, 1e9], machine, 4)
    assert small.ram_bytes > 2 * GiB
    assert small.what == "measure Q8_0"
    assert large.ram_bytes <= machine.ram_available
    assert "21.0 GiB of files" in large.what
    with pytest.raises(NothingFits):
        require(engine_need("measure Q8_0", [GiB, GiB], 5 * GiB, [1e9, 1e9], machine, 4), machine)


def test_attention_grows_with_the_square_of_the_context_and_with_a_cache_of_few_bits(tmp_path):
    """4 heads of 64 weights for keys and for values, 2 layers; 100 tokens see 50 before them on average."""
    model = read_header(write_tiny(tmp_path / "tiny.gguf"))
    once = attention_operations(model, [(0, 100)])
    assert once == 2 * 100 * 50 * 4 * (64 + 64) * 2
    assert attention_operations(model, [(0, 200)]) == 4 * once == attention_operations(model, [(0, 100), (100, 200)])
    assert attention_operations(model, [(0, 100)], CacheTypes("q8_0", "q8_0")) > 3 * once


# ---- what goes wrong


class Killed(Exception):
    """Stands for a kill."""


def test_a_killed_measurement_goes_on_with_the_windows_it_had(pair, tmp_path, monkeypatch):
    windows = windows_of(64, 40, 50, 33)
    monkeypatch.setattr("bitladder.files.kept_array.SECONDS_BETWEEN", 0.0)
    steps: list[float] = []

    def killed(what, done, total):
        if done == 2:
            raise Killed

    with GgufFile.open(pair[0]) as source, GgufFile.open(pair[1]) as other:
        whole = engine_scores(source, [other], windows, threads=1)
        with pytest.raises(Killed):
            engine_scores(source, [other], windows, threads=1, keep=tmp_path, progress=killed)
        assert len(list(tmp_path.iterdir())) == 1
        found = engine_scores(
            source, [other], windows, threads=1, keep=tmp_path, progress=lambda what, done, total: steps.append(done)
        )
    assert steps[0] in (1, 2)
    assert steps[0] > 0
    for one, two in zip(found, whole, strict=True):
        np.testing.assert_allclose(one.kl, two.kl, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(one.nll, two.nll, rtol=1e-6)
    assert not list(tmp_path.iterdir())


def test_killed_importance_goes_on_with_its_sums(pair, tmp_path, monkeypatch):
    windows = windows_of(*[40] * 20)
    monkeypatch.setattr("bitladder.files.kept_array.SECONDS_BETWEEN", 0.0)
    steps: list[float] = []

    def killed(what, done, total):
        if done == 2:
            raise Killed

    with GgufFile.open(pair[0]) as source:
        whole = engine_importance(source, windows, threads=1)
        with pytest.raises(Killed):
            engine_importance(source, windows, threads=1, keep=tmp_path, progress=killed)
        found = engine_importance(
            source, windows, threads=1, keep=tmp_path, progress=lambda what, done, total: steps.append(done)
        )
    assert steps[0] == 2
    for name, means in whole.mean_squares.items():
        np.testing.assert_array_equal(found.mean_squares[name], means)
    assert not list(tmp_path.iterdir())


def test_the_engines_abort_is_an_error_with_its_last_words(tmp_path):
    """A gating function that nobody has: the library aborts while it builds the graph."""
    path = write_family(tmp_path / "bad.gguf", "deepseek2", expert_gating_func=77)
    with GgufFile.open(path) as source, pytest.raises(EngineGone, match=r"SIGABRT") as error:
        engine_importance(source, windows_of(64, n_vocab=250), threads=1)
    assert "fatal error" in error.value.means or "gating" in error.value.means.lower()
    assert "bad.gguf" in error.value.found


def test_an_abort_of_the_server_says_why_and_shows_no_stack(tmp_path):
    """A debugger on the machine prints a page of frames after the words; no debugger is started."""
    path = write_family(tmp_path / "bad.gguf", "deepseek2", expert_gating_func=77)
    with pytest.raises(EngineGone, match=r"SIGABRT") as error, start(Launch(path, n_ctx=64, threads=1)):
        pytest.fail("it runs")
    assert "fatal error" in error.value.means or "gating" in error.value.means.lower()
    assert "#0" not in error.value.means


def test_a_file_that_the_engine_does_not_load(tmp_path):
    path = write_family(tmp_path / "whole.gguf", "granite")
    short = tmp_path / "short.gguf"
    short.write_bytes(path.read_bytes()[:-100_000])
    request = {"kind": "score", "files": [str(short)], "n_vocab": N_VOCAB, "windows": [[1, 2, 3]], "first": [1],
               "done": 0, "threads": 1, "caches": None}  # fmt: skip
    with pytest.raises(EngineError, match=r"did not load .*short.gguf"):
        list(answers(request, short, most=100))


def test_a_model_that_predicts_no_next_token(tmp_path):
    """An encoder's logits would be whatever lies in memory."""
    path = write_family(tmp_path / "bert.gguf", "bert")
    windows = windows_of(64, n_vocab=250)
    with GgufFile.open(path) as source:
        with pytest.raises(UnknownArchitecture, match=r"bert.gguf: .* does not predict one after another"):
            engine_importance(source, windows, threads=1)
        with pytest.raises(UnknownArchitecture, match=r"cannot measure"):
            engine_scores(source, [source], windows, threads=1)


def test_weights_that_are_not_finite(tmp_path):
    path = write_family(tmp_path / "nan.gguf", "granite", scaled={"blk.0.ffn_up.weight": (0, 1, np.nan)})
    windows = windows_of(64, n_vocab=250)
    with GgufFile.open(path) as source:
        with pytest.raises(BadWeights, match=r"predictions from .*nan.gguf are not finite"):
            engine_scores(source, [source], windows, threads=1)
        with pytest.raises(BadWeights, match=r"Activations of .*nan.gguf"):
            engine_importance(source, windows, threads=1)


def test_another_models_file_and_folders_are_refused(tmp_path):
    one, other = (write_family(tmp_path / f"{name}.gguf", name) for name in ("granite", "command-r"))
    with opened(str(one), Work()) as job:
        with pytest.raises(BadInput, match=r"is not a level of"):
            list(engine_fidelities(job, one, [("X", other)], windows_of(64)))
        with pytest.raises(BadInput, match=r"X is a folder"):
            list(engine_fidelities(job, one, [("X", tmp_path)], windows_of(64)))


def test_a_build_whose_structures_are_not_known(monkeypatch, tmp_path):
    path = write_family(tmp_path / "tiny.gguf", "gpt-oss")
    monkeypatch.setattr(engine_package, "engine_version", lambda: "2031.1.20000")
    assert "2031.1.20000" in library_missing()
    with pytest.raises(LibraryError, match=r"2031.1.20000"):
        Library()
    with GgufFile.open(path) as source:
        with pytest.raises(UnknownArchitecture, match=r"'gpt-oss', and the engine cannot measure it") as error:
            way_for(source)
        assert "known: 2026" in error.value.found
        with pytest.raises(UnknownArchitecture, match=r"^The engine cannot"):
            way_for(source, Way.ENGINE)


def test_a_library_that_says_other_defaults_than_its_header(monkeypatch):
    monkeypatch.setitem(llama_library._CONTEXT_DEFAULTS, "offload_kqv", False)
    with pytest.raises(LibraryError, match=r"offload_kqv = True"):
        Library()


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff" + bytes(8),  # a note of four gigabytes
        bytes(4) + b"\xff" * 8,  # more numbers than there are
        b"\x02\0\0\0" + bytes(8) + b"[]",
        b"\x02\0\0\0" + bytes(8) + b"{}",
        b"\x05\0\0\0" + bytes(8) + b"\xff\xfe\x00\x01\x02",
        b"\x02\0\0\0\x07\0\0\0\0\0\0\0{}1234567",  # no whole numbers
    ],
)
def test_what_is_no_message_is_refused(sent, tmp_path):
    (tmp_path / "sent").write_bytes(sent)
    with (tmp_path / "sent").open("rb") as file, pytest.raises(BadMessage):
        receive(file, 100)


def test_messages_arrive_as_they_were_sent(tmp_path):
    import os

    ours, theirs = os.pipe()
    with Sender(theirs) as sender:
        sender.send("window", np.arange(3.0))
        sender.send("refused", what="no")
    with os.fdopen(ours, "rb") as file:
        first, second, end = receive(file, 3), receive(file, 3), receive(file, 3)
    assert first is not None
    assert second is not None
    assert (first.kind, first.numbers.tolist()) == ("window", [0, 1, 2])
    assert (second.kind, second.note) == ("refused", {"what": "no"})
    assert end is None


def test_scores_of_logits_against_their_definition():
    rng = np.random.default_rng(1)
    reference, own = (rng.normal(0, 4, (40, 70)).astype(np.float32) + 300 for _ in range(2))
    targets = rng.integers(0, 70, 40)
    p, q = (np.exp(z.astype(np.float64) - 300) for z in (reference, own))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    one, two = distribution(reference, targets), distribution(own, targets)
    np.testing.assert_allclose(two.nll, -np.log(q[np.arange(40), targets]), rtol=1e-5)
    assert two.top1.tolist() == q.argmax(1).tolist()
    np.testing.assert_allclose(divergence(reference, own, one, two), (p * np.log(p / q)).sum(1), rtol=1e-4)
    assert (divergence(own, own, two, two) == 0).all()
