"""The prediction before a calibration, against sums done by hand for SmolLM2-135M."""

from dataclasses import replace

import pytest

from bitladder.levels import parse_level
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.levels.products import ImportanceVectors
from bitladder.plan.calibration import REACHED, START_SECONDS, CalibrationWork, predict
from bitladder.units import GiB

SHAPES = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip


def predicted(*names: str, tokens: int = 32768, state_bytes: int = 1 << 30, rate: float = 1e11):
    work = CalibrationWork(
        SHAPES, n_layer=30, n_embd=576, other_weights=49152 * 576, tokens=tokens, reference_tokens=16384
    )
    return predict([level(name) for name in names], work, flops_per_s=rate, state_bytes=state_bytes)


def level(name: str):
    if name == "importance":
        return ImportanceVectors()
    return parse_level(name)


def seconds(*names: str, rate: float = 1e11) -> float:
    """Without what any walk takes to start."""
    return predicted(*names, rate=rate).seconds - START_SECONDS


def test_gptq_work_is_two_passes_plus_statistics_plus_drift_plus_feedback():
    weights = 3_538_944
    statistics = 3 * 576 * (576 + 128) + 1536 * (1536 + 128)
    feedback = 576 * 576 * (576 + 192 + 192 + 576 + 1536 + 1536) + 576 * 1536 * 1536
    drift = 3 * 576 * 576 + 1536 * 1536
    expected = 30 * (32768 * (4 * weights + statistics + 2 * drift) + 5 * feedback) / (1e11 * REACHED)
    assert seconds("GPTQ-4bit-g64") == pytest.approx(expected)


def test_passes_in_bfloat16_are_counted_at_its_rate():
    work = CalibrationWork(SHAPES, n_layer=30, n_embd=576, other_weights=0, tokens=32768, reference_tokens=16384)

    def took(name: str, own: float | None) -> float:
        found = predict([level(name)], work, flops_per_s=1e11, pass_flops_per_s=own, state_bytes=1 << 30)
        return found.seconds - START_SECONDS

    assert took("GPTQ-4bit-g64", 2e11) == pytest.approx(took("GPTQ-4bit-g64", None) / 2)
    assert took("importance", 2e11) == pytest.approx(took("importance", None) / 2)
    searching = took("AWQ-4bit-g64", 1e30)  # candidates are compared in f32
    assert took("AWQ-4bit-g64", 2e11) - searching == pytest.approx((took("AWQ-4bit-g64", None) - searching) / 2)


def test_levels_add_up_as_the_walk_shares():
    one = seconds("GPTQ-4bit-g64")
    assert seconds("GPTQ-4bit-g64", "GPTQ-3bit-g64") == pytest.approx(2 * one)
    assert predicted("INT8-W8A16").seconds == 0
    few = seconds("AWQ-4bit-g64", "AWQ-4bit-g32")
    assert seconds("AWQ-4bit-g64") < few < 2 * seconds("AWQ-4bit-g64")


def test_an_importance_matrix_rides_along():
    """Alone it costs the bare pass over 16,384 tokens; beside AWQ nothing."""
    assert seconds("importance") == pytest.approx(30 * 16384 * 2 * 3_538_944 / (1e11 * REACHED))
    assert seconds("importance", "AWQ-4bit-g64") == seconds("AWQ-4bit-g64")
    assert predicted("importance").disk_bytes < 100e6


def test_packing_k_quants_is_paid_by_searching_not_by_products():
    """Three passes' worth of trials and two whole ones over 106 million weights, at 40 million a second."""
    fast = seconds("AWQ-Q3_K_M", rate=1e18)
    assert fast == pytest.approx(5 * 30 * 3_538_944 / 4e7, rel=1e-3)


def test_states_beyond_the_budget_move_from_memory_to_disk():
    inside, outside = predicted("GPTQ-4bit-g64"), predicted("GPTQ-4bit-g64", state_bytes=1 << 20)
    assert outside.ram_bytes < inside.ram_bytes - 200e6
    assert outside.disk_bytes > inside.disk_bytes + 200e6
    assert inside.ram_bytes < 1.7e9


def test_an_8b_shaped_layer_fits_4_gb():
    """Llama 3 8B, 64 windows: the layer 0.87 GB, Gram matrix and factor of 14,336 inputs 0.82 GB each; so wide an input
    is not compared with the source's."""
    attention = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
    mlp = {"gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}
    work = CalibrationWork(
        attention | mlp, n_layer=32, n_embd=4096, other_weights=0, tokens=32768, reference_tokens=16384
    )
    need = predict([parse_checkpoint("GPTQ-4bit-g64")], work, flops_per_s=1e11, state_bytes=GiB // 4).ram_bytes
    assert 3.0e9 < need < 4.0e9


@pytest.mark.parametrize(("name", "more"), [("GPTQ-4bit-g64", 2 * 1536**2), ("AWQ-4bit-g64", 3 * 576**2 + 1536**2)])
def test_sums_of_a_shard_lie_beside_those_of_the_shards_before(name, more):
    work = CalibrationWork(SHAPES, n_layer=30, n_embd=576, other_weights=0, tokens=32768, reference_tokens=16384)
    ram = [
        predict([level(name)], replace(work, shards=shards), flops_per_s=1e11, state_bytes=1 << 30).ram_bytes
        for shards in (1, 8)
    ]
    assert ram[1] - ram[0] == 4 * more
