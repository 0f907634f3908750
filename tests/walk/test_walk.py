"""The walk's figures against their definitions on whole logits of tiny models."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from bitladder.describe.text import Document
from bitladder.describe.windows import Window, cut, text_windows, window_hashes
from bitladder.errors import BadInput, BadWeights, OutputError, UnknownLevel, UsageError
from bitladder.files.gguf import GgufFile
from bitladder.files.kept_array import KeptArray
from bitladder.formats.roles import EMBEDDING, layer_tensor
from bitladder.kernels import dequantize, quantize
from bitladder.progress import StepsOnly
from bitladder.stages.fidelity import Candidate, fidelity, file_candidate, made_candidates, token_scores, walk
from bitladder.walk.fidelity import walk_key
from bitladder.walk.head import HeadInput, TokenScores, compare
from bitladder.walk.states import batches_of
from bitladder.walk.weights import FileWeights, MadeWeights, Quantizer
from tiny_models import CASES, N_VOCAB

FAMILY = "llama"


def windows_of(*lengths: int, seed: int = 3) -> list[Window]:
    rng = np.random.default_rng(seed)
    return [Window(f"doc{at}", rng.integers(0, N_VOCAB, n)) for at, n in enumerate(lengths)]


def whole_logits(model, window: Window) -> torch.Tensor:
    """Logits of the scored positions, float64, by transformers' own full model."""
    with torch.no_grad():
        logits = model(torch.from_numpy(window.tokens[None])).logits[0].double()
    return logits[window.first : len(window.tokens) - 1]


@pytest.fixture
def pair(tmp_path: Path):
    """A tiny model, another with the same shapes, and their files."""
    case = CASES[FAMILY]
    models = [tiny_models.make(case, seed) for seed in (0, 1)]
    paths = [tiny_models.write(case, model, tmp_path / f"{at}.gguf") for at, model in enumerate(models)]
    with GgufFile.open(paths[0]) as source, GgufFile.open(paths[1]) as other:
        yield models, source, other


def test_a_walk_in_bfloat16_says_nearly_the_same(pair):
    """For weighing only: what it adds is small beside the difference of two models."""
    _, source, other = pair
    windows = windows_of(64, 64)
    exact, half = (walk(source, [file_candidate(source, other)], windows, half=half)[0] for half in (False, True))
    assert exact.kl_mean != half.kl_mean == pytest.approx(exact.kl_mean, rel=0.02)


def test_scores_equal_their_definitions_on_whole_logits(pair):
    models, source, other = pair
    windows = windows_of(40, 64, 17, 64)
    reference, level = token_scores(source, [file_candidate(source, other)], windows)
    logits = [torch.cat([whole_logits(model, window) for window in windows]) for model in models]
    targets = np.concatenate([window.tokens[window.first + 1 :] for window in windows])
    logs = [torch.log_softmax(one, dim=-1) for one in logits]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1).numpy()
    for scores, log, own in zip((reference, level), logs, logits, strict=True):
        np.testing.assert_allclose(scores.nll, -log[np.arange(len(targets)), targets].numpy(), atol=1e-4)
        np.testing.assert_array_equal(scores.top1, own.argmax(dim=-1).numpy())
    np.testing.assert_allclose(level.kl, kl, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(reference.kl, 0)
    assert kl.mean() > 0.1


def test_slices_of_the_vocabulary_and_blocks_of_tokens_change_nothing():
    rng = np.random.default_rng(0)
    states = [torch.from_numpy(rng.standard_normal((700, 16), np.float32)) for _ in range(2)]
    heads = [rng.standard_normal((101, 16), np.float32) for _ in range(2)]
    targets = rng.integers(0, 101, 700)
    inputs = [HeadInput(states[at], at, lambda rows, at=at: np.ascontiguousarray(heads[at][rows])) for at in range(2)]
    once, sliced = (compare(inputs, targets, 101, softcap=4.0, slice_rows=rows)[1] for rows in (101, 7))
    np.testing.assert_allclose(sliced.kl, once.kl, rtol=1e-5)
    np.testing.assert_allclose(sliced.nll, once.nll, rtol=1e-5)
    np.testing.assert_array_equal(sliced.top1, once.top1)


def test_the_source_itself_loses_nothing(pair):
    _, source, _ = pair
    (same,) = walk(source, [Candidate("same", FileWeights(source))], windows_of(64, 64))
    assert (same.kl_mean, same.kl_max, same.ppl_ratio, same.top1) == (0, 0, 1, 1)
    assert (same.kl_low, same.kl_high) == (0, 0)


def test_made_levels_use_the_kernels_bytes(pair, monkeypatch):
    """Every matrix in Q8_0 on the fly equals a walk over weights quantized and restored beforehand."""
    _, source, _ = pair
    qtypes = {info.name: "Q8_0" for info in source.model.tensors if info.elements > 64}
    windows = windows_of(48, 33)
    made = Candidate("Q8_0", MadeWeights(Quantizer(FileWeights(source)), qtypes))

    class Restored(FileWeights):
        def __call__(self, name, rows=None):
            weights = super().__call__(name, rows)
            if name not in qtypes:
                return weights
            return dequantize(quantize(weights.reshape(-1, weights.shape[-1]), "Q8_0"), "Q8_0").reshape(weights.shape)

        def identity(self, name):
            return "restored", name

    one, two = token_scores(source, [made, Candidate("again", Restored(source))], windows)[1:]
    np.testing.assert_allclose(one.kl, two.kl, atol=1e-6)
    assert 0 < one.kl.mean() < 0.1


def test_levels_that_agree_share_their_work(pair, monkeypatch):
    """A tensor is quantized once per qtype, and a level that differs late runs early layers with the
    others."""
    _, source, _ = pair
    quantizer = Quantizer(FileWeights(source))
    late = {layer_tensor(2, "ffn_up.weight"): "Q8_0"}
    early = {layer_tensor(0, "ffn_up.weight"): "Q8_0"}
    calls = []
    monkeypatch.setattr(
        "bitladder.walk.weights.quantize",
        lambda weights, qtype, **options: calls.append(qtype) or quantize(weights, qtype, **options),
    )
    runs = []
    from bitladder.walk.layers import LayeredModel

    run = LayeredModel.run
    monkeypatch.setattr(
        LayeredModel,
        "run",
        lambda self, block, layer, states: runs.append(layer) or run(self, block, layer, states),
    )
    candidates = [
        Candidate(name, MadeWeights(quantizer, qtypes))
        for name, qtypes in (("a", late), ("b", early), ("c", late), ("d", early | late))
    ]
    result = walk(source, candidates, windows_of(32))
    assert runs == [0, 0, 1, 1, 2, 2, 2, 2]
    assert len(calls) == 2
    assert result[0].kl_mean == result[2].kl_mean != result[1].kl_mean


def test_padding_and_spilling_change_nothing(pair, tmp_path: Path):
    _, source, other = pair
    windows = windows_of(64, 57, 60, 20, 64)
    assert any(len(set(batch.lengths)) > 1 for batch in batches_of(windows))
    candidates = [file_candidate(source, other)]
    together = token_scores(source, candidates, windows, state_bytes=0, spill=tmp_path)[1]
    apart = TokenScores.joined([token_scores(source, candidates, [window])[1] for window in windows])
    np.testing.assert_allclose(together.kl, apart.kl, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(together.top1, apart.top1)
    assert not list(tmp_path.glob("tmp*")), "the spill has no name in the folder"


def test_no_room_to_spill_is_said_before_the_walk(pair, tmp_path: Path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match=r"No room for .* of hidden states .*No space left"):
        walk(pair[1], [], windows_of(64), state_bytes=0, spill=tmp_path)


def test_damaged_weights_name_their_tensor(tmp_path: Path):
    model = tiny_models.make(CASES[FAMILY])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 7] = float("nan")
    path = tiny_models.write(CASES[FAMILY], model, tmp_path / "nan.gguf")
    with (
        GgufFile.open(path) as source,
        pytest.raises(BadWeights, match=r"'blk\.1\.ffn_up\.weight' holds nan at row 5, column 7"),
    ):
        walk(source, [], windows_of(32))


def test_a_reference_whose_predictions_overflow_is_damaged(tmp_path: Path):
    model = tiny_models.make(CASES[FAMILY])
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_(3e38)
    path = tiny_models.write(CASES[FAMILY], model, tmp_path / "loud.gguf")
    with (
        GgufFile.open(path) as source,
        pytest.raises(BadWeights, match=r"predictions of .* are not finite") as refused,
    ):
        walk(source, [], windows_of(32))
    assert "damaged" in refused.value.means and refused.value.do


def test_file_of_another_model_is_refused(pair, tmp_path: Path):
    _, source, _ = pair
    model = tiny_models.make(CASES[FAMILY], intermediate_size=128)
    path = tiny_models.write(CASES[FAMILY], model, tmp_path / "wide.gguf")
    with (
        GgufFile.open(path) as file,
        pytest.raises(BadInput, match=r"9 tensors differ.*ffn_down.*\(64, 96\) there.*\(64, 128\)"),
    ):
        file_candidate(source, file)


def test_unknown_level(pair):
    with pytest.raises(UnknownLevel):
        made_candidates(pair[1], ["Q4_K_XXL"])


def test_token_ids_outside_the_vocabulary(pair):
    with pytest.raises(BadInput, match="token id 96, the model's vocabulary has 96"):
        walk(pair[1], [], [Window("a", np.full(32, N_VOCAB))])


def test_text_too_short_says_both_numbers(pair):
    documents = [Document("a", "x" * 10), Document("b", "y" * 63)]
    with pytest.raises(BadInput, match=r"2 document\(s\), the longest of 63 tokens; at least 64"):
        text_windows(documents, lambda text: [1] * len(text), pair[1].model)


def test_windows_start_with_bos_where_the_tokenizer_adds_one(pair):
    model = pair[1].model
    model.metadata["tokenizer.ggml.bos_token_id"] = 1
    document = [Document("a", "z" * 200)]
    with_bos = text_windows(document, lambda text: [1, *[9] * len(text)], model, n=80)
    without = text_windows(document, lambda text: [9] * len(text), model, n=80)
    assert [window.tokens[0] for window in with_bos] == [1, 1]
    assert [window.tokens[0] for window in without] == [9, 9]


def test_cutting():
    windows = cut([("a", range(1100)), ("b", range(63)), ("c", range(64))])
    assert [(window.document, len(window.tokens), int(window.tokens[0])) for window in windows] == [
        ("a", 512, 0),
        ("a", 512, 512),
        ("a", 76, 1024),
        ("c", 64, 0),
    ]
    # llama.cpp scores n - 1 - n / 2 predictions of a window
    assert [window.scored for window in windows] == [255, 255, 37, 31]


def test_overlap_of_texts_shows_in_their_hashes():
    one, two = windows_of(512, 512)
    mixed = Window("mixed", np.concatenate([two.tokens[:100], one.tokens[160:320]]))
    assert not window_hashes([one]) & window_hashes([two])
    assert window_hashes([two]) & window_hashes([mixed])


def scores_by_hand(kl: list[float], nll: list[float], top1: list[int]) -> TokenScores:
    return TokenScores(np.array(kl), np.array(nll), np.array(top1))


def test_fidelity_of_a_few_tokens_by_hand():
    windows = [
        Window("a", np.zeros(4, np.int64)),
        Window("b", np.zeros(6, np.int64)),
    ]  # 1 and 2 scored tokens
    reference = scores_by_hand([0, 0, 0], [1.0, 2.0, 3.0], [5, 6, 7])
    level = scores_by_hand([0.1, 0.4, 0.1], [1.5, 2.0, 3.1], [5, 0, 7])
    found = fidelity("x", level, reference, windows)
    assert (found.tokens, found.units, found.unit) == (3, 2, "document")
    assert found.kl_mean == pytest.approx(0.2)
    assert (found.kl_median, found.kl_p99, found.kl_max) == (0.1, 0.4, 0.4)
    assert found.ppl == pytest.approx(np.exp(6.6 / 3))
    assert found.ppl_ratio == pytest.approx(np.exp(0.6 / 3))
    assert found.top1 == pytest.approx(2 / 3)
    assert found.kl_low < found.kl_mean < found.kl_high


def test_one_window_has_no_interval():
    windows = [Window("a", np.zeros(6, np.int64))]
    scores = scores_by_hand([0.1, 0.2], [1.0, 2.0], [1, 2])
    found = fidelity("x", scores, scores, windows)
    assert found.unit == "window"
    assert np.isnan([found.kl_low, found.kl_high, found.kl_p99_low, found.top1_low, found.ppl_ratio_high]).all()


class Killed(Exception):
    """Stands for a kill."""


def test_a_killed_walk_goes_on_at_the_layer_it_kept(pair, tmp_path: Path, monkeypatch):
    _, source, other = pair
    windows, keep = windows_of(64, 40), tmp_path / "kept"
    candidates = [file_candidate(source, other), *late_and_early(source)]
    expected = token_scores(source, candidates, windows)
    monkeypatch.setattr("bitladder.walk.keep.SECONDS_BETWEEN", 0.0)

    def die_at_the_last_layer(what, done, total):
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        token_scores(source, candidates, windows, progress=StepsOnly(die_at_the_last_layer), keep=keep)
    assert {file.suffix for file in keep.iterdir()} == {".json", ".f32"}
    told = []
    found = token_scores(source, candidates, windows, keep=keep, progress=StepsOnly(lambda *step: told.append(step[0])))
    assert told[0] == "walk: layer 3 of 3"
    for one, same in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.kl, same.kl)
        np.testing.assert_array_equal(one.nll, same.nll)
    assert not list(keep.iterdir())


def late_and_early(source: GgufFile) -> list[Candidate]:
    quantizer = Quantizer(FileWeights(source))
    return [
        Candidate(str(layer), MadeWeights(quantizer, {layer_tensor(layer, "ffn_up.weight"): "Q8_0"}))
        for layer in (0, 2)
    ]


def test_states_of_another_walk_are_not_taken(pair, tmp_path: Path):
    """Another text, or another level, has another key."""
    _, source, other = pair
    one, two = windows_of(64, seed=1), windows_of(64, seed=2)
    weights = [FileWeights(source), FileWeights(other)]
    names = [tensor.name for tensor in source.model.tensors]
    keys = {
        walk_key(models, names, [window.tokens.tobytes() for window in windows])
        for models in (weights, weights[:1], weights[::-1])
        for windows in (one, two, one + two)
    }
    assert len(keys) == 9


def test_two_quantizers_with_equal_settings_share_their_work(pair):
    _, source, _ = pair
    made = [
        MadeWeights(Quantizer(FileWeights(source), effort=effort), {EMBEDDING: "Q8_0"})
        for effort in ("good", "good", "fast")
    ]
    assert made[0].identity(EMBEDDING) == made[1].identity(EMBEDDING) != made[2].identity(EMBEDDING)


def test_a_walk_on_another_device_finds_the_same(pair):
    """Torch's CPU under a name of its own takes the way of other devices: their twins of the kernels."""
    _, source, _ = pair
    with pytest.raises(UsageError, match="torch has no device 'cuda:99' here; there is cpu"):
        walk(source, [], windows_of(64), device="cuda:99")
    found = [
        walk(source, made_candidates(source, ["Q8_0", "Q4_0"], device=device), windows_of(64, 40), device=device)
        for device in ("cpu", "cpu:0")
    ]
    assert found[0] == found[1]


def kept(folder: Path, name: str = "left") -> KeptArray:
    return KeptArray(folder / name, "a reference and its text", dtype=np.float32)


class TestRemembered:
    """What a reference has at the head, left for walks of other levels over the same text."""

    def run_layers(self, monkeypatch):
        from bitladder.walk.layers import LayeredModel

        runs, run = [], LayeredModel.run
        monkeypatch.setattr(
            LayeredModel,
            "run",
            lambda self, block, layer, states: runs.append(layer) or run(self, block, layer, states),
        )
        return runs

    def test_a_later_walk_takes_the_levels_alone_and_says_the_same(self, pair, tmp_path, monkeypatch):
        _, source, other = pair
        windows = windows_of(64, 40, 17)
        level, quantizer = file_candidate(source, other), Quantizer(FileWeights(source))
        made = Candidate("made", MadeWeights(quantizer, {layer_tensor(0, "ffn_up.weight"): "Q8_0"}))
        alone = token_scores(source, [made, level], windows)
        runs = self.run_layers(monkeypatch)
        first = token_scores(source, [made], windows, remember=kept(tmp_path))
        both, n = len(runs), source.model.dims.n_layer
        then = token_scores(source, [level], windows, remember=kept(tmp_path))
        assert both == 2 * n * len(batches_of(windows)) == 2 * (len(runs) - both)
        for one, two in zip((first[0], first[1], then[0], then[1]), (*alone[:2], alone[0], alone[2]), strict=True):
            np.testing.assert_allclose(one.kl, two.kl, atol=1e-6)
            np.testing.assert_allclose(one.nll, two.nll, rtol=1e-6)
            np.testing.assert_array_equal(one.top1, two.top1)
        (same,) = walk(source, [Candidate("same", FileWeights(source))], windows, remember=kept(tmp_path))
        assert (same.kl_max, same.top1) == (0, 1)

    @pytest.mark.parametrize("damage", ["cut", "values", "type"])
    def test_what_is_damaged_is_not_taken(self, pair, tmp_path, damage):
        _, source, other = pair
        level = file_candidate(source, other)
        expected = token_scores(source, [level], windows_of(40, 64), remember=kept(tmp_path))[1]
        (left,) = (tmp_path / "left").iterdir()
        found = np.load(left)
        if damage == "cut":
            left.write_bytes(left.read_bytes()[:-9])
        else:
            np.save(left, found.astype(np.float64) if damage == "type" else found * np.nan)
        again = token_scores(source, [level], windows_of(40, 64), remember=kept(tmp_path))[1]
        np.testing.assert_array_equal(again.kl, expected.kl)
        np.testing.assert_array_equal(np.load(left), found)  # whole again

    def test_nothing_is_left_where_it_is_too_much_or_there_is_no_room(self, pair, tmp_path, monkeypatch):
        _, source, other = pair
        level, windows = file_candidate(source, other), windows_of(40)
        monkeypatch.setattr("bitladder.walk.fidelity._REMEMBERED_BYTES", 100)
        token_scores(source, [level], windows, remember=kept(tmp_path, "folder"))
        assert not (tmp_path / "folder").exists()
        monkeypatch.undo()
        (tmp_path / "folder").write_text("a file")
        assert token_scores(source, [level], windows, remember=kept(tmp_path, "folder"))[1].kl.mean() > 0
