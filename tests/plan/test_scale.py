"""What long jobs take on many workers: sums by hand for a small layer, and what must hold of large models."""

import json

import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.describe.shapes import Shape, model_of
from bitladder.files.catalogue import model_named
from bitladder.plan.calibration import REACHED, START_SECONDS
from bitladder.plan.scale import ScaleJob, Workers, cpu_workers, gpu_workers, layer_phases, scale_cost, spread_seconds

D, F, KV = 512, 1536, 128
SMALL = model_of(Shape("s", "llama", 3, D, F, 8, 2, 1000, 4096), tensors=True)
TRILLION = Shape(
    "t", "deepseek2", 61, 7168, 18432, 64, 64, 163840, 131072, n_expert=384, n_expert_used=8, n_ff_expert=2048,
    n_ff_shared=2048, n_dense_layers=1, q_rank=1536, kv_rank=512, qk_nope=128, qk_rope=64, v_head=128,
)  # fmt: skip


def one(**more) -> Workers:
    given = {"flops": 1e11, "memory_bytes": 1 << 40, "weights_bytes": 4, "host_flops": 1e11, "is_gpu": False} | more
    return Workers("w", 1, 1, disk=1e30, **given)


def test_gptq_of_a_small_model_by_hand():
    matrices = [(D, D), (KV, D), (KV, D), (D, D), (F, D), (F, D), (D, F)]
    forward = sum(2 * rows * columns for rows, columns in matrices)
    sums = sum(columns * (columns + 128) + 2 * columns**2 for columns in (D, D, D, F))  # q, k, v read one, gate and up
    codes = sum(5 * rows * columns**2 + 2 / 3 * columns**3 for rows, columns in matrices)  # each a unit with a factor
    expected = 3 * (32768 * (2 * forward + sums) + codes)  # the level's pass and the source's
    found = scale_cost(SMALL, ScaleJob.GPTQ, one())
    assert found.flops == pytest.approx(expected)
    assert found.seconds - START_SECONDS == pytest.approx(expected / (REACHED * 1e11))
    assert found.moved_bytes == 0
    assert found.low_s < found.seconds < found.high_s


def test_inputs_too_wide_to_be_compared_are_not():
    wide = model_of(Shape("w", "llama", 1, D, 12288, 8, 2, 1000, 4096), tensors=True)
    matrices = [(D, D), (KV, D), (KV, D), (D, D), (12288, D), (12288, D), (D, 12288)]
    forward = sum(2 * rows * columns for rows, columns in matrices)
    sums = 3 * (D * (D + 128) + 2 * D**2) + 12288 * (12288 + 128)
    codes = sum(5 * rows * columns**2 + 2 / 3 * columns**3 for rows, columns in matrices)
    codes -= 4 * D * 12288**2
    assert scale_cost(wide, ScaleJob.GPTQ, one()).flops == pytest.approx(32768 * (2 * forward + sums) + codes)


def test_workers_share_what_can_be_shared_until_the_shards_run_out():
    costs = {count: scale_cost(SMALL, ScaleJob.GPTQ, Workers("w", count, 1, 1e9, 1 << 40, 4, host_flops=1e9,
             network=1e30, disk=1e30, is_gpu=False)) for count in (1, 2, 4, 8, 64)}  # fmt: skip
    matrices = [(D, D), (KV, D), (KV, D), (D, D), (F, D), (F, D), (D, F)]
    codes = [(5 * rows * columns**2 + 2 / 3 * columns**3) / (REACHED * 1e9) for rows, columns in matrices]
    source = [4096 * sum(2 * rows * columns for rows, columns in matrices) / (REACHED * 1e9)] * 8
    last = {count: spread_seconds([codes[6], *source], count) for count in costs}  # beside each other
    alone = max(codes[:3]) + codes[3] + codes[4]  # what a worker for each matrix would take
    two = alone + max(0, 2 * codes[1] - codes[0])  # key and value follow one another beside query
    before = {1: sum(codes[:6]), 2: two, 4: alone, 8: alone, 64: alone}
    apart = {count: 3 * (before[count] + last[count]) for count in costs}
    shared = [cost.seconds - START_SECONDS - apart[count] for count, cost in costs.items()]
    for count, seconds in zip(costs, shared, strict=True):
        assert seconds == pytest.approx(shared[0] / min(count, 8))
    assert [cost.busy for cost in costs.values()] == [1, 2, 4, 8, 8]
    assert costs[8].waiting_share > costs[1].waiting_share
    assert costs[8].moved_bytes == costs[64].moved_bytes > costs[2].moved_bytes > 0


@pytest.mark.parametrize("job", ScaleJob)
def test_large_models_take_more_of_everything(job):
    models = [model_named(name).whole() for name in (
        "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-405B-Instruct",
    )]  # fmt: skip
    (gpu, *_) = gpu_workers("H100 SXM", 989.5, 80)
    costs = [scale_cost(model, job, gpu) for model in models]
    for name in ("flops", "memory_bytes", "disk_bytes", "seconds", "moved_bytes"):
        values = [getattr(cost, name) for cost in costs]
        assert values == sorted(values) and values[0] > 0, name


def test_a_trillion_of_weights_in_a_mixture_computes_like_its_active_ones_and_moves_all():
    model = model_of(TRILLION, tensors=True)
    assert sum(tensor.elements for tensor in model.tensors) == pytest.approx(1.03e12, rel=0.02)
    dense = model_named("meta-llama/Llama-3.1-405B-Instruct").whole()
    (gpu, *_) = gpu_workers("H100 SXM", 989.5, 80)
    ours, theirs = (scale_cost(one_, ScaleJob.CALIBRATE, gpu) for one_ in (model, dense))
    assert ours.flops < 0.2 * theirs.flops
    assert ours.moved_bytes > 2 * theirs.moved_bytes
    held = scale_cost(model, ScaleJob.GPTQ, gpu, tokens=16384).memory_bytes - ours.memory_bytes
    assert held < (18432**2 * 4 + (256 << 20))  # of the widest input, or of some experts, and not of 384 at once


@pytest.mark.parametrize("job", [ScaleJob.GPTQ, ScaleJob.CALIBRATE])
def test_phases_are_what_a_layer_costs(job):
    cost = scale_cost(SMALL, job, one(), tokens=16384)
    phases = [
        unit for layer in range(3) for phase in layer_phases(SMALL, layer, job, one(), tokens=16384) for unit in phase
    ]
    assert sum(phases) == pytest.approx(cost.seconds - START_SECONDS)
    assert len(phases) == 3 * (6 * 4 + 7 if job is ScaleJob.GPTQ else 4)


def test_units_go_to_whoever_is_free():
    assert spread_seconds([3, 1, 1, 1], 2) == 3
    assert spread_seconds([2, 2, 2], 2) == 4
    assert spread_seconds([1, 2], 8) == 2
    assert spread_seconds([], 8) == 0


def test_machines_without_gpus():
    costs = [scale_cost(SMALL, ScaleJob.CALIBRATE, workers) for workers in cpu_workers("x", 8, 2e11, 1 << 34)]
    assert [cost.count for cost in costs] == [1, 2, 8, 32]
    assert costs[0].moved_bytes == 0 and all(cost.fits for cost in costs)


def test_the_verb():
    runner = CliRunner()
    done = runner.invoke(app, ["plan", "Llama-3.1-8B-Instruct", "--job", "gptq"])
    assert done.exit_code == 0, done.output
    assert "32 nodes of 8 H100 SXM" in done.stdout and "factor of 2" in done.stdout
    done = runner.invoke(
        app, ["plan", "Llama-3.1-8B-Instruct", "--job", "run", "--as", "2x RTX 3090 + 64 GiB", "--json"]
    )
    assert json.loads(done.stdout)[0]["workers"] == "1 GPU RTX 3090"
    done = runner.invoke(app, ["plan", "Llama-3.1-8B-Instruct", "--job", "run", "--as", "16 GB laptop"])
    assert done.exit_code == 0 and "32 machines" in done.stdout, done.output
    for wrong in (["plan", "--job", "gptq"], ["plan", "Llama-3.1-8B-Instruct", "--job", "nonsense"]):
        assert runner.invoke(app, wrong).exit_code == 2
