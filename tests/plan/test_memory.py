"""Memory of caches and buffers, against what llama.cpp reported (xllamacpp 2026.10.11549) for the same shapes."""

import pytest

from bitladder.describe.cache import LayerCache, cache_bytes, cache_bytes_read, layer_caches
from bitladder.describe.model import Model, ModelDims
from bitladder.describe.shapes import Shape, model_of
from bitladder.formats.families import planned
from bitladder.formats.tensors import TensorInfo
from bitladder.plan.memory import compute_buffers
from bitladder.units import MiB

SMALL = Shape("s", "llama", 6, 1024, 2048, 16, 4, 4096, 131072)
LATENT = {"kv_rank": 512, "q_rank": 768, "qk_nope": 128, "qk_rope": 64, "v_head": 128}
DEEPSEEK = Shape("d", "deepseek2", 5, 1024, 2048, 64, 64, 4096, 163840, n_expert=16, n_expert_used=2, n_ff_expert=512,
                 n_ff_shared=512, n_dense_layers=1, expert_bias=True, **LATENT)  # fmt: skip
QWEN_MOE = Shape("q", "qwen3moe", 6, 2048, 6144, 32, 4, 4096, 40960, head_dim=128, n_expert=128, n_expert_used=8,
                 n_ff_expert=768)  # fmt: skip
GPT_OSS = Shape("g", "gpt-oss", 6, 2880, 2880, 64, 8, 4096, 131072, head_dim=64, n_expert=32, n_expert_used=4,
                n_ff_expert=2880, sliding_window=128, expert_qtype="MXFP4")  # fmt: skip

COMPUTE_MIB = 0.1
"""Inputs of a graph, and a quantized cache's rotation matrices, which the prediction leaves out."""

# shape, context, cache type: KV MiB and compute MiB as the engine printed them
REPORTED = [
    (SMALL, 1024, "F16", 6.00, 23.02),
    (SMALL, 1024, "Q8_0", 3.19, 23.05),
    (Shape("s", "llama", 6, 1024, 4096, 16, 4, 4096, 131072), 1024, "F16", 6.00, 35.02),
    (Shape("s", "llama", 6, 2048, 4096, 16, 4, 4096, 131072), 1024, "F16", 12.00, 45.02),
    (Shape("s", "llama", 6, 1024, 512, 16, 16, 4096, 131072, head_dim=128), 1024, "F16", 48.00, 27.02),
    (Shape("s", "qwen3", 6, 1024, 4096, 16, 4, 4096, 131072), 4096, "F16", 24.00, 38.02),
    (Shape("s", "phi3", 6, 1024, 4096, 16, 4, 4096, 131072), 4096, "F16", 24.00, 38.02),
    (Shape("s", "gemma2", 6, 1024, 4096, 16, 4, 4096, 8192, tied=True, sliding_window=512), 4096, "F16", 15.00, 39.03),
    (Shape("s", "gemma3", 6, 1024, 4096, 16, 4, 4096, 8192, tied=True, sliding_window=512), 4096, "F16", 9.00, 39.03),
    (Shape("s", "gemma3", 6, 1024, 4096, 16, 4, 4096, 8192, tied=True, sliding_window=512), 4096, "Q8_0", 4.78, 39.09),
    (Shape("s", "llama", 6, 1024, 512, 16, 4, 4096, 8192, n_expert=16, n_expert_used=8), 1024, "F16", 6.00, 35.02),
    (Shape("s", "smollm3", 5, 512, 1024, 8, 2, 1024, 4096, tied=True), 1024, "F16", 2.50, 12.02),
    (Shape("s", "glm4", 4, 512, 1024, 8, 2, 1024, 4096, head_dim=64), 1024, "F16", 2.00, 12.02),
    (QWEN_MOE, 1024, "F16", 12.00, 89.02),
    (GPT_OSS, 1024, "F16", 10.50, 97.40),
    (GPT_OSS, 8192, "F16", 52.50, 104.40),
    (DEEPSEEK, 1024, "F16", 5.62, 179.01),
    (DEEPSEEK, 8192, "F16", 45.00, 186.01),
    (DEEPSEEK, 1024, "Q8_0", 2.99, 179.01),
]


@pytest.mark.parametrize(("shape", "n_ctx", "qtype", "kv", "compute"), REPORTED)
def test_what_the_engine_reported(shape, n_ctx, qtype, kv, compute):
    model = model_of(shape)
    cache = cache_bytes(layer_caches(model), n_ctx, type_k=qtype, type_v=qtype)
    assert cache.total / MiB == pytest.approx(kv, abs=0.01)
    assert compute_buffers(model, n_ctx).compute / MiB == pytest.approx(compute, abs=COMPUTE_MIB)


def test_slots_have_a_context_each():
    layers = layer_caches(model_of(SMALL))
    assert cache_bytes(layers, 1024, n_seq=4).total == 4 * cache_bytes(layers, 1024).total
    # reported for n_ctx 4096 in 4 slots: the mask spans one slot's cells only
    two_layers = model_of(Shape("s", "llama", 2, 1024, 2048, 16, 4, 4096, 131072))
    four = compute_buffers(two_layers, 1024, n_seq=4)
    assert four.compute == compute_buffers(two_layers, 1024).compute
    assert four.output == 4 * 4 * 4096


def hybrid(architecture, heads, **keys):
    dims = ModelDims(architecture, len(heads), 256, 512, 4, max(heads), 64, 64, 1000, 4096)
    metadata = {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    metadata[f"{architecture}.attention.head_count_kv"] = heads
    return Model("h", dims, (), metadata)


def test_hybrid_layers_keep_a_state_or_a_cache():
    model = hybrid(
        "jamba", [0, 0, 0, 2], ssm__conv_kernel=4, ssm__inner_size=512, ssm__state_size=16, ssm__group_count=0
    )
    state = 3 * 512 + 16 * 512
    assert set(layer_caches(model)) == {LayerCache(state=state, count=3), LayerCache(k_width=128, v_width=128)}
    found = cache_bytes(layer_caches(model), 1000, n_seq=2)
    assert found.state == 2 * 3 * 4 * state
    assert found.full == 2 * 1024 * 2 * 128 * 2


def test_gated_delta_nets_attend_every_fourth_layer():
    model = hybrid(
        "qwen3next", [2] * 8, ssm__conv_kernel=4, ssm__inner_size=512, ssm__state_size=64, ssm__group_count=2
    )
    del model.metadata["qwen3next.attention.head_count_kv"]
    kinds = {layer.count: layer.state > 0 for layer in layer_caches(model)}
    assert kinds == {6: True, 2: False}


def test_layers_that_share_a_cache_keep_none():
    model = hybrid("gemma3n", [2] * 10, attention__shared_kv_layers=4)
    assert sum(layer.count for layer in layer_caches(model)) == 6


def test_decoding_reads_what_is_there_and_windows_bound_it():
    layers = (LayerCache(64, 64), LayerCache(64, 64, window=100))
    assert cache_bytes_read(layers, 1000) == (1000 + 100) * 2 * 64 * 2
    assert cache_bytes_read((LayerCache(state=10, count=2),), 5) == 2 * 2 * 4 * 10


def test_every_family_has_a_shape():
    for family in planned():
        latent = LATENT if family == "deepseek2" else {}
        assert model_of(Shape("f", family, 2, 256, 512, 4, 2, 100, 1024, **latent)).elements > 0


def recurrent(architecture, wide, inner, size, groups, rank, n_ff=0, heads=(), head=64):
    """A model with layers of Mamba 2; ``heads``: of queries, of keys."""
    q, kv = heads or (0, 0)
    dims = ModelDims(architecture, 4, wide, n_ff, q, kv, head, head, 1024, 8192)
    keys = {"ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": size, "ssm.group_count": groups,
            "ssm.time_step_rank": rank, "attention.head_count_kv": [kv, 0, kv, 0] if heads else 0}  # fmt: skip
    tensors = [TensorInfo("blk.1.ssm_in.weight", (2 * inner + 2 * groups * size + rank, wide), "F16")]
    if n_ff:
        gate = architecture == "falcon-h1"
        tensors += [
            TensorInfo(f"blk.2.{name}.weight", (n_ff, wide), "F16") for name in ("ffn_up", "ffn_gate")[: 1 + gate]
        ]
    if architecture == "falcon-h1":
        del keys["attention.head_count_kv"]
    return Model("r", dims, tuple(tensors), {f"{architecture}.{key}": value for key, value in keys.items()})


# a context of 1024 tokens: compute MiB as the engine printed them
REPORTED_RECURRENT = [
    (recurrent("mamba2", 512, 1024, 64, 1, 16), 15.80),
    (recurrent("mamba2", 1024, 1024, 64, 1, 16), 18.80),
    (recurrent("mamba2", 512, 2048, 64, 1, 16), 26.31),
    (recurrent("mamba2", 512, 1024, 128, 1, 16), 16.55),
    (recurrent("mamba2", 512, 1024, 64, 2, 16), 16.82),
    (recurrent("mamba2", 512, 1024, 64, 4, 16), 18.32),
    (recurrent("mamba2", 512, 1024, 64, 8, 16), 21.06),
    (recurrent("mamba2", 512, 1024, 64, 1, 64), 15.90),
    (recurrent("mamba2", 1024, 2048, 128, 8, 32), 42.12),
    (recurrent("mamba2", 1024, 2048, 128, 4, 32), 37.14),
    (recurrent("mamba2", 2048, 4096, 128, 1, 64), 63.68),
    (recurrent("mamba2", 768, 1536, 128, 1, 24), 24.83),
    (recurrent("mamba2", 2048, 1024, 16, 1, 16), 26.10),
    (recurrent("nemotron_h", 512, 1024, 64, 1, 16, 1024, (8, 2)), 16.81),
    (recurrent("nemotron_h", 512, 1024, 64, 1, 16, 8192, (8, 2)), 22.02),
    (recurrent("nemotron_h", 512, 1024, 64, 1, 16, 16384, (8, 2)), 38.02),
    (recurrent("nemotron_h", 1024, 2048, 128, 8, 32, 4096, (16, 2)), 43.13),
    (recurrent("falcon-h1", 1024, 2048, 128, 1, 32, 3072, (16, 4)), 35.61),
]


def delta_net(wide, keys, values, size, architecture="qwen35", n_ff=256):
    """A model with gated delta nets: heads of keys and of values, and the size of each."""
    dims = ModelDims(architecture, 4, wide, n_ff, 8, 2, 64, 64, 1024, 8192)
    header = {"ssm.conv_kernel": 4, "ssm.inner_size": values * size, "ssm.state_size": size, "ssm.group_count": keys,
              "ssm.time_step_rank": values, "full_attention_interval": 4}  # fmt: skip
    name = "ssm_ba" if architecture == "qwen3next" else "ssm_beta"
    tensors = (TensorInfo(f"blk.0.{name}.weight", (values, wide), "F16"),)
    return Model("d", dims, tensors, {f"{architecture}.{key}": value for key, value in header.items()})


REPORTED_RECURRENT += [
    (delta_net(1024, 8, 16, 128), 28.02),
    (delta_net(2048, 8, 16, 128), 37.07),
    (delta_net(1024, 8, 32, 128), 37.21),
    (delta_net(1024, 16, 16, 128), 36.02),
    (delta_net(1024, 16, 32, 128), 45.21),
    (delta_net(1024, 16, 32, 64), 27.52),
    (delta_net(2048, 16, 32, 128), 55.02),
    (delta_net(1024, 4, 8, 128), 19.05),
    (delta_net(1024, 8, 16, 128, n_ff=3072), 29.02),
    (delta_net(1024, 8, 16, 128, "qwen3next"), 34.02),
]


@pytest.mark.parametrize(("model", "compute"), REPORTED_RECURRENT)
def test_what_the_engine_reported_for_layers_with_states(model, compute):
    """Which tensors lie in holes that others left is the allocator's: an eighth more at most, and never less."""
    found = compute_buffers(model, 1024).compute / MiB
    assert compute - COMPUTE_MIB <= found <= 1.13 * compute


def test_sequences_have_states_each():
    model = REPORTED_RECURRENT[0][0]
    one, four = (compute_buffers(model, 1024, n_seq=n).compute for n in (1, 4))
    assert four - one == 4 * 3 * 2 * 64 * 1024
