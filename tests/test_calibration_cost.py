"""The prediction before a calibration, against sums done by hand for SmolLM2-135M."""

import pytest

from bitladder.formats.checkpoint import parse_level
from bitladder.plan.calibration import predict

SHAPES = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip


def predicted(*names: str, tokens: int = 32768, state_bytes: int = 1 << 30, rate: float = 1e11):
    return predict(
        [parse_level(name) for name in names],
        SHAPES,
        n_layer=30, n_embd=576, other_weights=49152 * 576, tokens=tokens, reference_tokens=16384,
        flops_per_s=rate, state_bytes=state_bytes,
    )  # fmt: skip


def test_gptq_work_is_forward_plus_statistics_plus_feedback():
    weights = 3_538_944
    statistics = 3 * 576 * 1088 + 1536 * 2048
    feedback = 576 * 576 * (576 + 192 + 192 + 576 + 1536 + 1536) + 576 * 1536 * 1536
    expected = 30 * (32768 * (2 * weights + statistics) + feedback) / 1e11
    assert predicted("GPTQ-4bit-g64").seconds == pytest.approx(expected)


def test_levels_add_up_as_the_walk_shares():
    one = predicted("GPTQ-4bit-g64").seconds
    assert predicted("GPTQ-4bit-g64", "GPTQ-3bit-g64").seconds == pytest.approx(2 * one)
    assert predicted("INT8-W8A16").seconds == 0
    few = predicted("AWQ-4bit-g64", "AWQ-4bit-g32").seconds
    assert predicted("AWQ-4bit-g64").seconds < few < 2 * predicted("AWQ-4bit-g64").seconds


def test_states_beyond_the_budget_move_from_memory_to_disk():
    inside, outside = predicted("GPTQ-4bit-g64"), predicted("GPTQ-4bit-g64", state_bytes=1 << 20)
    assert outside.ram_bytes < inside.ram_bytes - 200e6
    assert outside.disk_bytes > inside.disk_bytes + 200e6
    assert inside.ram_bytes < 1.5e9
