import psutil

from bitladder.describe.machine import Gpu
from bitladder.files import probe
from bitladder.units import GiB, MiB


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_this_machine_is_described():
    machine = probe.probe_machine()
    assert machine.cores >= 1
    assert 0 < machine.ram_available <= machine.ram_total
    assert machine.disk_free > 0
    assert machine.cpu
    assert f"{machine.cores} cores" in machine.summary


def test_a_cpu_quota_cuts_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert probe.available_cores(tmp_path) == 8
    write(tmp_path, {"cpu.max": "max 100000"})
    assert probe.available_cores(tmp_path) == 8
    write(tmp_path, {"cpu.max": "250000 100000"})
    assert probe.available_cores(tmp_path) == 2
    write(tmp_path, {"cpu.max": "10000 100000"})
    assert probe.available_cores(tmp_path) == 1


def test_version_1_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    write(tmp_path, {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"})
    assert probe.available_cores(tmp_path) == 4
    write(tmp_path, {"cpu/cpu.cfs_quota_us": "-1"})
    assert probe.available_cores(tmp_path) == 8


def test_memory_limit_of_a_container(tmp_path):
    assert probe.cgroup_memory(tmp_path) == (0, 0)
    write(tmp_path, {"memory.max": "max"})
    assert probe.cgroup_memory(tmp_path) == (0, 0)
    used = {"memory.current": str(3 * GiB), "memory.stat": f"anon 5\ninactive_file {GiB}"}
    write(tmp_path, {"memory.max": str(4 * GiB), **used})
    assert probe.cgroup_memory(tmp_path) == (4 * GiB, 2 * GiB)


def test_a_limit_bounds_what_is_available(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "cgroup_memory", lambda: (600 * MiB, 200 * MiB))
    machine = probe.probe_machine()
    assert (machine.ram_total, machine.ram_available) == (600 * MiB, 400 * MiB)


def test_memory_is_what_linux_or_psutil_say(tmp_path, monkeypatch):
    write(tmp_path, {"meminfo": "MemTotal:  4096 kB\nMemFree: 1 kB\nMemAvailable:   3072 kB"})
    monkeypatch.setattr(probe, "_MEMINFO", tmp_path / "meminfo")
    assert probe._memory() == (4 * MiB, 3 * MiB)
    monkeypatch.setattr(probe, "_MEMINFO", tmp_path / "nowhere")
    assert probe._memory()[0] == psutil.virtual_memory().total


def test_nvidia_smi_rows():
    text = "NVIDIA GeForce RTX 4090, 24564, 23000\nNVIDIA A100-SXM4-80GB, 81920, 81000\nOrin, [N/A], [N/A]\nbroken\n"
    assert probe.parse_nvidia_smi(text) == (
        Gpu("NVIDIA GeForce RTX 4090", 24564 * MiB, 23000 * MiB),
        Gpu("NVIDIA A100-SXM4-80GB", 81920 * MiB, 81000 * MiB),
    )


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path):
    assert probe.disk_free(tmp_path / "a" / "b") == probe.disk_free(tmp_path)


def test_what_others_take_of_the_processor(monkeypatch):
    """Eight seconds pass on all cores, six of them busy, two of those ours."""
    seconds = iter([(100.0, 50.0, 5.0), (108.0, 56.0, 7.0)])
    monkeypatch.setattr("bitladder.files.probe._processor_seconds", lambda: next(seconds))
    with probe.OtherLoad() as others:
        pass
    assert others.share == 0.5
