"""Products in bfloat16: near enough to f32 for what GPTQ reads off a pass, and nowhere else. Products in f32 by
oneDNN: the same as torch's own up to rounding, whatever the number of threads."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn import functional

from bitladder.kernels import gptq
from bitladder.walk import products as module
from bitladder.walk.checkpoint_walk import Settings
from bitladder.walk.inputs import Sums
from bitladder.walk.products import half_products_pay, linear, one_dnn_pays, products

CPU = torch.device("cpu")


def activations(tokens: int, columns: int) -> torch.Tensor:
    """A few channels a hundred times as strong as the rest, and neighbours alike, as behind a norm."""
    noise = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))
    x = noise + 2 * noise.roll(1, dims=1)
    x[:, ::97] *= 100
    return x


def sums_of(x: torch.Tensor, *, half: bool) -> Sums:
    sums = Sums(x.shape[1], CPU, gram=True, half=half)
    for part in x.split(300):
        sums.add(part)
    return sums


@pytest.fixture
def asked(monkeypatch):
    """OneDNN is asked on every processor; counts what it is asked."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(module, "one_dnn_pays", lambda: True)
    shapes, plain = [], module._one_dnn

    def counted(x, weight, bias=None):
        shapes.append((*x.shape[:-1], *weight.shape))
        return plain(x, weight, bias)

    monkeypatch.setattr(module, "_one_dnn", counted)
    return shapes


@contextmanager
def torch_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_linear_layers_take_and_give_f32():
    rng = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(size, generator=rng) for size in ((3, 8, 512), (256, 512), (256,)))
    exact = functional.linear(x, weight, bias)
    with products(half=True):
        found = functional.linear(x, weight, bias)
        rounded = functional.linear(x, weight)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02 * float(exact.std()))
    torch.testing.assert_close(found - rounded, bias.expand_as(found), rtol=0, atol=1e-4)
    assert torch.equal(functional.linear(x, weight, bias), exact)


def test_small_matrices_stay_exact():
    x, router = torch.ones(4, 100) / 3, torch.ones(8, 100) / 7
    with products(half=True):
        assert torch.equal(functional.linear(x, router), x @ router.T)


def test_gram_matrix_is_rounded_by_less_than_the_damping():
    x = activations(1200, 384)
    exact = (x.T.double() @ x.double()).numpy()
    found = sums_of(x, half=True).result()
    error = np.linalg.norm(found.gram - exact, 2)
    assert 0 < error < 0.05 * np.diagonal(exact).mean()
    np.testing.assert_array_equal(found.gram, found.gram.T)
    np.testing.assert_allclose(found.squares, np.diagonal(exact), rtol=1e-5)
    assert found.tokens == 1200
    assert gptq.prepare(found.gram, damp=0.01).rescued == 0


def test_drift_is_rounded_in_proportion_to_what_is_not_loud():
    x = activations(1200, 384)
    original = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    exact = ((original - x).T.double() @ x.double()).numpy()
    sums = sums_of(x, half=True)
    sums.add_drift(x, original)
    error = np.abs(sums.result().drift - exact)
    assert 0 < error.max() < 0.01 * np.abs(exact[:, 1::97]).max()
    assert error[:, ::97].max() < 1e-4 * np.abs(exact).max()  # loud channels are multiplied in f32


def test_narrow_inputs_are_summed_in_f32():
    x = activations(600, 256)
    np.testing.assert_array_equal(sums_of(x, half=True).result().gram, sums_of(x, half=False).result().gram)


@pytest.mark.parametrize(
    ("features", "pays"),
    [
        ({}, False),
        ({"avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"amx_bf16": True}, True),
    ],
)
def test_only_processors_on_which_it_is_faster(monkeypatch, features, pays):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    half_products_pay.cache_clear()
    try:
        assert half_products_pay() is pays
        assert Settings().half_products is pays
        assert not Settings(device="cuda").half_products
        assert Settings(half=True).half_products
    finally:
        half_products_pay.cache_clear()


@pytest.mark.parametrize(("heads", "shared", "n"), [(6, 2, 200), (4, 4, 64), (2, 1, 1)])
def test_causal_attention_takes_and_gives_f32(heads, shared, n):
    rng = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(3, count, n, 32, generator=rng) for count in (heads, shared, shared))
    attend = functional.scaled_dot_product_attention
    exact = attend(query, key, value, is_causal=True, enable_gqa=True)
    with products(half=True):
        found = attend(query, key, value, is_causal=True, enable_gqa=True)
        scaled = attend(query, key, value, is_causal=True, enable_gqa=True, scale=0.5)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert float((found - exact).std() / exact.std()) < 0.01
    sharper = attend(query, key, value, is_causal=True, enable_gqa=True, scale=0.5)
    assert float((scaled - sharper).std() / sharper.std()) < 0.01


def test_other_attention_stays_exact():
    query = torch.randn(1, 2, 70, 32, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 70, 70).masked_fill_(torch.ones(70, 70).triu(1).bool(), float("-inf"))
    attend = functional.scaled_dot_product_attention
    with products(half=True):
        assert torch.equal(attend(query, query, query, attn_mask=mask), attend(query, query, query, mask))
        found = attend(query, query, query)
    assert torch.equal(found, attend(query, query, query))


@pytest.mark.parametrize("rows", ["straight", "strided"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_layers_by_one_dnn(asked, rows, with_bias):
    rng = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(size, generator=rng) for size in ((2, 200, 512), (320, 512), (320,)))
    bias = bias if with_bias else None
    if rows == "strided":
        x, weight = x.mT.contiguous().mT, weight.T.contiguous().T
    with torch.no_grad(), products(half=False):
        found = functional.linear(x, weight, bias)
        assert asked == [(2, 200, 320, 512)]
        assert torch.equal(functional.linear(x, weight, bias=bias), found)
        assert functional.linear(input=x, weight=weight, bias=bias).shape == found.shape
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    assert torch.equal(linear(x, weight, bias), found)


@pytest.mark.parametrize("tokens", [130, 512])
def test_products_by_one_dnn_do_not_depend_on_threads(asked, tokens):
    rng = torch.Generator().manual_seed(4)
    x, weight = (torch.randn(size, generator=rng) for size in ((tokens, 576), (1536, 576)))
    query, key, value = (torch.randn(2, heads, 300, 64, generator=rng) for heads in (6, 2, 2))
    attend, found = functional.scaled_dot_product_attention, []
    for threads in (1, 2, 3):
        with torch_threads(threads), torch.no_grad(), products(half=False):
            found.append((functional.linear(x, weight), attend(query, key, value, is_causal=True, enable_gqa=True)))
    assert asked
    for outs in found[1:]:
        assert all(torch.equal(one, first) for one, first in zip(outs, found[0], strict=True))


def test_what_one_dnn_is_not_asked(asked):
    rng = torch.Generator().manual_seed(5)
    x, weight = torch.randn(400, 512, generator=rng), torch.randn(320, 512, generator=rng)
    with products(half=False):
        functional.linear(x[:8], weight)  # too little
        functional.linear(x.double(), weight.double())
        out = functional.linear(x, weight.clone().requires_grad_())
    assert not asked
    assert out.requires_grad


@pytest.mark.parametrize(("heads", "shared", "n", "scale"), [(6, 2, 300, None), (4, 4, 256, 0.3), (2, 1, 257, None)])
def test_causal_attention_by_one_dnn(asked, heads, shared, n, scale):
    rng = torch.Generator().manual_seed(6)
    query, key, value = (
        torch.randn(3, n, count, 32, generator=rng).transpose(1, 2) for count in (heads, shared, shared)
    )
    attend = functional.scaled_dot_product_attention
    exact = attend(query, key, value, is_causal=True, enable_gqa=True, scale=scale)
    with torch.no_grad(), products(half=False):
        found = attend(query, key, value, is_causal=True, enable_gqa=True, scale=scale)
        assert asked
        asked.clear()
        short = attend(query[:, :, :200], key[:, :, :200], value[:, :, :200], is_causal=True, enable_gqa=True)
        attend(query, key, value, is_causal=False, enable_gqa=True)
    assert not asked
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    if scale is None:
        torch.testing.assert_close(short, exact[:, :, :200], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "pays"),
    [
        ({}, False),
        ({"avx2": True, "cpu_name": "Intel Xeon"}, False),
        ({"avx2": True, "avx512_f": True, "cpu_name": "AMD EPYC"}, torch._C.has_mkl),
        ({"avx2": False, "cpu_name": "AMD Opteron"}, False),
        ({"sve": True}, False),
    ],
)
def test_one_dnn_is_asked_where_torch_is_slow(monkeypatch, features, pays):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    one_dnn_pays.cache_clear()
    try:
        assert one_dnn_pays() is pays
    finally:
        one_dnn_pays.cache_clear()
