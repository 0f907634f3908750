import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from bitladder.describe.machine import Gpu, Machine
from bitladder.describe.rates import from_data_sheet
from bitladder.describe.shapes import Shape, model_of
from bitladder.errors import UnknownLevel, UsageError
from bitladder.files.gguf import GgufFile, read_header
from bitladder.files.level_files import draft_level
from bitladder.formats.recipes import LEVELS
from bitladder.levels import RecipeLevel, parse_level, parse_levels
from bitladder.plan.cost import LevelBytes, checkpoint_levels, level_size
from bitladder.plan.ladder import make_plan
from bitladder.plan.pair import plan_pair
from bitladder.plan.placement import RAM_MARGIN, VRAM_MARGIN, Usage, place
from bitladder.plan.search import MachineRates
from bitladder.plan.speed import PoolShare, anchor_factor, computed_share, decode_seconds, predict, prefill_seconds
from bitladder.records import to_json
from bitladder.stages.write_levels import quantize_levels
from bitladder.units import GiB, MiB

LLAMA_8B = Shape("l", "llama", 32, 4096, 14336, 32, 8, 128256, 131072, rope_factors=64)
LLAMA_70B = Shape("l", "llama", 80, 8192, 28672, 64, 8, 128256, 131072, rope_factors=64)
MIXTRAL = Shape("m", "llama", 32, 4096, 14336, 32, 8, 32000, 32768, n_expert=8, n_expert_used=2)
RATES = from_data_sheet(5e10, 1e12, gpu=False)


def machine(ram=64, *vram, used=2.0):
    gpus = tuple(Gpu(f"gpu{number}", int(size * GiB), int(size * GiB)) for number, size in enumerate(vram))
    return Machine("cpu", 8, (), int(ram * GiB), int((ram - used) * GiB), 1 << 40, gpus)


def size_of(shape, level):
    model = model_of(shape)
    return model, level_size(model, parse_level(level)).by_part


def test_the_ladder_of_a_file_is_what_the_writer_writes(demo_gguf, tmp_path):
    with GgufFile.open(demo_gguf) as source:
        planned = {row.level: row for row in make_plan(source.model, machine(), n_ctx=512).levels}
        assert set(planned) == set(LEVELS)
        written = quantize_levels(source, ["Q8_0"], tmp_path, effort="fast", threads=2)
    assert written[0].path.stat().st_size == planned["Q8_0"].file_bytes
    sizes = [row.file_bytes for row in planned.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_engines_of_checkpoints_get_a_ladder_of_checkpoints():
    """Sizes by hand: a code of 4 bits, 16 bits of scale and 4 of zero point for 128 weights, the rest in 16 bits."""
    model = model_of(LLAMA_8B)
    assert [str(level) for level in checkpoint_levels(model)] == [
        "F16", "FP8-DYNAMIC", "INT8-W8A8", "GPTQ-4bit-g128", "AWQ-4bit-g128",
    ]  # fmt: skip
    small = replace(LLAMA_8B, n_embd=576, n_ff=1536, n_head=9, n_head_kv=3)
    assert checkpoint_levels(model_of(small))[-1].name == "AWQ-4bit-g64"
    packed = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * 128256 * 4096 + 65 * 4096 + 64
    found = make_plan(model, machine(64, 8), levels=checkpoint_levels(model), whole=True)
    rows = {row.level: row for row in found.levels}
    assert rows["AWQ-4bit-g128"].tensor_bytes == packed * (4 + 20 / 128) / 8 + 2 * rest
    assert [level for level, row in rows.items() if row.fits] == ["GPTQ-4bit-g128", "AWQ-4bit-g128"]
    assert "do not split" in rows["INT8-W8A8"].reason  # llama.cpp would split it: there is RAM enough
    whole = make_plan(model, machine(64), levels=parse_levels(["AWQ-4bit-g128"])).levels[0]
    assert (whole.fits, whole.placement) == (True, "cpu")


def test_mlx_lm_gets_a_ladder_of_its_folders():
    """Sizes by hand: a code of 4 bits and two numbers of 16 for 64 weights, embedding and head among them; norms in 16
    bits."""
    model = model_of(LLAMA_8B)
    levels = checkpoint_levels(model, "mlx-lm")
    assert [str(level) for level in levels][-4:] == ["MLX-8bit-g64", "MLX-6bit-g64", "MLX-5bit-g64", "MLX-4bit-g64"]
    assert not {level.name for level in checkpoint_levels(model, "vllm")} & {level.name for level in levels[-4:]}
    packed = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 2 * 128256 * 4096
    size = level_size(model, levels[-1])
    assert size.tensor_bytes == packed * 4.5 / 8 + 2 * (65 * 4096 + 64)
    assert size.on_label_share == 1.0
    small = replace(LLAMA_8B, n_embd=480, n_ff=1536, n_head=10, n_head_kv=5)
    assert checkpoint_levels(model_of(small), "mlx-lm")[-1].name == "MLX-4bit-g32"


def test_a_header_with_a_hole_for_weights_is_enough(demo_gguf, tmp_path):
    model = read_header(demo_gguf)
    part = draft_level(model, "F16", tmp_path).parts[0]
    with part.path.open("wb") as file:
        file.write(part.header("0" * 64))
        file.truncate(part.plan.size)
    assert part.path.stat().st_blocks * 512 < 8 * MiB
    plan = make_plan(read_header(part.path), machine())
    assert all(row.fits for row in plan.levels)
    json.dumps(to_json(plan))


def test_planning_loads_no_heavy_package(demo_gguf):
    code = (
        "import sys; from pathlib import Path\n"
        "from bitladder.files.gguf import read_header\nfrom bitladder.files.probe import probe_machine\n"
        "from bitladder.plan.ladder import make_plan\nfrom bitladder.stages.search import just_out_of_reach\n"
        "from bitladder.files.describe_source import describe\n"
        f"make_plan(read_header(Path({str(demo_gguf)!r})), probe_machine())\n"
        "print([name for name in ('torch', 'numba', 'transformers', 'scipy', 'xllamacpp', 'sqlalchemy') if name in "
        "sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_searching_the_catalogue_loads_neither_an_engine_nor_arrays():
    code = (
        "import sys, contextlib, io\nfrom bitladder.cli.app import app\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    app(['plan', '--as', 'RTX 4090 + 64 GiB', '--json'], standalone_mode=False)\n"
        "assert 'Llama' in out.getvalue()\n"
        "heavy = ('torch', 'numba', 'scipy', 'numpy', 'httpx', 'transformers', 'xllamacpp', 'sqlalchemy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("shape", "levels", "low", "high"),
    [
        (LLAMA_70B, ["F16"], 138, 143),
        (LLAMA_70B, ["Q8_0"], 70, 76),
        (LLAMA_70B, ["Q4_K_M", "Q4_K_S"], 35, 43),
        (LLAMA_70B, ["Q2_K"], 17.5, 26.5),
    ],
)
def test_a_70b_takes_what_the_field_says(shape, levels, low, high):
    """In GB (1e9 bytes). The field's rule is parameters times bits / 8; real files are a little above it, since scales
    take
    bits too and recipes keep some tensors larger: Q2_K is 2.99 bits per weight, not 2."""
    for level in levels:
        assert low <= size_of(shape, level)[1].total / 1e9 <= high


@pytest.mark.parametrize(
    ("shape", "low", "high"),
    [
        (Shape("7b", "llama", 32, 4096, 11008, 32, 32, 32000, 4096), 4, 6),
        (Shape("13b", "llama", 40, 5120, 13824, 40, 40, 32000, 4096), 8, 10),
    ],
)
def test_a_7b_and_a_13b_at_4_bits_run_in_16_gb_beside_the_system(shape, low, high):
    model, size = size_of(shape, "Q4_K_M")
    placement = place(model, size, machine(16, used=3.0), Usage(2048))
    assert placement.kind == "cpu"
    assert low <= (placement.weight_bytes + placement.kv_bytes) / 1e9 <= high


def test_a_70b_at_4_bits_on_a_24_gb_gpu_is_split():
    model, size = size_of(LLAMA_70B, "Q4_K_M")
    assert place(model, size, machine(8, 24), Usage(4096)).kind == "none"
    split = place(model, size, machine(64, 24), Usage(4096))
    assert split.kind == "split"
    assert 30 <= split.n_gpu_layers < 80
    assert split.vram_bytes <= 24 * GiB - VRAM_MARGIN
    assert place(model, size, machine(64, 24, 24), Usage(4096)).kind == "gpu"


def test_mistral_large_at_4_bits_needs_about_68_gib_of_weights():
    shape = Shape("large", "llama", 88, 12288, 28672, 96, 8, 32768, 131072)
    assert size_of(shape, "Q4_K_M")[1].total / GiB == pytest.approx(68, abs=0.5)


def test_experts_leave_the_gpu_first():
    model, size = size_of(MIXTRAL, "Q4_K_M")
    placement = place(model, size, machine(64, 12), Usage(4096))
    assert placement.kind == "experts in RAM"
    assert placement.n_gpu_layers == 33
    fewer = place(model, size, machine(64, 16), Usage(4096))
    assert 0 < fewer.n_cpu_experts < placement.n_cpu_experts
    assert placement.vram_bytes + 0.5 * size.of("experts") / 32 > 12 * GiB - VRAM_MARGIN - size.of("experts") / 32


def test_what_is_placed_is_all_there_is():
    """Weights and cache are neither lost nor counted twice, wherever they go."""
    model, size = size_of(LLAMA_8B, "Q4_K_M")
    whole = size.total + place(model, size, machine(64), Usage(4096)).kv_bytes
    for ram, vram in ((64, ()), (64, (4,)), (64, (24,))):
        placement = place(model, size, machine(ram, *vram), Usage(4096))
        beside = placement.total_bytes - whole
        assert 0 < beside < 2 * placement.compute_bytes + 150 * MiB, placement


def test_experts_in_ram_are_counted_there():
    model, size = size_of(MIXTRAL, "Q4_K_M")
    whole = size.total + place(model, size, machine(64), Usage(4096)).kv_bytes
    placement = place(model, size, machine(64, 12), Usage(4096))
    assert placement.ram_bytes > size.of("experts") * placement.n_cpu_experts / 32
    beside = placement.total_bytes - whole
    assert 0 < beside < 2 * placement.compute_bytes + 150 * MiB


def test_unified_memory_is_counted_once():
    mac = Machine("M", 8, (), 16 * GiB, 12 * GiB, 1 << 40, (Gpu("M", 12 * GiB, 12 * GiB),), unified=True)
    model, size = size_of(LLAMA_8B, "Q8_0")
    assert place(model, size, mac, Usage(4096)).kind == "cpu"
    assert place(*size_of(LLAMA_8B, "F16"), mac, Usage(4096)).kind == "none"


def test_a_level_that_would_fit_if_other_programs_closed_says_so():
    model = model_of(LLAMA_8B)
    busy = Machine("cpu", 8, (), 16 * GiB, 3 * GiB, 1 << 40)
    rows = {row.level: row for row in make_plan(model, busy, levels=parse_levels(["F16", "Q4_K_M"])).levels}
    assert "if other programs gave their memory back" in rows["Q4_K_M"].reason
    assert "more than can be used" in rows["F16"].reason
    assert "other programs" not in rows["F16"].reason


def test_a_quantized_cache_and_slots_change_the_need():
    model, size = size_of(LLAMA_8B, "Q4_K_M")
    plain = place(model, size, machine(), Usage(8192))
    assert plain.kv_bytes == 8192 * 32 * 2 * 1024 * 2
    eight = place(model, size, machine(), Usage(8192, type_k="Q8_0", type_v="Q8_0"))
    assert eight.kv_bytes * 32 == plain.kv_bytes * 17
    assert place(model, size, machine(), Usage(8192, n_seq=3)).kv_bytes == 3 * plain.kv_bytes


@pytest.mark.parametrize(("n_ctx", "match"), [(0, "is none"), (-5, "is none"), (200000, "was trained for 131072")])
def test_contexts_that_cannot_be(n_ctx, match):
    with pytest.raises(UsageError, match=match):
        make_plan(model_of(LLAMA_8B), machine(), n_ctx=n_ctx)


def test_levels_that_do_not_exist():
    with pytest.raises(UnknownLevel, match="Q4_K_M"):
        make_plan(model_of(LLAMA_8B), machine(), levels=parse_levels(["Q4_K_N"]))


@pytest.mark.parametrize(
    "wrong",
    [
        Machine("cpu", 0, (), GiB, GiB, GiB),
        Machine("cpu", 1, (), 0, 0, GiB),
        Machine("cpu", 1, (), GiB, 2 * GiB, GiB),
        Machine("cpu", 1, (), GiB, GiB, GiB, (Gpu("g", GiB, 2 * GiB),)),
    ],
)
def test_machines_that_cannot_be(wrong):
    with pytest.raises(UsageError, match="no such machine"):
        make_plan(model_of(LLAMA_8B), wrong)


class TestSpeed:
    def test_decoding_touches_the_output_but_one_row_of_the_embedding(self):
        model, size = size_of(LLAMA_8B, "Q8_0")
        plan = make_plan(model, machine(), levels=parse_levels(["Q8_0"]), n_ctx=512, rates=MachineRates(RATES))
        touched = size.total - size.of("embedding")
        ideal = 0.75 * 5e10 / touched
        assert plan.levels[0].speed.decode.value == pytest.approx(ideal, rel=0.02)
        assert plan.levels[0].speed.decode.binds == "reading weights"

    def test_a_tied_embedding_is_the_output(self):
        shape = Shape("t", "llama", 2, 256, 512, 4, 4, 32000, 2048, tied=True)
        size = size_of(shape, "Q8_0")[1]
        assert size.tied
        assert size.head["Q8_0"] == size.of("embedding")

    def test_a_mixture_touches_its_active_experts(self):
        _, size = size_of(MIXTRAL, "Q4_K_M")
        speed = {}
        for used in (2, 8):
            shape = Shape("m", "llama", 32, 4096, 14336, 32, 8, 32000, 32768, n_expert=8, n_expert_used=used)
            plan = make_plan(model_of(shape), machine(), levels=parse_levels(["Q4_K_M"]), rates=MachineRates(RATES))
            speed[used] = plan.levels[0].speed.decode.value
        rest = size.total - size.of("experts") - size.of("embedding")
        expected = (rest + size.of("experts")) / (rest + size.of("experts") / 4)
        assert speed[2] / speed[8] == pytest.approx(expected, rel=0.1)

    def test_context_slows_decoding_and_a_window_bounds_it(self):
        model = model_of(LLAMA_8B)
        share = (PoolShare(RATES, {"Q8_0": 1e9}, {"Q8_0": 1e9}, 32, 1.0),)
        step = decode_seconds(share, model, 2000) - decode_seconds(share, model, 1000)
        assert step == pytest.approx(1000 * 32 * 2 * 1024 * 2 / RATES.kv_stream)
        windowed = model_of(Shape("g", "gemma3", 6, 1024, 4096, 16, 4, 4096, 8192, tied=True, sliding_window=512))
        step = decode_seconds(share, windowed, 8000) - decode_seconds(share, windowed, 4000)
        assert step == pytest.approx(4000 * 1 * 2 * 256 * 2 / RATES.kv_stream)

    def test_heads_that_share_a_cache_still_work_each(self):
        model = model_of(LLAMA_8B)  # 32 heads on 8
        share = PoolShare(replace(RATES, heads_stream=RATES.kv_stream), {"F16": 1e9}, {"F16": 1e9}, 32, 1.0)
        step = decode_seconds((share,), model, 2000) - decode_seconds((share,), model, 1000)
        assert step == pytest.approx(1000 * 32 * 2 * 4096 * 2 / RATES.kv_stream)

    def test_rows_cost_beyond_their_bytes(self):
        model = model_of(LLAMA_8B)
        layer_rows = 4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096
        layer_weights = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
        used, head = {"F16": 2.0 * (32 * layer_weights + 128256 * 4096)}, {"F16": 2.0 * 128256 * 4096}
        plain, slow = (
            decode_seconds((PoolShare(rates, used, used, 32, 1.0, head),), model, 0)
            for rates in (RATES, replace(RATES, row_s={"F16": 1e-8}))
        )
        assert slow - plain == pytest.approx(1e-8 * (32 * layer_rows + 128256))

    def test_of_a_prompt_only_the_last_token_meets_the_output_matrix(self):
        model = model_of(LLAMA_8B)
        used, head = {"F16": 1.6e10}, {"F16": 1e9}
        with_head = prefill_seconds((PoolShare(RATES, used, used, 32, 1.0, head),), model, 512)
        without = prefill_seconds((PoolShare(RATES, {"F16": 1.5e10}, {"F16": 1.5e10}, 32, 1.0),), model, 512)
        assert with_head - without == pytest.approx(1e9 / RATES.stream_of("F16"))

    def test_the_last_layers_feeding_is_computed_once(self):
        attention, feeding = 4096 * (2 * 4096 + 2 * 1024), 3 * 4096 * 14336
        assert computed_share(model_of(LLAMA_8B).dims) == pytest.approx(1 - feeding / (attention + feeding) / 32)

    def test_noise_widens_a_range_downward_only(self):
        model = model_of(LLAMA_8B)
        share = PoolShare(RATES, {"F16": 1e10}, {"F16": 1e10}, 32, 1.0)
        calm = predict((share,), model, n_prompt=100, n_past=0)
        noisy = predict((replace(share, rates=replace(RATES, noise=1.5)),), model, n_prompt=100, n_past=0)
        assert noisy.decode.high == calm.decode.high
        assert noisy.decode.low == pytest.approx(calm.decode.low / 1.5)
        assert noisy.first_token.low == pytest.approx(calm.first_token.low)
        assert noisy.first_token.high == pytest.approx(1.5 * calm.first_token.high)

    def test_long_prompts_bind_on_arithmetic_short_ones_on_reading(self):
        model = model_of(LLAMA_8B)
        share = (PoolShare(RATES, {"F16": 1.6e10}, {"F16": 1.6e10}, 32, 1.0),)
        assert prefill_seconds(share, model, 1) >= 1.6e10 / RATES.stream_of("F16")
        assert prefill_seconds(share, model, 512) >= 0.97 * 2 * 8e9 * 512 / RATES.matmul_of("F16")

    def test_ranges_narrow_with_what_is_known(self):
        model = model_of(LLAMA_8B)
        share = PoolShare(RATES, {"F16": 1e10}, {"F16": 1e10}, 32, 1.0)
        here = replace(share, rates=replace(RATES, source="measured"))
        guesses = [
            predict((share,), model, n_prompt=100, n_past=0).decode,
            predict((here,), model, n_prompt=100, n_past=0).decode,
            predict((here,), model, n_prompt=100, n_past=0, anchor=0.8).decode,
        ]
        assert [guess.label for guess in guesses] == ["assumed", "derived", "measured"]
        widths = [guess.high / guess.low for guess in guesses]
        assert widths == sorted(widths, reverse=True)
        assert guesses[2].value == pytest.approx(0.8 * guesses[1].value)

    def test_anchors_are_the_median_ratio(self):
        assert anchor_factor([10, 10, 10], [8, 9, 100]) == pytest.approx(0.9)
        assert anchor_factor([], []) == 0
        assert anchor_factor([0], [5]) == 0

    def test_a_run_on_one_level_corrects_the_others(self):
        model, rates = model_of(LLAMA_8B), MachineRates(RATES)
        plain = make_plan(model, machine(), levels=parse_levels(["Q8_0", "Q4_K_M"]), n_ctx=512, rates=rates)
        slow = {RecipeLevel("Q8_0"): 0.5 * plain.levels[0].speed.decode.value}
        known = make_plan(model, machine(), levels=parse_levels(["Q8_0", "Q4_K_M"]), n_ctx=512, rates=rates, runs=slow)
        for before, after in zip(plain.levels, known.levels, strict=True):
            assert after.speed.decode.value == pytest.approx(0.5 * before.speed.decode.value, rel=1e-6)
            assert after.speed.decode.label == "measured"

    def test_a_split_model_is_slower_than_one_on_the_gpu(self):
        model = model_of(LLAMA_70B)
        rates = MachineRates(RATES, from_data_sheet(1e12, 1e14, gpu=True))
        speeds = [
            make_plan(model, machine(64, *vram), levels=parse_levels(["Q4_K_M"]), rates=rates)
            .levels[0]
            .speed.decode.value
            for vram in ((), (24,), (48,))
        ]
        assert speeds == sorted(speeds)
        assert speeds[2] > 8 * speeds[0]


class TestPair:
    def test_both_stay_when_they_fit(self):
        model, quality = size_of(LLAMA_8B, "Q8_0")
        speed = size_of(LLAMA_8B, "Q4_K_M")[1]
        plan = plan_pair(model, quality, speed, machine(32), Usage(4096))
        assert plan.resident
        assert plan.swap_s == 0
        assert plan.quality.kv_bytes == plan.speed.kv_bytes > 0

    def test_the_speed_tier_gets_the_gpu(self):
        model, quality = size_of(LLAMA_8B, "Q8_0")
        plan = plan_pair(model, quality, size_of(LLAMA_8B, "Q4_K_M")[1], machine(32, 8), Usage(4096))
        assert (plan.speed.kind, plan.quality.kind) == ("gpu", "split")

    def test_else_they_swap_and_the_time_is_told(self):
        model, quality = size_of(LLAMA_8B, "Q8_0")
        plan = plan_pair(model, quality, size_of(LLAMA_8B, "Q4_K_M")[1], machine(13), Usage(4096), disk_read=1e9)
        assert not plan.resident
        assert plan.swap_s == pytest.approx(1 + quality.total / 1e9)
        assert "one at a time" in plan.reason

    def test_a_tier_that_does_not_fit_alone(self):
        model, quality = size_of(LLAMA_8B, "F16")
        plan = plan_pair(model, quality, size_of(LLAMA_8B, "Q4_K_M")[1], machine(12), Usage(4096))
        assert "F16 does not even fit alone" in plan.reason


def test_earlier_runs_on_this_machine_are_found(tmp_path, monkeypatch):
    from bitladder.files.hashing import file_sha256
    from bitladder.stages.anchors import stored_runs
    from bitladder.store.evidence import Evidence

    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    here = machine()
    assert stored_runs(str(path), here) == {}
    key = {"source": file_sha256(path), "level": "Q8_0", "engine": {"cpu": here.cpu, "threads": here.cores}}
    with Evidence.open() as evidence:
        evidence.put("speed", key, {"decode_tokens_per_s": 12.0})
        evidence.put("speed", {**key, "engine": {"cpu": "other", "threads": 8}}, {"decode_tokens_per_s": 99.0})
    assert stored_runs(str(path), here) == {"Q8_0": 12.0}
    assert stored_runs("hf:org/name", here) == {}


def test_margins_are_kept():
    model = model_of(LLAMA_8B)
    size = LevelBytes("X", {"layers": {"Q8_0": 4 * GiB}})
    need = place(model, size, machine(64), Usage(256)).ram_bytes
    exact = Machine("cpu", 8, (), 64 * GiB, need + RAM_MARGIN, 1 << 40)
    assert place(model, size, exact, Usage(256)).kind == "cpu"
    short = Machine("cpu", 8, (), 64 * GiB, need + RAM_MARGIN - 1, 1 << 40)
    lacking = place(model, size, short, Usage(256))
    assert (lacking.kind, lacking.missing_bytes) == ("none", 1)
