"""Importance matrices against what transformers' own full model feeds its linear layers."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import tiny_models
from bitladder.describe.windows import Window
from bitladder.errors import BadInput, BadWeights
from bitladder.files.gguf import GgufFile
from bitladder.files.imatrix import read_imatrix, write_imatrix
from bitladder.stages.imatrix import importance_matrix
from tiny_models import CASES, N_VOCAB


def windows_of(*lengths: int) -> list[Window]:
    rng = np.random.default_rng(5)
    return [Window(f"doc{at}", rng.integers(0, N_VOCAB, n)) for at, n in enumerate(lengths)]


def squares_of_linears(model, architecture: str, windows: list[Window]) -> dict[str, np.ndarray]:
    """Mean squared input of every nn.Linear of the whole model, window by window, by GGUF name."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    sums: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            target = names.get_name(path + ".weight", try_suffixes=(".weight",))

            def add(_, arguments, target=target):
                x = arguments[0].double().reshape(-1, arguments[0].shape[-1])
                sums[target] = sums.get(target, 0) + (x**2).sum(dim=0)

            module.register_forward_pre_hook(add)
    with torch.no_grad():
        for window in windows:
            model(torch.from_numpy(window.tokens[None]))
    tokens = sum(len(window.tokens) for window in windows)
    return {name: (total / tokens).numpy() for name, total in sums.items()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3", "olmo2", "qwen2moe", "smollm3", "ernie4_5moe"])
def test_means_equal_those_of_the_whole_model(name: str, tmp_path: Path):
    case = CASES[name]
    model = tiny_models.make(case)
    windows = windows_of(32, 29, 17)  # 29 is padded beside 32
    with GgufFile.open(tiny_models.write(case, model, tmp_path / "tiny.gguf")) as source:
        found = importance_matrix(source, windows, half=False)
    expected = squares_of_linears(model, case.architecture, windows)
    assert len(expected) >= 4 * model.config.num_hidden_layers
    for tensor, means in expected.items():
        np.testing.assert_allclose(found.mean_squares[tensor][0], means, rtol=1e-4, err_msg=tensor)
        assert found.counts[tensor].tolist() == [78]


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "ernie4_5moe"])
def test_experts_count_the_tokens_routed_to_them(name: str, tmp_path: Path):
    case = CASES[name]
    model = tiny_models.make(case)
    windows = windows_of(24, 24)
    with GgufFile.open(tiny_models.write(case, model, tmp_path / "tiny.gguf")) as source:
        found = importance_matrix(source, windows, half=False)
    calls = []
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, arguments: calls.append([one.clone() for one in arguments[:2]]))
    with torch.no_grad():
        for window in windows:
            model(torch.from_numpy(window.tokens[None]))
    for expert in range(4):
        rows = [x[at].double() for x, chosen in calls for at in range(len(x)) if expert in chosen[at].tolist()]
        if not rows:
            assert found.counts["blk.1.ffn_up_exps.weight"][expert] == 0
            continue
        gate, up = (torch.stack(rows).float() @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
        inner = (experts.act_fn(gate) * up).detach()
        for role, x in (("gate", torch.stack(rows)), ("up", torch.stack(rows)), ("down", inner)):
            tensor = f"blk.1.ffn_{role}_exps.weight"
            assert found.counts[tensor][expert] == len(rows)
            np.testing.assert_allclose(found.mean_squares[tensor][expert], (x**2).mean(dim=0), rtol=1e-4)
    assert found.counts["blk.1.ffn_up_exps.weight"].sum() == 2 * 48
    assert found.counts["blk.1.ffn_gate_inp.weight"].tolist() == [48]


def test_experts_that_no_token_reached_stay_neutral(tmp_path: Path):
    case = CASES["mixtral"]
    model = tiny_models.make(case)
    with torch.no_grad():
        # An embedding of ones gives every token the same router input; experts 2 and 3 then never win.
        model.model.layers[0].mlp.gate.weight.zero_()
        model.model.layers[0].mlp.gate.weight[:2] = 1.0
        model.model.layers[0].post_attention_layernorm.weight.zero_()
    with GgufFile.open(tiny_models.write(case, model, tmp_path / "tiny.gguf")) as source:
        found = importance_matrix(source, windows_of(16))
    counts = found.counts["blk.0.ffn_down_exps.weight"]
    assert (counts == 0).sum() == 2
    assert (found.mean_squares["blk.0.ffn_down_exps.weight"][counts == 0] == 1).all()


def test_file_round_trip(tmp_path: Path):
    case = CASES["mixtral"]
    with GgufFile.open(tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")) as source:
        found = importance_matrix(source, windows_of(32, 32), dataset="own words")
    write_imatrix(tmp_path / "imatrix.gguf", found)
    again = read_imatrix(tmp_path / "imatrix.gguf")
    assert (again.chunks, again.chunk_size, again.datasets) == (2, 32, ("own words",))
    for name, means in found.mean_squares.items():
        np.testing.assert_allclose(again.mean_squares[name], means, rtol=1e-6)


def test_no_text(tmp_path: Path):
    case = CASES["llama"]
    with (
        GgufFile.open(tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")) as source,
        pytest.raises(BadInput, match=r"no token windows"),
    ):
        importance_matrix(source, [])


def test_overflowing_activations_name_their_layer(tmp_path: Path):
    case = CASES["llama"]
    model = tiny_models.make(case)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight *= 1e38
    with (
        GgufFile.open(tiny_models.write(case, model, tmp_path / "tiny.gguf")) as source,
        pytest.raises(BadWeights, match=r"inputs of self_attn\.\w+ in layer 1 are not finite"),
    ):
        importance_matrix(source, windows_of(16))


def test_products_in_bfloat16_move_means_little(tmp_path: Path):
    """Half a percent says what a channel weighs as well; what is rounded the other way is a defect."""
    case = CASES["llama"]
    with GgufFile.open(tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")) as source:
        exact, half = (importance_matrix(source, windows_of(32, 32), half=half).vectors() for half in (False, True))
    moved = np.concatenate([(half[name] / exact[name] - 1).ravel() for name in exact])
    assert 0 < np.abs(moved).max() < 0.2
    assert np.median(np.abs(moved)) < 0.005


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_killed_walk_goes_on_with_what_it_had_gathered(name: str, tmp_path: Path, monkeypatch):
    case = CASES[name]
    path = tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")
    monkeypatch.setattr("bitladder.walk.keep.SECONDS_BETWEEN", 0.0)
    keep, steps = tmp_path / "kept", []

    def killed(what, done, total):
        if done == 2:
            raise Killed

    with GgufFile.open(path) as source:
        whole = importance_matrix(source, windows_of(32, 40))
        with pytest.raises(Killed):
            importance_matrix(source, windows_of(32, 40), keep=keep, progress=killed)
        found = importance_matrix(source, windows_of(32, 40), keep=keep, progress=lambda what, *_: steps.append(what))
        with pytest.raises(Killed):
            importance_matrix(source, windows_of(32, 40), keep=keep, progress=killed)
        others: list[str] = []
        importance_matrix(source, windows_of(32, 39), keep=keep, progress=lambda what, *_: others.append(what))
        assert list(keep.iterdir()), "what another walk left is its own"
        importance_matrix(source, windows_of(32, 40), keep=keep)
    assert others[0] == "importance: layer 1 of 3", "another text begins anew"
    assert steps[0] == "importance: layer 3 of 3"
    assert found.mean_squares.keys() == whole.mean_squares.keys()
    for tensor, means in whole.mean_squares.items():
        np.testing.assert_array_equal(found.mean_squares[tensor], means)
        np.testing.assert_array_equal(found.counts[tensor], whole.counts[tensor])
    assert not list(keep.iterdir())
