"""Pieces of a pass in threads of their own: what they give, how many run at a time, and what is left after an error."""

import threading
import time
import weakref

import numpy as np
import pytest
import torch

import tiny_models
from bitladder.describe.windows import Window
from bitladder.files.gguf import GgufFile
from bitladder.formats.roles import layer_tensor
from bitladder.stages.fidelity import Candidate, file_candidate, token_scores
from bitladder.walk import driver
from bitladder.walk.layers import LayeredModel
from bitladder.walk.side_by_side import side_by_side
from bitladder.walk.weights import FileWeights, MadeWeights, Quantizer


@pytest.fixture
def threads():
    """Torch with three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.fixture
def pair(tmp_path):
    case = tiny_models.CASES["llama"]
    paths = [tiny_models.write(case, tiny_models.make(case, seed), tmp_path / f"{seed}.gguf") for seed in (0, 1)]
    with GgufFile.open(paths[0]) as source, GgufFile.open(paths[1]) as other:
        yield source, other


def ladder(source, other):
    """Levels that part from one another in different layers, and one of another file."""
    quantizer = Quantizer(FileWeights(source))
    late, early = ({layer_tensor(layer, "ffn_up.weight"): "Q8_0"} for layer in (2, 0))
    made = [
        Candidate(name, MadeWeights(quantizer, one)) for name, one in (("a", late), ("b", early), ("c", early | late))
    ]
    return [*made, file_candidate(source, other)]


def text():
    rng = np.random.default_rng(3)
    return [
        Window(f"doc{at}", rng.integers(0, tiny_models.N_VOCAB, n)) for at, n in enumerate((64, 57, 60, 20, 64, 41))
    ]


@pytest.mark.parametrize("state_bytes", [1 << 30, 0])
def test_a_walk_side_by_side_gives_the_same_to_the_last_bit(pair, threads, monkeypatch, tmp_path, state_bytes):
    monkeypatch.setattr("bitladder.walk.fidelity.CALIBRATION_TOKENS", 64)
    monkeypatch.setattr("bitladder.walk.head._TOKENS", 16)
    where, run = set(), LayeredModel.run

    def noted(self, block, layer, states):
        where.add(threading.get_ident())
        assert torch.get_num_threads() == (1 if threading.current_thread() is not threading.main_thread() else 3)
        time.sleep(0.002)
        return run(self, block, layer, states)

    monkeypatch.setattr(LayeredModel, "run", noted)
    beside = token_scores(pair[0], ladder(*pair), text(), state_bytes=state_bytes, spill=tmp_path)
    assert len(where) >= 3 and torch.get_num_threads() == threads
    monkeypatch.setattr(LayeredModel, "run", run)
    torch.set_num_threads(1)
    alone = [token_scores(pair[0], [one], text())[1] for one in ladder(*pair)]
    for one, two in zip(beside[1:], alone, strict=True):
        for name in ("kl", "nll", "top1"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_large_layers_are_held_one_at_a_time(pair, threads, monkeypatch):
    monkeypatch.setattr("bitladder.walk.fidelity.CALIBRATION_TOKENS", 64)
    monkeypatch.setattr(driver, "_HELD_BYTES", 1)
    alive, load = weakref.WeakSet(), driver.Member.load
    most = []

    def noted(self, stages, layer):
        block = load(self, stages, layer)
        alive.add(block)
        most.append(len(alive))
        return block

    monkeypatch.setattr(driver.Member, "load", noted)
    token_scores(pair[0], ladder(*pair), text())
    assert set(most) == {1}
    monkeypatch.setattr(driver, "_HELD_BYTES", 1 << 30)
    monkeypatch.setattr(LayeredModel, "run", lambda _self, _block, _layer, states: time.sleep(0.01) or states)
    most.clear()
    token_scores(pair[0], ladder(*pair), text())
    assert max(most) > 1


@pytest.mark.parametrize(
    ("pieces", "most", "workers", "each"), [(9, None, 3, 1), (2, None, 2, 1), (9, 1, 1, 3), (4, None, 1, 3)]
)
def test_threads_are_shared_out(threads, pieces, most, workers, each):
    seen = []

    def work(piece):
        time.sleep(0.01)
        seen.append((piece, threading.get_ident(), torch.get_num_threads()))

    side_by_side(work, range(pieces), most=most)
    assert sorted(piece for piece, _, _ in seen) == list(range(pieces))
    assert len({ident for _, ident, _ in seen}) == workers
    assert {count for _, _, count in seen} == {each}
    assert torch.get_num_threads() == threads


def test_no_thread_waits_for_a_large_piece(threads):
    seen = []
    for sizes in ([1024, 268], [512, 512, 500], [1024, 1024, 268] * 20):
        seen.clear()
        side_by_side(lambda _: (time.sleep(0.005), seen.append(threading.get_ident())), sizes, sizes=sizes)
        assert (len(set(seen)) > 1) == (sizes[0] == 512 or len(sizes) > 3)


def test_the_first_error_ends_the_work(threads):
    begun = []

    def work(piece):
        begun.append(piece)
        time.sleep(0.01)
        if piece >= 4:
            raise ValueError(piece)

    with pytest.raises(ValueError, match="4"):
        side_by_side(work, range(100))
    assert len(begun) < 20
    assert torch.get_num_threads() == threads
    side_by_side(work, [])
