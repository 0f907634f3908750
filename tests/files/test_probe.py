import os
import subprocess
import sys

import psutil
import pytest

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


def test_page_cache_is_given_back_whether_active_or_not(tmp_path):
    stat = f"anon {GiB // 4}\ninactive_file 0\nactive_file {7 * GiB // 4}"
    write(tmp_path, {"memory.max": str(2 * GiB), "memory.current": str(2 * GiB - 4096), "memory.stat": stat})
    assert probe.cgroup_memory(tmp_path) == (2 * GiB, GiB // 4 - 4096)


UNLIMITED_1 = "9223372036854771712"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/user.slice/job.scope", {"memory.max": "max", "user.slice/job.scope/memory.max": str(2 * GiB),
                                      "user.slice/job.scope/memory.current": str(MiB)}, (2 * GiB, MiB)),
        ("0::/s/job_7", {"s/job_7/memory.max": str(2 * GiB)}, (2 * GiB, 0)),  # a host's root has no such file
        ("0::/s/job_7", {"s/job_7/memory.max": "max", "s/memory.max": str(3 * GiB)}, (3 * GiB, 0)),
        # others in the group above leave less than our own limit
        ("0::/s/job_7", {"s/job_7/memory.max": str(2 * GiB), "s/memory.max": str(4 * GiB),
                         "s/memory.current": str(3 * GiB)}, (2 * GiB, GiB)),
        ("0::/docker/abc", {"memory.max": str(GiB), "memory.current": str(MiB)}, (GiB, MiB)),  # the host's path
        ("0::/../../other", {"memory.max": str(GiB), "other/memory.max": str(MiB)}, (GiB, 0)),
        ("4:memory:/slurm/uid_1000/job_7\n1:cpu:/", {
            "memory/memory.limit_in_bytes": UNLIMITED_1,
            "memory/slurm/uid_1000/job_7/memory.limit_in_bytes": str(2 * GiB),
            "memory/slurm/uid_1000/job_7/memory.usage_in_bytes": str(GiB),
            "memory/slurm/uid_1000/job_7/memory.stat": f"total_inactive_file {MiB}\ntotal_active_file {2 * MiB}",
        }, (2 * GiB, GiB - 3 * MiB)),
        ("not what a kernel writes", {"memory.max": "lots"}, (0, 0)),
    ],
)  # fmt: skip
def test_limits_of_every_group_hold(tmp_path, own, files, expected):
    write(tmp_path, {f"mounted/{name}": text for name, text in files.items()} | {"own": own})
    assert probe.cgroup_memory(tmp_path / "mounted", tmp_path / "own") == expected


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        ("3:cpu,cpuacct:/job\n0::/", {"cpu,cpuacct/job/cpu.cfs_quota_us": "400000",
                                      "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 4),
        ("3:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "100000"}, 1),
        ("", {}, 8),
    ],
)  # fmt: skip
def test_quotas_of_every_group_hold(tmp_path, monkeypatch, own, files, expected):
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    write(tmp_path, {f"mounted/{name}": text for name, text in files.items()} | {"own": own})
    assert probe.available_cores(tmp_path / "mounted", tmp_path / "own") == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_threads_are_those_this_process_may_use():
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from bitladder.cli.build import ALL_CORES
print(ALL_CORES)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


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
