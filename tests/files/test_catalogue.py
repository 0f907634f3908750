import io
import re

import pytest
from rich.console import Console

from bitladder.describe.rates import from_data_sheet
from bitladder.describe.shapes import Shape, model_of
from bitladder.errors import BadInput, NothingFits, UsageError
from bitladder.files import catalogue
from bitladder.files.devices import gpu_figures, known_gpus, known_memories, parse_machine
from bitladder.files.folders import data_folder
from bitladder.levels import parse_level
from bitladder.plan.advice import ENGINES, Situation, advise
from bitladder.plan.inverse import GpuKind, gpus_needed
from bitladder.plan.launch import launch
from bitladder.plan.placement import VRAM_MARGIN, Placement, Usage, place
from bitladder.plan.preflight import QUANTIZE_START_S, JobNeed, quantize_need, require, walk_need
from bitladder.plan.search import MachineRates, best_options, largest_context, option, what_would_give
from bitladder.report.needs import needs_table
from bitladder.stages.search import (
    candidate_of,
    hardware_for,
    just_out_of_reach,
    load_prices,
    machine_rates,
)
from bitladder.units import GiB


def best_of(text, machine, rates, wish, **least):
    """The options of the rows that match a text."""
    return best_options([candidate_of(row) for row in catalogue.find_models(text)], machine, rates, wish, **least)


def described(text):
    found = parse_machine(text)
    return found.machine, MachineRates(found.cpu, found.gpu)


class TestRows:
    def test_there_are_enough_and_each_names_its_source(self):
        rows = catalogue.load_catalogue()
        assert len(rows) >= 40
        assert len({row.hub for row in rows}) == len(rows)
        assert all(row.licence and row.model.dims.n_ctx_train for row in rows)
        assert all("config" in row.source and len(row.source.split()) > 5 for row in rows)

    @pytest.mark.parametrize("row", catalogue.load_catalogue(), ids=lambda row: row.name)
    def test_a_shape_has_the_published_number_of_weights(self, row):
        """Families of 2026 publish two digits, of the whole model; those stated as config.json are held to these, and
        to heads of a usual width: where config.json has no other, some classes divide and get 53.
        """
        assert row.whole().elements / 1e9 == pytest.approx(row.params, rel=0.002 if row.shape else 0.045)
        assert row.model.dims.head_dim_k % 16 == 0

    def test_shipped_sizes_are_what_recipes_give(self):
        rows = {row.name: row for row in catalogue.load_catalogue()}
        for name in ("SmolLM2-360M-Instruct", "Qwen2.5-0.5B-Instruct", "Phi-3-mini-4k-instruct", "gpt-oss-20b"):
            assert catalogue.level_parts(rows[name]) == catalogue.compute_parts(rows[name].whole())
        assert all(catalogue.size_key(row) in catalogue._sizes() for row in rows.values())

    def test_search_and_names(self):
        assert {row.name for row in catalogue.find_models("qwen3 apache")} >= {"Qwen3-8B", "Qwen3-30B-A3B"}
        assert catalogue.find_models("no such thing") == ()
        assert catalogue.model_named("hf:Qwen/Qwen3-8B").name == catalogue.model_named("qwen3-8b").name
        with pytest.raises(BadInput, match=r"Nearest: .*Qwen3-8B"):
            catalogue.model_named("Qwen3-8")

    def test_users_add_rows(self):
        row = "{hub: me/mine, licence: mit, params: 0.05, architecture: llama, n_layer: 4, n_embd: 512, n_ff: 1024,"
        row += " n_head: 8, n_head_kv: 8, n_vocab: 32000, n_ctx: 2048}"
        path = data_folder("models.yaml")
        path.parent.mkdir(parents=True)
        path.write_text(f"models:\n - {row}\n")
        mine = catalogue.model_named("mine")
        assert next(iter(catalogue.level_parts(mine))) == "F16"
        assert len(catalogue.load_catalogue()) > 40

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("models: [{hub: a/b}]", "lacks architecture"),
            ("models: [3]", "model 1 has no hub name"),
            ("[]", "no list 'models'"),
            ("models: [", "no YAML"),
            (
                "models: [{hub: a/b, params: 1, architecture: qwen9, n_layer: 1, n_embd: 1, n_ff: 1, n_head: 1, "
                "n_head_kv: 1,"
                " n_vocab: 1, n_ctx: 1}]",
                "architecture 'qwen9'",
            ),
            (
                "models: [{hub: a/b, params: 1, architecture: llama, n_layer: 1.5, n_embd: 1, n_ff: 1, n_head: 1, "
                "n_head_kv: 1,"
                " n_vocab: 1, n_ctx: 1}]",
                "n_layer must be",
            ),
        ],
    )
    def test_faulty_rows_are_named(self, text, match):
        path = data_folder("models.yaml")
        path.parent.mkdir(parents=True)
        path.write_text(text)
        with pytest.raises(BadInput, match=match):
            catalogue.load_catalogue()


class TestDevices:
    def test_figures_are_complete_and_sourced(self):
        for row in (*known_gpus().values(), *known_memories().values()):
            assert row["bandwidth"] > 0
            assert row["source"]
        assert all(4 <= row["memory"] <= 300 for row in known_gpus().values())

    @pytest.mark.parametrize(
        ("text", "gpus", "ram", "bandwidth"),
        [
            ("RTX 4090 + 64 GiB", ["RTX 4090"], 64, 76.8),
            ("2x rtx3090 + 128GiB DDR4-3200 dual", ["RTX 3090", "RTX 3090"], 128, 51.2),
            ("NVIDIA A100 80GB + 256 GiB", ["A100 80GB"], 256, 76.8),
            ("32 GiB", [], 32, 76.8),
            ("Apple M4 Max 128 GiB", [], 128, 546),
            ("16 GB laptop", [], 16, 76.8),
            ("a laptop with 16 GB of RAM", [], 16, 76.8),
            ("my gaming PC, 32 gigs", [], 32, 76.8),
            ("MacBook Pro M4 32GB", [], 32, 120),
            ("Mac Studio with M2 Ultra and 192GB of unified memory", [], 192, 800),
            ("M3 Pro 18GB", [], 18, 150),
            ("two 3090s", ["RTX 3090", "RTX 3090"], 48, 76.8),
            ("2 x RTX 4090s and 128 GB DDR5-5600 dual", ["RTX 4090", "RTX 4090"], 128, 89.6),
            ("2 3090 + 64GB", ["RTX 3090", "RTX 3090"], 64, 76.8),
            ("workstation, 4070 Ti SUPER, 64 GB DDR4", ["RTX 4070 Ti SUPER"], 64, 51.2),
            ("64 GB + 24 GB of VRAM", ["GPU"], 64, 76.8),
            ("a workstation with 64 GB of RAM and a GPU with 24 GB VRAM", ["GPU"], 64, 76.8),
            ("RTX 4090 with 24 GB of VRAM and 64 GB RAM", ["RTX 4090"], 64, 76.8),
            ("GPU 24 GiB + 64 GiB 80 GB/s", ["GPU"], 64, 80),
            ("RTX 4090", ["RTX 4090"], 24, 76.8),
        ],
    )
    def test_machines_in_words(self, text, gpus, ram, bandwidth):
        found = parse_machine(text)
        assert [gpu.name for gpu in found.machine.gpus] == gpus
        assert found.machine.ram_total == ram * GiB
        assert 0.5 * bandwidth * 1e9 < found.cpu.stream_of("Q4_K") < bandwidth * 1e9
        assert found.assumed

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("RTX 4091 + 64 GiB", "RTX 4090"),
            ("laptop", "has no RAM"),
            ("MacBook Pro M4", "has no RAM"),
            ("24 GB of VRAM", "has no RAM"),
            ("two potatoes and 16 GB", "no known"),
            ("16 GB of cheese", "no known"),
            ("100x RTX 4090 + 1 GiB", "100 GPUs"),
            ("", "no known"),
            ("-5 GiB", "no known"),
            ("64 GiB 1.2.3 GB/s", "no number"),
            ("9999999 TiB", "of RAM"),
        ],
    )
    def test_machines_nobody_knows(self, text, match):
        with pytest.raises(UsageError) as error:
            parse_machine(text)
        assert re.search(match, str(error.value))
        assert "--vram" not in str(error.value)

    def test_figures_by_hand(self):
        found = parse_machine("2x GPU 24 GiB 936 GB/s 71 TFLOP/s + 64 GiB 80 GB/s")
        assert [gpu.vram_total for gpu in found.machine.gpus] == [24 * GiB] * 2
        assert found.machine.gpus[0].flops == 71e12
        assert found.gpu == from_data_sheet(936e9, 71e12, gpu=True)
        assert found.cpu.kv_stream == from_data_sheet(80e9, 1.0, gpu=False).kv_stream
        assert "memory is" not in " ".join(found.assumed)
        assert parse_machine("GPU 8 GiB 300 GB/s + 16 GiB").machine.gpus[0].flops == pytest.approx(2.1e13)

    def test_what_was_not_said_is_assumed_aloud(self):
        assert any("RAM is 48.0 GiB" in one for one in parse_machine("two 3090s").assumed)
        described = parse_machine("64 GB + 24 GB of VRAM")
        assert described.machine.gpus[0].vram_total == 24 * GiB
        assert any("948 GB/s" in one for one in described.assumed)
        assert parse_machine("MacBook Pro M4 32GB").shareable < 32 * GiB == parse_machine("32 GB").shareable

    def test_a_drivers_name_finds_its_row(self):
        assert gpu_figures("NVIDIA GeForce RTX 4090")["bandwidth"] == 1008
        assert gpu_figures("Matrox G200") is None


class TestSearch:
    def test_the_largest_first_and_all_fit(self):
        machine, rates = described("RTX 4090 + 64 GiB")
        rows = best_of("", machine, rates, Usage(8192), least_decode=5, least_bits=3)
        sizes = [row.params for row in rows]
        assert sizes == sorted(sizes, reverse=True)
        assert all(row.speed.decode.value >= 5 and row.placement.kind != "none" for row in rows)
        assert {row.placement.kind for row in rows} == {"gpu", "split", "experts in RAM"}
        kinds = {row.name: row.placement.kind for row in rows}
        assert kinds["Qwen/Qwen2.5-14B-Instruct"] == "gpu" or kinds["Qwen/Qwen2.5-7B-Instruct"] == "gpu"

    def test_more_speed_asked_for_means_smaller_levels(self):
        machine, rates = described("RTX 4090 + 64 GiB")
        bytes_at = {}
        for least in (1, 10):
            rows = best_of("qwen2.5-32b", machine, rates, Usage(4096), least_decode=least)
            bytes_at[least] = rows[0].placement.weight_bytes
        assert bytes_at[10] < bytes_at[1]

    def test_nothing_fits_a_tiny_machine(self):
        machine, rates = described("2.5 GiB")
        assert best_of("70b", machine, rates, Usage(4096)) == []

    def test_what_would_have_to_give(self):
        machine, rates = described("24 GiB")
        row = candidate_of(catalogue.model_named("Llama-3.1-8B-Instruct"))
        f16 = row.levels[0]
        assert what_would_give(row, f16, machine, rates, Usage(4096)) == "fits as it is"
        assert what_would_give(row, f16, machine, rates, Usage(60000)) == "would need a KV cache in Q8_0"
        assert what_would_give(row, f16, machine, rates, Usage(131072)) == "would need a KV cache in Q4_0"
        smaller, _ = described("19 GiB")
        assert what_would_give(row, f16, smaller, rates, Usage(131072)) == "would need a context of 8192 tokens"
        seventy = candidate_of(catalogue.model_named("Llama-3.3-70B-Instruct"))
        assert what_would_give(seventy, seventy.levels[1], machine, rates, Usage(4096)).endswith("more memory")
        far = just_out_of_reach(machine, rates, Usage(4096), [], text="llama-3.3")
        assert [(way.level, way.name) for way in far] == [("Q4_K_M", "meta-llama/Llama-3.3-70B-Instruct")]

    def test_the_longest_context(self):
        machine, _ = described("16 GiB")
        row = candidate_of(catalogue.model_named("Llama-3.1-8B-Instruct"))
        level = next(level for level in row.levels if level.level == "Q4_K_M")
        longest = largest_context(row.model, level, machine, Usage())
        assert 8192 < longest < 131072
        assert place(row.model, level, machine, Usage(longest)).kind == "cpu"
        assert place(row.model, level, machine, Usage(longest + 256)).kind == "none"
        assert largest_context(row.model, row.levels[0], machine, Usage()) == 0

    def test_a_ladder_has_every_level(self):
        machine, rates = described("16 GiB")
        candidate = candidate_of(catalogue.model_named("Llama-2-13b-chat-hf"))
        rows = [option(candidate, level, machine, rates, Usage(4096)) for level in candidate.levels]
        assert [row.level for row in rows][:2] == ["F16", "Q8_0"]
        assert rows[0].placement.kind == "none"
        assert rows[-1].placement.kind == "cpu"

    def test_rates_of_a_machine_that_was_not_measured_are_assumed(self):
        machine, _ = described("RTX 4090 + 64 GiB")
        rates = machine_rates(machine)
        assert rates.cpu.source == "derived"
        assert rates.gpu.stream_of("F16") == pytest.approx(0.7 * 1008e9)


class TestHardware:
    def test_gpus_needed(self):
        kind = GpuKind("g", 24 * GiB)
        usable = 24 * GiB - VRAM_MARGIN
        assert gpus_needed(usable, 0, kind) == 1
        assert gpus_needed(usable + 1, 0, kind) == 2
        assert gpus_needed(usable + 1000, 1000, kind) == 2

    def test_what_a_level_needs_and_saves(self):
        rows = {row.level: row for row in hardware_for("Llama-3.3-70B-Instruct", Usage(8192))}
        need = {gpu.name: gpu.count for gpu in rows["Q4_K_M"].gpus}
        assert (need["A100 80GB"], need["RTX 4090"]) == (1, 2)
        saved = {saving.gpu: saving for saving in rows["Q4_K_M"].savings}
        assert saved["A100 80GB"].gpus_f16 == 2
        assert saved["A100 80GB"].purchase is None
        assert rows["Q4_K_M"].ram_gib == 48
        assert [(gpu.name, gpu.count) for gpu in rows["F16"].gpus][:2] == [("H200", 1), ("MI300X", 1)]

    def test_prices_are_the_users_own_dated_and_sourced(self):
        path = data_folder("prices.yaml")
        path.parent.mkdir(parents=True)
        path.write_text("gpus:\n  A100 80GB: {purchase: 10000, hourly: 2, date: 2026-01-31, source: a quote}\n")
        assert load_prices()["A100 80GB"]["hourly"] == 2
        rows = {row.level: row for row in hardware_for("Llama-3.3-70B-Instruct", Usage(8192))}
        saving = next(saving for saving in rows["Q4_K_M"].savings if saving.gpu == "A100 80GB")
        assert (saving.purchase, saving.hourly) == (10000, 2)

    def test_a_price_of_a_gpu_that_nobody_knows_is_not_ignored(self):
        path = data_folder("prices.yaml")
        path.parent.mkdir(parents=True)
        path.write_text("gpus:\n  A100 80: {purchase: 10000, date: 2026-01-31, source: a quote}\n")
        with pytest.raises(BadInput, match="price of 'A100 80'") as error:
            load_prices()
        assert "A100 80GB" in error.value.means

    @pytest.mark.parametrize("prices", ["gpus: 5", "gpus: [a]"])
    def test_prices_that_are_no_table(self, prices):
        path = data_folder("prices.yaml")
        path.parent.mkdir(parents=True)
        path.write_text(prices)
        with pytest.raises(BadInput, match="no table of prices"):
            load_prices()

    @pytest.mark.parametrize("width", [80, 160])
    def test_needs_are_shown_with_money_and_savings(self, width):
        """Two A100 for F16 and one for Q4_K_M: the price of one is saved."""
        out = Console(file=io.StringIO(), width=width, highlight=False)
        rows = hardware_for("Llama-3.3-70B-Instruct", Usage(8192))
        needs_table("Llama-3.3-70B-Instruct", rows, 8192, out)
        assert "so no money is shown" in out.file.getvalue().replace("\n", " ")
        path = data_folder("prices.yaml")
        path.parent.mkdir(parents=True)
        path.write_text("gpus:\n  A100 80GB: {purchase: 10000, hourly: 2, date: 2026-01-31, source: a quote}\n")
        out = Console(file=io.StringIO(), width=width, highlight=False)
        needs_table("Llama-3.3-70B-Instruct", hardware_for("Llama-3.3-70B-Instruct", Usage(8192)), 8192, out)
        text = out.file.getvalue()
        line = next(line for line in text.splitlines() if line.strip().startswith("Q4_K_M"))
        assert re.search(r"Q4_K_M\s+42\.\d GiB\s+48 GiB\s+1 x A100 80GB.*\s10,000, 2\.00/h \(1 for 2\)", line)
        assert max(map(len, text.splitlines())) <= width
        whole = next(line for line in text.splitlines() if line.strip().startswith("F16"))
        assert whole.rstrip().endswith(" 0")
        assert "what each level" in text.lower()

    @pytest.mark.parametrize("row", ["{purchase: 5}", "{purchase: cheap, date: 2026-01-31, source: x}", "5"])
    def test_prices_without_date_or_source_are_refused(self, row):
        path = data_folder("prices.yaml")
        path.parent.mkdir(parents=True)
        path.write_text(f"gpus:\n  A100: {row}\n")
        with pytest.raises(BadInput, match="not complete"):
            load_prices()


def placed(kind="cpu", layers=0, experts=0):
    return Placement(kind, layers, experts, 10, 90, 5, 5, 80)


class TestLaunch:
    def test_llama_server(self):
        wish = Usage(4096, 2, "Q8_0", "Q8_0")
        made = launch("llama-server", "/m/a b.gguf", placed("experts in RAM", 33, 20), wish, threads=8)
        assert made.command == (
            "llama-server -m '/m/a b.gguf' -c 8192 -np 2 -t 8 -ngl 33 --n-cpu-moe 20 -ctk q8_0 -ctv q8_0 -fa on --jinja"
        )

    def test_ollama_writes_a_modelfile(self):
        made = launch("ollama", "/m/A.gguf", placed("split", 20), Usage(4096), threads=8)
        assert made.file_name == "Modelfile"
        assert made.file_text.splitlines() == [
            "FROM /m/A.gguf",
            "PARAMETER num_ctx 4096",
            "PARAMETER num_gpu 20",
            "PARAMETER num_thread 8",
        ]
        assert "ollama create a -f Modelfile" in made.command

    def test_the_others(self):
        assert "--gpu max" in launch("lmstudio", "/m/a.gguf", placed("gpu", 33), Usage(), threads=8).command
        assert "--gpu 0.10" in launch("lmstudio", "/m/a.gguf", placed("split", 3), Usage(), threads=8).command
        vllm = launch("vllm", "/m/a-AWQ", placed("gpu"), Usage(2048, 8), threads=8, gpus=2).command
        words = "--served-model-name a-AWQ --max-model-len 2048 --max-num-seqs 8 --tensor-parallel-size 2"
        assert vllm == f"vllm serve /m/a-AWQ {words}"
        sglang = launch("sglang", "/m/a-AWQ", placed("gpu"), Usage(2048, 8), threads=8, gpus=2).command
        words = "--served-model-name a-AWQ --context-length 2048 --max-running-requests 8 --tp 2"
        assert sglang == f"python -m sglang.launch_server --model-path /m/a-AWQ {words}"
        with pytest.raises(UsageError, match=r"vllm does not serve a GGUF file(.|\n)*vllm-gguf-plugin"):
            launch("vllm", "/m/a.gguf", placed("gpu"), Usage(), threads=8)
        tgi = launch("tgi", "/m/a", placed("gpu"), Usage(2048), threads=8).command
        assert "-v /m/a:/model" in tgi
        assert "--max-total-tokens 2048" in tgi
        assert '-v "$PWD"/a:/model' in launch("tgi", "a", placed("gpu"), Usage(), threads=8).command
        assert "--model-id o/m " in launch("tgi", "o/m", placed("gpu"), Usage(), threads=8, on_hub=True).command

    @pytest.mark.parametrize(
        ("engine", "path", "match"),
        [
            ("llama.cpp", "a.gguf", "no known engine"),
            ("vllm", "a.gguf", "does not serve a GGUF"),
            ("ollama", "folder", "checkpoint"),
        ],
    )
    def test_what_does_not_go_together(self, engine, path, match):
        with pytest.raises(UsageError, match=match):
            launch(engine, path, placed(), Usage(), threads=1)


class TestAdvice:
    @pytest.mark.parametrize(
        ("machine", "kind", "engine", "concurrent", "format_"),
        [
            ("32 GiB", "cpu", "", 1, "GGUF"),
            ("RTX 4090 + 64 GiB", "split", "", 32, "GGUF"),
            ("RTX 4090 + 64 GiB", "gpu", "", 1, "GGUF"),
            ("RTX 4090 + 64 GiB", "gpu", "", 8, "AWQ or GPTQ, 4 bits"),
            ("RTX 4090 + 64 GiB", "gpu", "", 64, "FP8"),
            ("RTX 3090 + 64 GiB", "gpu", "", 64, "INT8"),
            ("RTX 4090 + 64 GiB", "gpu", "vllm", 1, "AWQ or GPTQ, 4 bits"),
            ("RTX 4090 + 64 GiB", "gpu", "vllm", 64, "FP8"),
            ("RTX 3090 + 64 GiB", "gpu", "sglang", 64, "INT8"),
            ("RTX 3090 + 64 GiB", "gpu", "tgi", 1, "AWQ or GPTQ, 4 bits"),
            ("RTX 4090 + 64 GiB", "gpu", "ollama", 64, "GGUF"),
            ("Apple M4 Max 128 GiB", "cpu", "", 8, "GGUF"),
        ],
    )
    def test_the_table(self, machine, kind, engine, concurrent, format_):
        advice = advise(Situation(parse_machine(machine).machine, placed(kind), engine, concurrent))
        assert advice.format == format_
        assert advice.reason
        assert set(advice.engines) <= set(ENGINES)

    def test_slow_paths_are_warned_of(self):
        def slow(name, engine, features=()):
            return parse_level(name).slow_paths(engine, has_gpu=False, cpu_features=features)

        assert "slowly" in slow("Q4_K_M", "vllm")[0]
        assert "slowly" in slow("AWQ-Q4_K_M", "vllm")[0]
        assert "slowly" in slow("bpw4.5", "vllm")[0]
        assert "tables" in slow("IQ4_XS", "llama-server")[0]
        assert "no fast kernel" in slow("GPTQ-3bit-g128", "vllm")[0]
        assert "BF16" in slow("BF16", "llama-server")[0]
        for name, engine, features in [
            ("Q4_K_M", "llama-server", ()), ("F16", "vllm", ()), ("BF16", "", ("avx512_bf16",)),
            ("GPTQ-4bit-g64", "vllm", ()), ("INT8-W8A8", "vllm", ()),
        ]:  # fmt: skip
            assert not slow(name, engine, features)


class TestPreflight:
    def test_a_job_that_cannot_end_well_is_refused_with_both_numbers(self):
        machine = parse_machine("16 GiB").machine
        with pytest.raises(NothingFits, match=r"20\.0 GiB of RAM; 14\.0 GiB are free"):
            require(JobNeed("walk", 20 * GiB, 0, 0, 1.0, "assumed"), machine)
        with pytest.raises(NothingFits, match="disk space"):
            require(JobNeed("quantize", GiB, 0, 2 << 40, 1.0, "assumed"), machine)
        require(JobNeed("walk", GiB, 0, 0, 1.0, "assumed"), machine)

    def test_time_follows_cores_and_types(self):
        machine = parse_machine("16 GiB").machine
        weights = {"Q4_K": 10**9, "Q8_0": 10**8}
        one, eight = (quantize_need(weights, [5], machine, threads=threads) for threads in (1, 8))
        assert one.seconds - QUANTIZE_START_S == pytest.approx(8 * (eight.seconds - QUANTIZE_START_S))
        assert (one.label, one.disk_bytes) == ("assumed", 5)
        assert one.seconds == pytest.approx(25.5 + QUANTIZE_START_S)

    def test_a_walk_grows_with_a_layer_not_with_the_model(self):
        machine = parse_machine("16 GiB").machine
        small, large = (walk_need(layer, 0, 4096, 1024, 5, 1e12, machine).ram_bytes for layer in (GiB // 4, GiB // 2))
        assert large - small == GiB // 2


def test_a_shape_of_nobody():
    with pytest.raises(BadInput, match="family 'x' are not known"):
        model_of(Shape("x", "x", 1, 1, 1, 1, 1, 1, 1))
