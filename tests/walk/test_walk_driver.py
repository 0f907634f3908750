"""One layer, many passes: statistics do not depend on how windows are batched or where a pass stops."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_models
from bitladder.describe.windows import Window
from bitladder.files.gguf import GgufFile
from bitladder.progress import silent
from bitladder.records.calibration import LinearLoss
from bitladder.walk.checkpoint_walk import held_out
from bitladder.walk.driver import Builder, Member, Observer, Stream, forward
from bitladder.walk.inputs import Wants
from bitladder.walk.keep import Keep
from bitladder.walk.layer_pass import LayerPass
from bitladder.walk.layers import LayeredModel
from bitladder.walk.made import LayerOutput, losses_in_words
from bitladder.walk.states import States, batches_of
from bitladder.walk.weights import FileWeights


class Everything(Observer):
    """Statistics of all inputs of a member that passes, by layer."""

    def __init__(self, wants):
        self.wants, self.seen = wants, {}

    def reads(self, shared):
        return True

    def take(self, layer, block, seen):
        self.seen[layer] = seen


@pytest.fixture
def layer(tmp_path):
    """A model, and a function that opens a stream of it over windows in batches of some tokens, cut into shards."""
    case = tiny_models.CASES["llama"]
    path = tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")
    rng = np.random.default_rng(0)
    windows = [Window("text", rng.integers(0, tiny_models.N_VOCAB, n)) for n in (48, 48, 40, 24)]

    with GgufFile.open(path) as file:
        weights = FileWeights(file)
        model = LayeredModel(file.model, weights)

        def opened(batch_tokens: int, *members: Member, shards: int = 1, half: bool = False) -> Stream:
            batches = batches_of(windows, batch_tokens=batch_tokens)
            everyone = members or [Member(weights)]
            stream = Stream(model, everyone, batches, state_bytes=1 << 30, shards=shards, half=half)
            stream.enter()
            return stream

        yield model, opened


def gathered(passes: LayerPass, shared, original=None):
    """Statistics of an input where a pass stops."""
    return list(passes.gather(shared, original, Wants(gram=True)).statistics(0, shared, slice(None)))


def stopping(stream: Stream) -> LayerPass:
    """Passes through layer 0 that stop at each input."""
    model = stream.stages
    return LayerPass(stream, 0, model.layer(0, stream.members[0].weights), stream.groups[0].states)


def whole(opened, batch_tokens: int, wants: Wants, **options):
    """Statistics of the inputs of layer 0 in one pass."""
    stream = opened(batch_tokens, **options)
    watching = Everything(wants)
    stream.members[0].observers = [watching]
    stream.through(0)
    return watching.seen[0]


def test_passes_that_stop_see_what_one_whole_pass_sees(layer):
    model, opened = layer
    inputs = [shared for shared in model.family.inputs if shared.kind == "linear"]
    expected = whole(opened, 64, Wants(gram=True))
    passes = stopping(opened(64))
    torch.full((1 << 16,), float("nan"))  # memory that a pass must not mistake for activations
    for shared in inputs:
        [found] = gathered(passes, shared)
        [one] = expected[shared]
        assert found.tokens == one.tokens == 160
        np.testing.assert_allclose(found.gram, one.gram, rtol=1e-4, atol=1e-4)


def test_how_far_inputs_are_from_the_sources(layer):
    """A source that has 1 in every channel: (1 - X)^T X is the sum of X's rows, in every row, less X^T X."""
    model, opened = layer
    through = stopping(opened(64))
    for shared in (one for one in model.family.inputs if one.kind == "linear"):
        [seen] = gathered(stopping(opened(64)), shared)
        ones = States(opened(64).batches, len(seen.gram), spill=None)
        ones.everything.fill_(1)
        [found] = gathered(through, shared, ones)
        sums = found.drift + seen.gram
        np.testing.assert_allclose(sums, sums[:1].repeat(len(sums), axis=0), atol=1e-5 * seen.gram.max())
        assert np.ptp(sums[0]) > 0.1
        assert seen.drift.size == 0


def test_batches_change_nothing(layer):
    model, opened = layer
    few, many = stopping(opened(1 << 20)), stopping(opened(48))
    for shared in model.family.inputs:
        for one, other in zip(gathered(few, shared), gathered(many, shared), strict=True):
            np.testing.assert_allclose(one.gram, other.gram, rtol=1e-4, atol=1e-4)


def test_shards_are_added_in_their_order_whichever_was_done_first(layer, monkeypatch):
    """Bit for bit: units of a layer may be computed anywhere, in any order."""
    _, opened = layer
    compute = Stream.compute
    wants = Wants(gram=True, largest=True, held_out=frozenset({0}))

    def seen(shards: int, *, backwards: bool = False):
        if backwards:  # all units of a layer, the last one first, each handed out when it is asked for
            done = {}

            def out_of_order(self, unit, *arguments):
                if not done:
                    for shard in reversed(range(len(self.shards))):
                        done[shard] = compute(self, replace(unit, shard=shard), *arguments)
                return done.pop(unit.shard)

            monkeypatch.setattr(Stream, "compute", out_of_order)
        found = whole(opened, 48, wants, shards=shards)
        monkeypatch.setattr(Stream, "compute", compute)
        return found

    def arrays(found):
        return [
            getattr(one, name)
            for own in found.values()
            for one in own
            for name in ("gram", "largest", "squares", "held_out")
        ]

    once, first, again = seen(1), seen(3), seen(3, backwards=True)
    for own, other, plain in zip(arrays(first), arrays(again), arrays(once), strict=True):
        np.testing.assert_array_equal(own, other)
        np.testing.assert_allclose(own, plain, rtol=1e-4, atol=1e-4)
    [[plain], *_], [[sharded], *_] = once.values(), first.values()
    assert sharded.tokens == plain.tokens == 160


def test_shards_of_passes_that_stop(layer):
    model, opened = layer
    widths, together, apart = stopping(opened(48)), stopping(opened(48)), stopping(opened(48, shards=4))
    for shared in model.family.inputs:
        [seen] = gathered(widths, shared)
        ones = States(opened(48).batches, len(seen.gram), spill=None)
        ones.everything.fill_(1)
        [one], [other] = (gathered(passes, shared, ones) for passes in (together, apart))
        np.testing.assert_allclose(other.gram, one.gram, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(other.drift, one.drift, rtol=1e-4, atol=1e-4)


def test_a_builder_parts_from_the_source_and_others_do_not(layer):
    """Levels that have the same weights share states; one that is being built has its own from the first layer on."""
    _, opened = layer

    class Doubling(Builder):
        def build(self, stream, layer, states):
            states.everything.mul_(2)

    weights = opened(64).members[0].weights
    stream = opened(64, Member(weights), Doubling(weights), Member(weights))
    embedded = stream.groups[0].states.everything.clone()
    assert [group.members for group in stream.groups] == [[0, 1, 2]]
    stream.through(0)
    assert [group.members for group in stream.groups] == [[0, 2], [1]]
    torch.testing.assert_close(stream.states_of(1).everything, 2 * embedded)
    assert not torch.equal(stream.states_of(2).everything, 2 * embedded)


class Killed(Exception):
    """Stands for a kill."""


def test_a_killed_walk_keeps_what_observers_have_and_goes_on(layer, tmp_path, monkeypatch):
    model, opened = layer
    monkeypatch.setattr("bitladder.walk.keep.SECONDS_BETWEEN", 0.0)
    weights, done = opened(64).members[0].weights, []

    class Counting(Observer):
        def __init__(self):
            self.sums = np.zeros(0)

        def take(self, layer, block, seen):
            done.append(layer)
            self.sums = np.append(self.sums, layer)

        def resume(self, layers, arrays):
            self.sums = arrays.get("sums", self.sums)

        def arrays(self):
            return {"sums": self.sums}

    def walked(key, progress):
        counting = Counting()
        stream = Stream(
            model,
            [Member(weights, [counting])],
            opened(64).batches,
            state_bytes=1 << 30,
            keep=Keep(tmp_path / "kept", key),
        )
        forward([stream], progress)
        return stream, counting

    def killed(what, layer, total):
        if layer == 2:
            raise Killed

    with pytest.raises(Killed):
        walked("a", killed)
    assert done == [0, 1]
    kept = set((tmp_path / "kept").iterdir())
    assert {(file.name.split(".")[0], file.suffix) for file in kept} == {
        ("walk", ".json"), ("layer2-0", ".f32"), ("layer2", ".npz"),
    }  # fmt: skip
    another, _ = walked("b", silent)  # in the same folder, of other states
    another.finished()
    assert set((tmp_path / "kept").iterdir()) == kept
    done.clear()
    stream, counting = walked("a", silent)
    assert done == [2]
    np.testing.assert_array_equal(counting.sums, [0, 1, 2])
    stream.finished()
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("left", [b"", b"PK", None])
def test_arrays_that_are_not_whole_are_nothing_to_go_on_from(layer, tmp_path, left):
    states, folder = layer[1](64).groups[0].states, tmp_path / "kept"
    Keep(folder, "a").save(1, [([0], states)], [{"sums": np.ones(3)}])
    tokens, width = states.everything.shape
    assert Keep(folder, "a").load(tokens, width).layer == 1
    [arrays] = folder.glob("*.npz")
    if left is None:
        arrays.unlink()
    else:
        arrays.write_bytes(left)
    assert Keep(folder, "a").load(tokens, width) is None


def test_states_that_nobody_went_on_from_go(layer, tmp_path):
    states, folder = layer[1](64).groups[0].states, tmp_path / "kept"
    Keep(folder, "old").save(1, [([0], states)])
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    Keep(folder, "new").save(1, [([0], states)])
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["note", "short note", "states", "arrays", "key"])
def test_what_is_not_whole_is_not_taken(layer, tmp_path, monkeypatch, damage):
    _, opened = layer
    stream = opened(64)
    states = stream.groups[0].states
    keep = Keep(tmp_path, "key")
    keep.save(1, [([0], states)], [{"sums": np.arange(3)}])
    tokens, width = states.everything.shape
    assert keep.load(tokens, width).layer == 1
    assert keep.load(tokens + 1, width) is None
    (note,) = tmp_path.glob("walk.*.json")
    match damage:
        case "note":
            note.write_text("[1]")
        case "short note":
            note.write_text(note.read_text()[:20])
        case "states":
            next(tmp_path.glob("layer1-0.*.f32")).write_bytes(b"1234")
        case "arrays":
            arrays = next(tmp_path.glob("layer1.*.npz"))
            arrays.write_bytes(arrays.read_bytes()[:40])
        case "key":
            keep = Keep(tmp_path, "other")
    assert keep.load(tokens, width) is None


def test_progress_says_each_loss_where_they_fit():
    few = LayerOutput(losses=[LinearLoss("self_attn.q_proj", 0.0012, 9), LinearLoss("mlp.down_proj", 0.02, 9)])
    assert losses_in_words(few) == " (error: q 0.12%, down 2.00%)"
    experts = LayerOutput(losses=[LinearLoss(f"mlp.experts.{n}.up_proj", n / 1000, 9) for n in range(9)])
    assert losses_in_words(experts) == " (error up to 0.80%, up)"
    assert losses_in_words(LayerOutput(losses=[LinearLoss("mlp.up_proj", float("nan"), 0)])) == ""


def test_windows_held_out_are_summed_apart_and_in_all(layer):
    _, opened = layer
    apart, others, plain = (
        whole(opened, 64, Wants(gram=True, held_out=frozenset(places))) for places in ((0, 3), (1, 2), ())
    )
    for [one], [other], [every] in zip(apart.values(), others.values(), plain.values(), strict=True):
        np.testing.assert_allclose(one.held_out + other.held_out, every.gram, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one.gram, every.gram, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(one.squares, every.squares)
        assert every.held_out.shape == (0, 0)
        assert np.abs(one.held_out - other.held_out).max() > 1e-3


def test_whole_documents_are_held_out():
    def places(names: str) -> set[int]:
        return set(held_out([Window(name, np.arange(4)) for name in names]))

    assert places("aaaa") == {1, 3}
    assert places("aabcc") == {2, 3, 4}
    assert places("a") == places("") == set()
