"""What macOS and Windows answer about a machine, as recorded: nothing of it runs here."""

import json
import shutil
import subprocess

import pytest

from bitladder import system
from bitladder.files import probe, probe_commands
from bitladder.files.probe_commands import parse_adapters, parse_displays, parse_sysctl
from bitladder.plan.advice import Situation
from bitladder.plan.placement import Place, Placement, usable_ram, usable_vram
from bitladder.units import GiB

M4_MAX = json.dumps(
    {
        "SPDisplaysDataType": [
            {
                "_name": "Apple M4 Max",
                "spdisplays_mtlgpufamilysupport": "spdisplays_metal3",
                "sppci_bus": "spdisplays_builtin",
                "sppci_cores": "40",
                "sppci_device_type": "spdisplays_gpu",
                "sppci_model": "Apple M4 Max",
                "spdisplays_vendor": "sppci_vendor_Apple",
            }
        ]
    }
)
INTEL_MAC = json.dumps(
    {
        "SPDisplaysDataType": [
            {"sppci_model": "Intel UHD Graphics 630", "spdisplays_vram_shared": "1536 MB"},
            {"sppci_model": "AMD Radeon Pro 5500M", "spdisplays_vram": "8 GB"},
        ]
    }
)
M4_SYSCTL = """machdep.cpu.brand_string: Apple M4 Max
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
"""
INTEL_SYSCTL = """machdep.cpu.brand_string: Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz
machdep.cpu.features: FPU VME SSE3 SSSE3 FMA F16C AVX1.0
machdep.cpu.leaf7_features: SMEP BMI2 AVX2
"""
RADEON_PC = json.dumps(
    {
        "adapters": [
            {"Name": "AMD Radeon RX 7900 XTX", "AdapterRAM": 4293918720},
            {"Name": "AMD Radeon(TM) Graphics", "AdapterRAM": 536870912},
        ],
        "sizes": [
            {"DriverDesc": "AMD Radeon RX 7900 XTX", "Bytes": 24 * GiB},
            {"DriverDesc": "AMD Radeon(TM) Graphics", "Bytes": 536870912},
        ],
        "processors": {"Name": "AMD Ryzen 9 7950X 16-Core Processor            "},
    }
)
ARC_PC = json.dumps(
    {
        "adapters": {"Name": "Intel(R) Arc(TM) A770 Graphics", "AdapterRAM": 2147479552},
        "sizes": {"DriverDesc": "Intel(R) Arc(TM) A770 Graphics", "Bytes": list((16 * GiB).to_bytes(8, "little"))},
        "processors": [{"Name": "Intel(R) Core(TM) i7"}],
    }
)

LYING = Placement(Place.GPU, 1, 0, 1, 1, 1, 1, 1)


class TestMac:
    def test_apples_gpu_is_a_view_of_the_memory(self):
        (gpu,) = parse_displays(M4_MAX, 128 * GiB, 100 * GiB)
        assert (gpu.name, gpu.vram_total, gpu.vram_free) == ("Apple M4 Max GPU, 40 cores", 96 * GiB, 96 * GiB)
        (gpu,) = parse_displays(M4_MAX, 24 * GiB, 10 * GiB)
        assert (gpu.vram_total, gpu.vram_free) == (16 * GiB, 10 * GiB)

    def test_a_card_of_an_intel_mac(self):
        assert [(gpu.name, gpu.vram_total) for gpu in parse_displays(INTEL_MAC, 16 * GiB, 9 * GiB)] == [
            ("AMD Radeon Pro 5500M", 8 * GiB)
        ]

    def test_processors(self):
        assert parse_sysctl(M4_SYSCTL) == ("Apple M4 Max", ("asimd", "asimddp", "i8mm"))
        name, features = parse_sysctl(INTEL_SYSCTL)
        assert name.startswith("Intel(R) Core") and set(features) == {"sse3", "ssse3", "fma", "f16c", "avx", "avx2"}

    def test_a_mac_as_a_machine(self, monkeypatch):
        monkeypatch.setattr(system, "MACOS", True)
        monkeypatch.setattr(probe.platform, "machine", lambda: "arm64")
        answers = {"sysctl": M4_SYSCTL, "system_profiler": M4_MAX}
        here = probed(monkeypatch, answers)
        assert here.cpu == "Apple M4 Max" and here.unified and len(here.gpus) == 1
        assert usable_vram(here) == 0 and usable_ram(here) > 0
        assert not Situation(here, LYING).nvidia


class TestWindows:
    def test_the_drivers_figure_goes_before_cims(self):
        assert [(gpu.name, gpu.vram_total) for gpu in parse_adapters(RADEON_PC)] == [
            ("AMD Radeon RX 7900 XTX", 24 * GiB)
        ]
        assert [gpu.vram_total for gpu in parse_adapters(ARC_PC)] == [16 * GiB]

    @pytest.mark.parametrize("answer", [RADEON_PC, ARC_PC])
    def test_a_pc_as_a_machine(self, monkeypatch, answer):
        monkeypatch.setattr(system, "WINDOWS", True)
        here = probed(monkeypatch, {"powershell": answer})
        assert here.cpu in ("AMD Ryzen 9 7950X 16-Core Processor", "Intel(R) Core(TM) i7") and not here.unified
        assert len(here.gpus) == 1 and usable_vram(here) > 15 * GiB
        assert not Situation(here, LYING).nvidia

    def test_nvidias_are_counted_once(self, monkeypatch):
        monkeypatch.setattr(system, "WINDOWS", True)
        answer = RADEON_PC.replace("AMD Radeon RX 7900 XTX", "NVIDIA GeForce RTX 4090")
        smi = "NVIDIA GeForce RTX 4090, 24564, 23000, GPU-abc, [N/A]\n"
        here = probed(monkeypatch, {"powershell": answer, "nvidia-smi": smi})
        assert [gpu.name for gpu in here.gpus] == ["NVIDIA GeForce RTX 4090"]


def probed(monkeypatch, answers):
    """This machine, were these the answers of its commands: the real callers, another ``subprocess.run``."""

    class Done:
        returncode = 0

        def __init__(self, stdout):
            self.stdout = stdout

    def ran(command, **_):
        return Done(answers.get(command[0].removeprefix("C:\\").removesuffix(".exe"), ""))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(subprocess, "run", ran)
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"C:\\{name}.exe")
    for asked in (probe_commands._mac_processor, probe_commands._mac_displays, probe_commands._windows):
        asked.cache_clear()
    try:
        return probe.probe_machine()
    finally:
        for asked in (probe_commands._mac_processor, probe_commands._mac_displays, probe_commands._windows):
            asked.cache_clear()


HOSTILE = ["", "[", "[]", "null", "{}", "[" * 100_000, '{"SPDisplaysDataType": 1, "adapters": "x", "sizes": [1]}',
           '{"SPDisplaysDataType": [{"sppci_model": 7, "spdisplays_vram": "1.1.1 GB"}, {"sppci_model": "x", '
           '"spdisplays_vram": "99999999999 GB"}], "adapters": [{"Name": "x", "AdapterRAM": -5}, {"Name": "y", '
           '"AdapterRAM": 1e99}, {"Name": "z", "AdapterRAM": true}], "processors": null}']  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_any_other_answer_says_nothing(text):
    assert parse_displays(text, GiB, GiB) == () and parse_adapters(text) == () and parse_sysctl(text) == ("", ())
