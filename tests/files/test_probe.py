import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.files import probe
from bitladder.files.control_groups import group_memory
from bitladder.plan.ladder import check_machine
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


VERSION_2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
VERSION_1 = """31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"""
OF_A_CONTAINER = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"
ELSEWHERE = "35 31 0:32 / /dev/control\\040groups rw - cgroup none rw,memory,cpu"
UNLIMITED_1 = "9223372036854771712"


def recorded(root, mounts, own, files):
    """A tree as a kernel shows it: ``files`` lie where control groups are mounted."""
    where = "dev/control groups" if mounts == ELSEWHERE else "sys/fs/cgroup"
    write(root, {"proc/self/mountinfo": mounts, "proc/self/cgroup": own})
    write(root / where, files)
    return root


@pytest.mark.parametrize(
    ("mounts", "own", "files", "expected"),
    [
        (VERSION_2, "0::/", {}, (0, 0)),
        (VERSION_2, "0::/", {"memory.max": "max"}, (0, 0)),
        (VERSION_2, "0::/user.slice/job.scope", {
            "memory.max": "max", "user.slice/job.scope/memory.max": str(2 * GiB),
            "user.slice/job.scope/memory.current": str(MiB)}, (2 * GiB, MiB)),
        (VERSION_2, "0::/s/job_7", {"s/job_7/memory.max": str(2 * GiB)}, (2 * GiB, 0)),  # a root has no such file
        (VERSION_2, "0::/s/job_7", {"s/job_7/memory.max": "max", "s/memory.max": str(3 * GiB)}, (3 * GiB, 0)),
        # others in the group above leave less than our own limit
        (VERSION_2, "0::/s/job_7", {"s/job_7/memory.max": str(2 * GiB), "s/memory.max": str(4 * GiB),
                                    "s/memory.current": str(3 * GiB)}, (2 * GiB, GiB)),
        # throttled from there on
        (VERSION_2, "0::/s", {"s/memory.max": str(4 * GiB), "s/memory.high": str(GiB)}, (GiB, 0)),
        # cache, active or not, and caches of the kernel are given back
        (VERSION_2, "0::/s", {"s/memory.max": str(4 * GiB), "s/memory.current": str(3 * GiB), "s/memory.stat":
                              f"anon 5\ninactive_file {GiB}\nactive_file {MiB}\nslab_reclaimable {MiB}"},
         (4 * GiB, 2 * GiB - 2 * MiB)),
        (VERSION_2, "0::/docker/abc", {"memory.max": str(GiB), "memory.current": str(MiB)}, (GiB, MiB)),  # the host's
        (VERSION_2, "0::/../../other", {"memory.max": str(GiB), "other/memory.max": str(MiB)}, (GiB, 0)),
        (VERSION_2, "not what a kernel writes", {"memory.max": "lots"}, (0, 0)),
        (VERSION_2, "0::/s", {"s/memory.max": "9" * 4000}, (0, 0)),
        (VERSION_1, "4:memory:/slurm/uid_1000/job_7\n1:cpu,cpuacct:/\n0::/", {
            "memory/memory.limit_in_bytes": UNLIMITED_1,
            "memory/slurm/uid_1000/job_7/memory.limit_in_bytes": str(2 * GiB),
            "memory/slurm/uid_1000/job_7/memory.usage_in_bytes": str(GiB),
            "memory/slurm/uid_1000/job_7/memory.stat": f"total_inactive_file {MiB}\ntotal_active_file {2 * MiB}",
        }, (2 * GiB, GiB - 3 * MiB)),
        # the limit of a group above that is not seen from within
        (VERSION_1, "4:memory:/", {"memory/memory.limit_in_bytes": UNLIMITED_1,
                                   "memory/memory.stat": f"hierarchical_memory_limit {GiB}"}, (GiB, 0)),
        # a group within a container, told by the host's path
        (OF_A_CONTAINER, "4:memory:/docker/abc/part", {
            "memory/memory.limit_in_bytes": str(2 * GiB), "memory/part/memory.limit_in_bytes": str(GiB)}, (GiB, 0)),
        (OF_A_CONTAINER, "4:memory:/", {"memory/memory.limit_in_bytes": str(2 * GiB)}, (2 * GiB, 0)),
        (ELSEWHERE, "4:cpu,memory:/a", {"a/memory.limit_in_bytes": str(GiB)}, (GiB, 0)),
        ("", "", {"memory.max": str(GiB)}, (GiB, 0)),
        ("", "", {"memory/memory.limit_in_bytes": str(GiB)}, (GiB, 0)),
    ],
)  # fmt: skip
def test_memory_limits_of_every_group_hold(tmp_path, mounts, own, files, expected):
    root = recorded(tmp_path, mounts, own, files)
    assert group_memory(root) == expected
    write(root, {"proc/meminfo": "MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable:  6291456 kB"})
    limit, used = expected
    assert probe.memory(root) == ((limit, limit - used) if limit else (8 * GiB, 6 * GiB))


@pytest.mark.parametrize(
    ("mounts", "own", "files", "expected"),
    [
        (VERSION_2, "0::/", {}, 8),
        (VERSION_2, "0::/", {"cpu.max": "max 100000"}, 8),
        (VERSION_2, "0::/", {"cpu.max": "250000 100000"}, 2),
        (VERSION_2, "0::/", {"cpu.max": "10000 100000"}, 1),
        (VERSION_2, "0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        (VERSION_2, "0::/a/b", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        (VERSION_2, "0::/", {"cpu.max": "6400000 100000"}, 8),
        (VERSION_1, "3:cpu,cpuacct:/job\n0::/", {"cpu,cpuacct/job/cpu.cfs_quota_us": "400000",
                                                 "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 4),
        (VERSION_1, "3:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1",
                                        "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 8),
        (ELSEWHERE, "3:memory,cpu:/a/b", {"a/cpu.cfs_quota_us": "150000", "a/cpu.cfs_period_us": "50000"}, 3),
        ("", "3:cpu:/job", {"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "100000"}, 1),
        ("", "", {}, 8),
    ],
)  # fmt: skip
def test_quotas_of_every_group_hold(tmp_path, monkeypatch, mounts, own, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert probe.available_cores(recorded(tmp_path, mounts, own, files)) == expected


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


def test_libraries_start_no_more_threads_than_the_command():
    """Torch looks at neither ``--threads`` nor a quota."""
    code = """
import os
from bitladder.cli.build import working
with working(1):
    import torch
    print(torch.get_num_threads())
print("OMP_NUM_THREADS" in os.environ)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "False"]
    own = {**environment, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=own)
    assert done.stdout.split() == ["2", "True"]


def test_a_machine_is_what_its_tree_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    root = recorded(tmp_path, VERSION_2, "0::/job", {
        "job/memory.max": str(600 * MiB), "job/memory.current": str(200 * MiB), "job/cpu.max": "100000 100000"
    })  # fmt: skip
    write(root, {"proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable:  6291456 kB"})
    machine = probe.probe_machine(root=root)
    assert (machine.ram_total, machine.ram_available, machine.cores) == (600 * MiB, 400 * MiB, 1)


def test_without_linux_files_psutil_says_what_memory_there_is(tmp_path):
    assert probe.memory(tmp_path / "nowhere")[0] == psutil.virtual_memory().total


TWO = """NVIDIA GeForce GTX 1080 Ti, 11264, 11000, GPU-11aa, [N/A]
NVIDIA GeForce RTX 4090, 24564, 23000, GPU-22bb, [N/A]
"""
ALIKE = "".join(f"NVIDIA A100-SXM4-80GB, 81920, 8100{at}, GPU-{at}{at}-1, Disabled\n" for at in range(4))
CUT = """NVIDIA A100-SXM4-40GB, 40960, 40000, GPU-11aa, Enabled
NVIDIA A100-SXM4-40GB, 40960, 40000, GPU-22bb, Enabled
"""
CUT_LIST = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-11aa)
  MIG 3g.20gb     Device  0: (UUID: MIG-aa1)
  MIG 1g.5gb+me   Device  1: (UUID: MIG-aa2)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-22bb)
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A driver's program that answers as recorded: ``driver(query, listing, old=False)``."""

    def set_up(query, listing="", *, old=False):
        write(tmp_path, {"query": query.rstrip("\n"), "listing": listing.rstrip("\n")})
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        refused = '*mig.mode*) echo "Field is not a valid field to query."; exit 2;;' if old else ""
        answer = f"case $1 in {refused} -L) cat {tmp_path}/listing;; *) cat {tmp_path}/query;; esac"
        program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{answer}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

    return set_up


def free(machine):
    return [gpu.vram_free // MiB for gpu in machine.gpus]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (None, [81000, 81001, 81002, 81003]),
        ("2", [81002]),
        ("3,1", [81003, 81001]),
        (" 1 , 0 ", [81001, 81000]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,9,1", [81000]),  # the first that is not there ends the list
        ("0,x,1", [81000]),
        ("1,1", []),  # named twice: none
        ("GPU-22", [81002]),
        ("GPU-33-1,0", [81003, 81000]),
        ("GPU-", []),  # of several
        ("٣", []),
        ("9" * 5000, []),
    ],
)
def test_gpus_are_those_that_cuda_shows(driver, monkeypatch, wish, expected):
    driver(ALIKE)
    if wish is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wish)
    machine = probe.probe_machine()
    assert free(machine) == expected
    assert not machine.unified


def test_numbers_of_unlike_gpus_follow_cudas_order(driver, monkeypatch):
    driver(TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert free(probe.probe_machine()) == [11000]
    monkeypatch.delenv("CUDA_DEVICE_ORDER")  # the fastest first, where the tables know both
    assert free(probe.probe_machine()) in ([23000], [11000])
    driver(TWO.replace("GTX 1080 Ti", "RTX 3090"))
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [gpu.name for gpu in probe.probe_machine().gpus] == ["NVIDIA GeForce RTX 4090"]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [(None, 20), ("MIG-aa2", 5), ("MIG-aa1,MIG-aa2", 20), ("0", 20), ("1", None), ("GPU-22bb", None)],
)
def test_of_a_divided_gpu_one_instance_is_seen(driver, monkeypatch, wish, expected):
    driver(CUT, CUT_LIST)
    if wish is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wish)
    assert [gpu.vram_total for gpu in probe.probe_machine().gpus] == ([expected * GiB] if expected else [])


def test_drivers_that_know_no_instances(driver):
    driver("Tesla K80, 11441, 11000, GPU-1", old=True)
    assert free(probe.probe_machine()) == [11000]


@pytest.mark.parametrize("name", ["NVIDIA GB10", "Orin (nvgpu)"])
def test_a_gpu_that_shares_the_memory_is_planned_within_it(driver, name):
    driver(f"{name}, [N/A], [N/A], GPU-1, [N/A]")
    machine = probe.probe_machine()
    assert machine.unified
    assert [(gpu.name, gpu.vram_total) for gpu in machine.gpus] == [(name, machine.ram_total)]
    assert machine.vram_total == 0
    assert f"{name} in the same memory" in machine.summary
    check_machine(machine)
    shown = CliRunner().invoke(app, ["machine"]).output
    assert "in the same memory as the processor" in shown
    assert "!" not in shown


@pytest.mark.parametrize("word", ["[Unknown Error]", "[GPU is lost]", "ERR!", "[Insufficient Permissions]", ""])
def test_a_gpu_that_reports_nothing_is_told(driver, word):
    driver(f"NVIDIA L4, {word}, {word}, GPU-1, [N/A]\nNVIDIA A10, 23028, 22000, GPU-2, [N/A]\nbroken\n")
    machine = probe.probe_machine()
    assert free(machine) == [22000]
    assert not machine.unified
    assert f"NVIDIA L4 reports no memory ({word})" in CliRunner().invoke(app, ["machine"]).output


def test_a_driver_that_fails(driver, tmp_path):
    driver("")
    (tmp_path / "bin" / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'has failed because it could not communicate'; exit 9"
    )
    assert probe.probe_machine().gpus == ()


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path):
    assert probe.disk_free(tmp_path / "a" / "b") == probe.disk_free(tmp_path)


def test_what_others_take_of_the_processor(monkeypatch):
    """Eight seconds pass on all cores, six of them busy, two of those ours."""
    seconds = iter([(100.0, 50.0, 5.0), (108.0, 56.0, 7.0)])
    monkeypatch.setattr("bitladder.files.probe._processor_seconds", lambda: next(seconds))
    with probe.OtherLoad() as others:
        pass
    assert others.share == 0.5


@pytest.mark.parametrize(("share", "unused"), [(0.0, 4), (0.25, 3), (1.0, 0), (math.nan, math.inf)])
def test_cores_that_others_leave(monkeypatch, share, unused):
    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    monkeypatch.setattr(probe.OtherLoad, "__exit__", lambda self, *_: setattr(self, "share", share))
    assert probe.unused_cores(0) == unused


def test_a_busy_process_leaves_less(tmp_path):
    """Not a child of ours, as others' processes are not."""
    (tmp_path / "busy.py").write_text(
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\n"
        "end = time.time() + 20\nwhile time.time() < end: pass\n"
    )
    subprocess.run(["sh", "-c", f"{sys.executable} busy.py &"], cwd=tmp_path, check=True)
    deadline = time.monotonic() + 10
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    try:
        assert probe.unused_cores(0.5) < psutil.cpu_count() - 0.3
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
