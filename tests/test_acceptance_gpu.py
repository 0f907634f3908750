"""scripts/acceptance-gpu as a dry run: the GPU's code on torch's CPU device."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from bitladder.kernels import gpu

SCRIPT = Path(__file__).parents[1] / "scripts" / "acceptance_gpu.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("acceptance_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(importlib.sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def test_every_path_agrees_with_the_cpu(script, tmp_path, one_thread):
    assert script.main([str(tmp_path), "--device", "cpu:0", "--small"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["passed"]
    names = {check["name"] for check in found["checks"]}
    assert {"encode Q4_K", "decode Q4_K", "GPTQ codes", "feedback Q4_K", "importance matrix", "KL of levels"} <= names
    assert {*script.LEVELS, "GPTQ-4bit-g32 on cpu,cpu:0", "FB-Q4_0", "losses of types"} <= names
    page = (tmp_path / "gpu.md").read_text()
    assert "All agree" in page
    assert "A dry run" in page
    assert page.count("| yes |") == len(found["checks"])


def test_what_differs_fails(script, tmp_path, monkeypatch, one_thread):
    """A byte of a block, a path that raises, a check for which there is no time."""
    quantize = gpu.quantize_array

    def wrong(weights, qtype, *options):
        data = quantize(weights, qtype, *options)
        if qtype == "Q4_K":
            data[0, 0] ^= 1
        if qtype == "Q5_0":
            raise RuntimeError("out of | memory")
        return data

    monkeypatch.setattr(gpu, "quantize_array", wrong)
    monkeypatch.setattr(script, "GROUPS", (script.block_formats,))
    assert script.main([str(tmp_path), "--device", "cpu:0", "--small"]) == 1
    page = (tmp_path / "gpu.md").read_text()
    assert "NOT all agree" in page
    failed = {
        check["name"] for check in json.loads((tmp_path / "gpu.json").read_text())["checks"] if not check["passed"]
    }
    assert failed == {"encode Q4_K", "block_formats"}
    assert "RuntimeError: out of" in page
    assert script.main([str(tmp_path), "--device", "cpu:0", "--small", "--budget", "0"]) == 1
    assert "Not run for want of time: block_formats" in (tmp_path / "gpu.md").read_text()


def test_nothing_is_not_agreement(script):
    assert not script.Check("a", "relative", float("nan"), 1.0, 0.1, 0.1).passed
    assert np.isnan(script.relative(np.array([np.nan]), np.array([1.0])))
