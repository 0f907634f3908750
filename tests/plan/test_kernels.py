"""Which engine runs which scheme on which device: the table that ships, what it says of machines and of levels."""

import json
import re

import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.describe.machine import Gpu, Machine
from bitladder.files.devices import capability_of, known_gpus, parse_machine
from bitladder.files.kernel_table import kernel_table
from bitladder.levels import CHECKPOINT_ENGINES, FILE_ENGINES, parse_level
from bitladder.levels.checkpoints import FORMATS
from bitladder.plan.kernels import Device, devices_of, how, kernel_warnings, no_kernel, weakest
from bitladder.records.kernels import Kernel, Runs

TABLE = kernel_table()
NAMES = [
    "FP8-DYNAMIC", "FP8-BLOCK", "INT8-W8A8", "INT8-W8A16", "W3A16-g64", "W4A16-g64", "GPTQ-4bit-g64", "AWQ-4bit-g64",
    "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8",
]  # fmt: skip


def test_every_row_has_a_source_a_date_and_says_what_is_slower():
    assert len({(row.engine, row.scheme) for row in TABLE.rows}) == len(TABLE.rows)
    for row in TABLE.rows:
        assert row.source in TABLE.sources and row.engine in TABLE.engines
        assert re.fullmatch(r"20\d\d-\d\d", row.date)
        assert set(row.others) <= {"cpu", "amd", "apple"}
        assert row.native or row.runs or row.others
        assert bool(row.slower) == (row.runs is not None)
        assert row.runs is None or row.native is None or row.runs < row.native
    assert set(TABLE.engines) >= {*FILE_ENGINES, *CHECKPOINT_ENGINES}


def test_every_format_that_is_written_needs_kernels_of_the_table():
    """A new format without a row would never be warned of."""
    covered = set()
    for name in NAMES:
        level = parse_level(name)
        assert level.format.kernels and set(level.format.kernels) <= set(TABLE.schemes), name
        covered.add(type(level.format))
        for engine in level.engines:  # whom the level names, the table knows
            known = [TABLE.of(engine, one) for one in level.format.kernels]
            assert all(known) or engine in ("tgi", "transformers", "sglang"), (name, engine)
    left = {form.__name__ for form in FORMATS} - {form.__name__ for form in covered}
    assert left <= {"Mixed", "MlxAffine", "MlxFloat"}  # schemes of others; Macs alone
    assert parse_level("GPTQ-3bit-g64").format.kernels == ()  # nothing but transformers' packages runs it


@pytest.mark.parametrize(
    ("capability", "scheme", "expected"),
    [
        (9.0, "FP8", Runs.FULL), (8.9, "FP8", Runs.FULL), (8.6, "FP8", Runs.SLOWER), (7.5, "FP8", Runs.SLOWER),
        (7.0, "FP8", Runs.NO), (12.0, "NVFP4", Runs.FULL), (9.0, "NVFP4", Runs.SLOWER), (7.0, "NVFP4", Runs.NO),
        (9.0, "NVFP4A16", Runs.FULL), (9.0, "MXFP8", Runs.NO), (8.6, "GGUF", Runs.SLOWER), (8.6, "MLX", Runs.NO),
    ],
)  # fmt: skip
def test_what_vllm_does_by_generation(capability, scheme, expected):
    assert how(TABLE.of("vllm", scheme), Device("x", capability)) is expected


def test_other_devices():
    row = Kernel("e", "S", "s", "2026-01", native=8.0, others=("cpu",))
    slow = Kernel("e", "S", "s", "2026-01", runs=7.0, others=("cpu",), slower="it decodes")
    found = [how(one, Device("d", kind=kind)) for one in (row, slow) for kind in ("cpu", "amd")]
    assert found == [Runs.FULL, Runs.NO, Runs.SLOWER, Runs.NO]
    assert how(None, Device("d", 9.0)) is Runs.NO


def test_capabilities_by_name_and_devices_of_machines():
    assert capability_of("NVIDIA GeForce RTX 4090") == 8.9
    assert capability_of("Tesla T4") == 7.5
    assert capability_of("RX 7900 XTX") is None and capability_of("GPU") is None
    nvidia = [name for name, row in known_gpus().items() if not name.startswith(("RX", "MI"))]
    assert all(capability_of(name) for name in nvidia)
    found = devices_of(parse_machine("2x RTX 3090 + 64 GiB").machine)
    assert found == (Device("RTX 3090", 8.6), Device("CPU", kind="cpu"))
    assert devices_of(parse_machine("MI300X + 64 GiB").machine)[0].kind == "amd"
    odd = Machine("cpu", 8, (), 1, 1, 1, (Gpu("a stranger", 1, 1),))
    assert [device.kind for device in devices_of(odd)] == ["cpu"]


def test_levels_that_nobody_runs_or_only_slowly_are_warned_of():
    levels = [parse_level(name) for name in (*NAMES, "Q4_K_M", "CT-bpw4.6")]
    turing, ampere, hopper = Device("T4", 7.5), Device("RTX 3090", 8.6), Device("H200", 9.0)
    said = kernel_warnings(TABLE, levels, turing)
    assert [one for one in said if one.startswith("MXFP8: MXFP8 has no kernel in vLLM or SGLang or TGI on T4")]
    assert [one for one in said if one.startswith("FP8-DYNAMIC: vLLM runs FP8 on T4 (compute capability 7.5) slowly")]
    quiet = kernel_warnings(TABLE, [parse_level("W4A16-g64"), parse_level("GPTQ-4bit-g64")], ampere)
    assert quiet == []
    assert kernel_warnings(TABLE, [parse_level("NVFP4")], hopper, "sglang")[0].startswith(
        "NVFP4: NVFP4 has no kernel in SGLang on H200"
    )
    assert "slowly" in kernel_warnings(TABLE, [parse_level("NVFP4")], hopper, "vllm")[0]


def test_a_processor_is_judged_where_there_is_no_gpu_by_what_it_has():
    levels = [parse_level(name) for name in (*NAMES, "Q4_K_M")]

    def cpu(*features):
        return Machine("x", 8, features, 1, 1, 1)

    older, newer, unknown = (weakest(cpu(*one)) for one in (("avx2",), ("avx2", "avx512f"), ()))
    said = kernel_warnings(TABLE, levels, older, "vllm")
    assert "W4A16-g64: W4A16 has no kernel in vLLM on this CPU, which has no avx512f: see bitladder formats" in said
    assert "NVFP4A16: NVFP4A16 has no kernel in vLLM on a CPU: see bitladder formats" in said
    assert not [one for one in said if one.startswith(("FP8-DYNAMIC", "INT8-W8A8", "Q4_K_M"))]
    for device in (newer, unknown):
        assert not [one for one in kernel_warnings(TABLE, levels, device, "vllm") if "4bit" in one or "W4A16" in one]
    level = parse_level("W4A16-g64")
    assert "no avx512f" in no_kernel(TABLE, level, older, "vllm") and not no_kernel(TABLE, level, newer, "vllm")
    gpu = Machine("x", 8, ("avx2",), 1, 1, 1, (Gpu("NVIDIA H200", 1, 1),))
    assert weakest(gpu).capability == 9.0
    assert weakest(Machine("x", 8, (), 1, 1, 1, (Gpu("a stranger", 1, 1),))) is None


def test_plan_and_the_verb_say_so(tmp_path):
    run = CliRunner().invoke
    made = run(app, ["formats", "--json"])
    record = json.loads(made.stdout)
    assert len(record["runs"]) == len(record["table"]["rows"]) == len(TABLE.rows)
    assert [device["name"] for device in record["devices"]][:2] == ["Turing", "Ampere"]
    shown = run(app, ["formats", "--as", "RTX 3090 + 64 GiB"])
    assert shown.exit_code == 0
    assert "RTX 3090" in shown.stdout and "archived on 21 March 2026" in shown.stdout.replace("\n", " ")
    wrong = run(app, ["formats", "--as", "nonsense"])
    assert wrong.exit_code != 0 and "no known GPU" in wrong.output
    planned = run(app, ["plan", "Llama-3.1-8B-Instruct", "--as", "T4 + 64 GiB", "--levels", "MXFP8,NVFP4A16", "--json"])
    assert planned.exit_code == 0, planned.output
    assert [one for one in json.loads(planned.stdout)["slow"] if "MXFP8 has no kernel" in one]


def test_what_has_no_kernel_is_not_launched():
    plan = ["plan", "Llama-3.1-8B-Instruct", "--as", "T4 + 64 GiB", "--launch", "vllm", "--ctx", "2048"]
    made = CliRunner().invoke(app, [*plan, "--levels", "MXFP8,NVFP4A16"])
    assert made.exit_code == 0, made.output
    shown = " ".join(made.stdout.split())
    assert "vLLM has no" in shown and "vllm serve" in shown
    assert "MXFP8" not in shown.split("vllm serve")[1] and "NVFP4A16" in shown.split("vllm serve")[1]
    bare = CliRunner().invoke(app, [*plan, "--levels", "MXFP8"])
    assert bare.exit_code != 0 and "no kernel for MXFP8 on T4" in " ".join(bare.output.split())
    assert not no_kernel(TABLE, parse_level("MXFP8"), Device("B200", 10.0), "vllm")
    assert not no_kernel(TABLE, parse_level("Q4_K_M"), Device("T4", 7.5), "vllm")
