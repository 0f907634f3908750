"""A real Ray cluster on this machine: the bytes that are made here, whatever happens to workers."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_checkpoints
from bitladder.errors import ClusterError, OutputError, UsageError
from bitladder.executors import on_ray
from bitladder.executors.needs import Needs
from bitladder.files.gguf import GgufFile
from bitladder.stages.write_levels import quantize_levels
from spread_walks import checkpoints, files_of, fitted, short_shards, squares

ray = pytest.importorskip("ray")

LANES = 6


@pytest.fixture(scope="module")
def started():
    """A cluster whose units take one of six lanes or several: so many of them are computed at a time."""
    try:
        ray.init(
            "local", num_cpus=3, resources={"lane": LANES}, include_dashboard=False, log_to_driver=False,
            configure_logging=False, object_store_memory=200 << 20,
        )  # fmt: skip
    except Exception as error:  # no shared memory, no ports, no time: containers differ, and Ray raises bare ones
        pytest.skip(f"Ray does not start here: {error}")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def in_shards(monkeypatch, one_thread):
    short_shards(monkeypatch)


def workers(count: int) -> on_ray.Ray:
    return on_ray.connect(None, "cpu", Needs(cpus=0, custom={"lane": LANES // count}))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint folder and its GGUF, of two layers: each is some hundred units, and states pass on once."""
    _, folder, source = tiny_checkpoints.tiny("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    return folder, source


@pytest.fixture(scope="module")
def here(model, tmp_path_factory) -> dict[str, bytes]:
    """What is written without Ray."""
    with pytest.MonkeyPatch.context() as patched:
        short_shards(patched)
        return everything(model, tmp_path_factory.mktemp("here"))


def written(source: Path, out: Path, executor=None, **options) -> dict[str, bytes]:
    with GgufFile.open(source) as file:
        made = quantize_levels(file, ["Q8_0", "Q4_K_M", "F16"], out, executor=executor, **options)
    return {one.path.name: one.path.read_bytes() for one in made}


def everything(model, out: Path, executor=None, **options) -> dict[str, bytes]:
    """GGUF levels, a GPTQ and an AWQ level, a fitted level, an importance matrix."""
    folder, source = model
    levels = ["GPTQ-4bit-g32", "AWQ-4bit-g32"]
    return {
        **written(source, out / "plain", executor, **options),
        **checkpoints(source, folder, out / "levels", executor, levels, **options),
        **fitted(source, out / "fitted", executor, **options),
        **{name: values.tobytes() for name, values in squares(source, executor, **options).items()},
    }


def test_the_bytes_are_those_made_here(started, model, here, tmp_path):
    """By one worker; others are in the tests below."""
    with workers(1) as cluster:
        found = everything(model, tmp_path, cluster)
    assert found.keys() == here.keys()
    assert [name for name in here if found[name] != here[name]] == []


def dying_once_in_each_phase(cluster: on_ray.Ray, folder: Path) -> None:
    """Each kind of unit kills its worker with SIGKILL once, when all is computed and nothing was given back yet."""
    start = cluster.start
    wrapped = {}

    class Dying:
        def __init__(self, task):
            self.task, self.threads = task, task.threads

        def compute(self, lane, unit, *held):
            found = self.task.compute(lane, unit, *held)
            phase = type(unit).__name__
            if phase == "LayerUnit":
                phase = "through" if unit.watched is not None else "finish" if unit.shared is None else "gather"
            with suppress(FileExistsError):
                (folder / phase).touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    def dying(task, unit, *held, place=None):
        return start(wrapped.setdefault(id(task), Dying(task)), unit, *held, place=place)

    cluster.start = dying


def test_a_worker_is_killed_in_every_phase(started, model, here, tmp_path, capsys):
    folder = tmp_path / "phases"
    folder.mkdir()
    with workers(3) as cluster:
        assert cluster.at_once(doing("nothing")) == 3
        dying_once_in_each_phase(cluster, folder)
        found = {
            **written(model[1], tmp_path / "plain", cluster),
            **checkpoints(model[1], model[0], tmp_path / "levels", cluster, ["GPTQ-4bit-g32"]),
        }
    assert capsys.readouterr().out == ""  # where results belong
    phases = {one.name for one in folder.iterdir()}
    assert {"through", "gather", "AddUnit", "CodeUnit", "finish"} < phases
    assert len(phases) == 6  # and pieces of GGUF levels
    assert len(found) == 4
    assert found.items() <= here.items()


class Driver:
    """``ray_driver.py`` in a process of its own."""

    def __init__(self, address: str, model: tuple[Path, Path], out: Path, waits_at: int, *resource: str) -> None:
        folder, source = model
        script = Path(__file__).parents[1] / "ray_driver.py"
        command = [sys.executable, script, address, source, folder, out, waits_at, *resource]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [str(one) for one in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment,
        )  # fmt: skip
        self.layers: list[int] = []
        self.error: dict[str, str] = {}

    def read(self, until: int | None = None) -> None:
        """Lines, until a layer is begun or the process ends."""
        for line in self._process.stdout:
            if line.startswith("layer "):
                self.layers.append(int(line.split()[1]))
                if self.layers[-1] == until:
                    return
            elif line.startswith("{"):
                self.error = json.loads(line)

    def go_on(self) -> None:
        """Past the layer that it waits at."""
        assert self._process.poll() is None, self.error
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def ended(self) -> int:
        """Its exit status; a driver whose cluster is gone must not wait for it for ever."""
        self.read()
        try:
            return self._process.wait(timeout=90)
        finally:
            self._process.kill()
            self._process.stdin.close()
            self._process.stdout.close()


def another_cluster(**options):
    """A cluster beside the one that this process is connected to."""
    from ray.cluster_utils import Cluster

    head = {"include_dashboard": False, "object_store_memory": 100 << 20, **options}
    try:
        return Cluster(initialize_head=True, head_node_args=head)
    except Exception as error:
        pytest.skip(f"Ray does not start here: {error}")


def test_the_head_is_lost_and_started_again(model, here, tmp_path):
    cluster = another_cluster(num_cpus=1, resources={"lane": 2})
    first = Driver(cluster.address, model, tmp_path / "out", 1, "lane")
    first.read(until=1)
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    first.go_on()
    assert first.ended() == 1
    assert first.error["error"] == "ClusterError"
    assert "goes on where it was" in first.error["do"]
    cluster = another_cluster(num_cpus=1, resources={"lane": 2})
    try:
        again = Driver(cluster.address, model, tmp_path / "out", -1, "lane")
        assert again.ended() == 0
        assert first.layers[:2] == [0, 1]
        assert again.layers[0] == 1  # what was stored is not done again
    finally:
        cluster.shutdown()
    assert files_of(tmp_path / "out").items() <= here.items()


def test_a_node_is_added_and_another_is_lost(model, here, tmp_path):
    """The one that joins takes over: what the other held, states of all shards, is computed again from the start."""
    quickly = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 3}
    cluster = another_cluster(num_cpus=0, _system_config=quickly)
    try:
        first = cluster.add_node(num_cpus=1, resources={"lane": 2})
        driver = Driver(cluster.address, model, tmp_path / "out", 1, "lane")
        driver.read(until=1)
        cluster.add_node(num_cpus=1, resources={"lane": 2})
        cluster.remove_node(first, allow_graceful=False)
        driver.go_on()
        assert driver.ended() == 0, driver.error
    finally:
        cluster.shutdown()
    assert files_of(tmp_path / "out").items() <= here.items()


def test_weights_are_sent_to_workers_that_cannot_read_them(started, model, here, tmp_path, monkeypatch):
    """As a file of the same name and another length on a worker's machine is another file."""
    look = on_ray._look
    monkeypatch.setattr(on_ray, "_look", lambda path: (look(path)[0] + 1, look(path)[1]))
    said: list[str] = []
    with workers(2) as cluster:
        assert cluster.lacking([model[1]]) == f"{model[1]} on {cluster._alive()[0]['NodeManagerHostname']}"
        found = everything(model, tmp_path, cluster, warn=said.append)
    assert len(said) == 4
    assert all(str(model[1]) in one for one in said)
    assert [name for name in here if found[name] != here[name]] == []


@pytest.mark.parametrize("name", ["Python", "Ray", "Bitladder", "kernels"])
def test_other_versions_are_refused(name, started, monkeypatch):
    versions = on_ray._versions
    monkeypatch.setattr(on_ray, "_versions", lambda: versions() | {name: "0.0.1"})
    with pytest.raises(UsageError, match=rf"{name} is .* and 0\.0\.1 here"):
        workers(1)


def test_other_processors_are_named(started, monkeypatch):
    versions = on_ray._versions
    monkeypatch.setattr(on_ray, "_versions", lambda: versions() | {"processor": "VAX"})
    with workers(1) as cluster:
        assert any("VAX here" in one for one in cluster.warnings)


def test_a_unit_that_no_node_can_take(started, monkeypatch):
    with pytest.raises(ClusterError, match=r"(?s)nothing.*There is: .*lane 6"):
        on_ray.connect(None, "cpu", Needs(custom={"nothing": 1}))
    monkeypatch.setattr(on_ray, "_LOOK_EVERY", 0.1)
    monkeypatch.setattr(on_ray, "_PATIENCE", 0.1)
    with workers(1) as cluster:
        cluster._needs = Needs(custom={"lost": 1})  # as when the only node that had it is gone
        cluster._known.clear()
        with pytest.raises(ClusterError, match="lost"):
            cluster.start(doing("nothing"), None).result()


def doing(what: str):
    """A task, with a class that Ray pickles by value: workers cannot import tests."""

    class Doing:
        threads = 1

        def compute(self, lane, unit, *held):
            if what == "dies":
                os._exit(1)
            if what == "lacks memory":
                raise MemoryError("cannot allocate")
            if what == "lacks memory for a tensor":
                torch.empty(1 << 50, dtype=torch.uint8)
            if what == "fails":
                raise ZeroDivisionError("by zero")
            return unit, np.arange(3)

    return Doing()


def test_what_goes_wrong_in_a_unit(started, monkeypatch):
    monkeypatch.setattr(on_ray, "_RETRIES", 0)
    with workers(1) as cluster:
        for what, words in (
            ("dies", "ended its worker"), ("lacks memory", "too little memory"),
            ("lacks memory for a tensor", "too little memory"), ("fails", "by zero"),
        ):  # fmt: skip
            begun = cluster.start(doing(what), 7)
            with pytest.raises(ClusterError, match=words):
                begun.result()
            with pytest.raises(ClusterError, match=words):
                cluster.start(doing("nothing"), 8, begun.held).result()
        begun = cluster.start(doing("nothing"), 9)
        assert begun.result() == 9
        assert cluster.fetch(begun.held).tolist() == [0, 1, 2]


def test_a_full_object_store_and_nodes_that_are_lost():
    theirs = ray.exceptions
    assert isinstance(on_ray._in_our_words(theirs.ObjectStoreFullError("full"), ""), OutputError)
    assert isinstance(on_ray._in_our_words(theirs.OutOfDiskError("full"), ""), OutputError)
    for error in (theirs.NodeDiedError("gone"), theirs.RaySystemError("gone"), theirs.GetTimeoutError("late")):
        assert "goes on where it was" in on_ray._in_our_words(error, "").do
    missing = on_ray._in_our_words(RuntimeError("ModuleNotFoundError: No module named 'bitladder'"), "on node7")
    assert isinstance(missing, UsageError)
    assert "on node7" in missing.found


def test_nobody_at_the_address():
    for address in ("ray://127.0.0.1:1", "127.0.0.1:1", "[::1]:1", "127.0.0.1:99999"):
        with pytest.raises(ClusterError, match="Nobody answers"):
            on_ray._require_listener(address)
