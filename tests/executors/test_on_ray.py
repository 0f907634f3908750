"""A real Ray cluster of two workers on this machine: the same bytes as here, whatever happens to workers."""

from pathlib import Path

import pytest

import tiny_models
from bitladder.executors import on_ray
from bitladder.executors.needs import Needs
from bitladder.files.gguf import GgufFile
from bitladder.stages.write_levels import quantize_levels

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """Two workers of one core."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
             object_store_memory=200 << 20)  # fmt: skip
    with on_ray.connect(None, "cpu", Needs()) as found:
        yield found
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    case = tiny_models.CASES["llama"]
    return tiny_models.write(case, tiny_models.make(case), tmp_path_factory.mktemp("model") / "tiny.gguf")


def written(source: Path, out: Path, executor=None, **options) -> dict[str, bytes]:
    with GgufFile.open(source) as file:
        made = quantize_levels(file, ["Q8_0", "Q4_K_M", "F16"], out, executor=executor, **options)
    return {one.path.name: one.path.read_bytes() for one in made}


def test_levels_are_the_same_bytes(cluster, source, tmp_path):
    assert written(source, tmp_path / "ray", cluster) == written(source, tmp_path / "here")
