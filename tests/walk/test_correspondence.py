"""How tensors are made of parameters is read off their values, whatever moved them."""

import numpy as np
import pytest

from bitladder.walk.correspondence import correspond

_RNG = np.random.default_rng(0)


def noise(*shape):
    return _RNG.standard_normal(shape).astype(np.float32)


def heads_moved(weight):
    """Halves of each head interleaved, as llama.cpp stores them for some families."""
    return weight.reshape(4, 2, 4, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


Q, K, STACK, LATENT, FUSED = noise(32, 24), noise(16, 24), noise(5, 20, 12), noise(4 * 14, 10), noise(48, 24)
_KEYS = LATENT.reshape(4, 14, 10)
CASES = {
    "as it is": ({"q": Q}, {"a": Q}),
    "rows moved": ({"q": Q}, {"a": heads_moved(Q)}),
    "a bias moved with its matrix": (
        {"q.weight": Q, "q.bias": Q[:, 0].round()},
        {"a.weight": heads_moved(Q), "a.bias": heads_moved(Q[:, 0].round())},
    ),
    "one tensor of two": ({"q": Q, "k": K}, {"a": np.concatenate([Q, K])}),
    "two tensors of one": ({"qk": FUSED}, {"a": FUSED[:32], "b": FUSED[32:]}),
    "stacked experts apart": ({"up": STACK}, {"a": STACK[:, :10], "b": STACK[:, 10:]}),
    "every other row, turned": (
        {"up": STACK.swapaxes(1, 2).copy()},
        {"a": STACK[:, ::2].copy(), "b": STACK[:, 1::2].copy()},
    ),
    "turned": ({"c": Q}, {"a": Q.T.copy()}),
    "half of it turned": (
        {"kv": LATENT},
        {"a": _KEYS[:, :6].swapaxes(1, 2).copy(), "b": _KEYS[:, 6:].copy()},
    ),
    "columns moved": ({"o": Q}, {"a": Q[:, ::-1].copy()}),
    "rows and columns moved": ({"o": Q}, {"a": heads_moved(Q)[:, np.random.default_rng(1).permutation(24)]}),
    "an axis of one more": ({"conv": noise(32, 1, 4)}, {}),
    "a norm and one": ({"n": Q[0]}, {"a": Q[0] + np.float32(1)}),
    "a decay": ({"A_log": Q[0]}, {"a": -np.exp(Q[0])[:, None]}),
    "a decay, moved": ({"A_log": Q[0]}, {"a": -np.exp(Q[0])[::-1].copy()}),
    "equal rows": ({"q": np.repeat(Q[:4], 8, 0)}, {"a": np.repeat(Q[:4], 8, 0)[::-1].copy()}),
    "zeros": ({"b": np.zeros(8, np.float32)}, {"a": np.zeros(8, np.float32)}),
}
CASES["an axis of one more"] = (
    CASES["an axis of one more"][0],
    {"a": CASES["an axis of one more"][0]["conv"].squeeze(1)},
)


@pytest.mark.parametrize("name", CASES)
def test_parameters_come_back_from_tensors_and_tensors_from_parameters(name):
    parameters, tensors = CASES[name]
    found = correspond(parameters, tensors)
    assert set(found) == set(parameters)
    pieces = {other: np.zeros(value.shape, np.float32) for other, value in tensors.items()}
    for path, (names, layout) in found.items():
        made = layout.parameter([tensors[one] for one in names])
        np.testing.assert_allclose(made, parameters[path], rtol=1e-5)
        for number, one in enumerate(names):
            pieces[one] += layout.tensor(number, parameters[path])
    for one, value in pieces.items():
        np.testing.assert_allclose(value, tensors[one], rtol=1e-5)


def test_what_changed_is_not_found():
    """Another model's tensors, and those with one value changed, belong to nothing."""
    other = Q.copy()
    other[3, 4] += 1e-3
    assert correspond({"q": Q}, {"a": other}) == {}
    assert correspond({"q": Q, "k": K}, {"a": noise(48, 24)}) == {}
    assert correspond({"n": Q[0]}, {"a": Q[0] * 2}) == {}


def test_equal_values_go_where_names_say():
    """Norms of ones tell nothing by themselves."""
    ones = np.ones(8, np.float32)
    found = correspond(
        {"first": ones, "second": ones}, {"a": ones, "b": ones}, likely={"first": "b", "second": "a"}
    )  # fmt: skip
    assert {path: names for path, (names, _) in found.items()} == {"first": ("b",), "second": ("a",)}


def test_rows_are_found_in_what_a_type_can_hold():
    """A checkpoint in f32 whose file was written in F16."""
    stored = heads_moved(Q).astype(np.float16).astype(np.float32)
    found = correspond(
        {"q": Q}, {"a": stored}, rounded=lambda value, _: value.astype(np.float16).astype(np.float32)
    )  # fmt: skip
    _, layout = found["q"]
    np.testing.assert_array_equal(layout.parameter([stored]), Q.astype(np.float16).astype(np.float32))


def test_layouts_that_do_the_same_are_equal():
    """Layers of one kind share a row."""
    one, two, other = (
        correspond({"q": value}, {"a": moved(value)})["q"][1]
        for value, moved in ((noise(32, 24), heads_moved), (noise(32, 24), heads_moved), (noise(32, 24), np.flipud))
    )
    assert one == two and hash(one) == hash(two) and one != other
