import json

import pytest

from bitladder.describe.machine import Machine
from bitladder.describe.rates import MeasuredMachine, PoolRates
from bitladder.errors import BadFile
from bitladder.files import measured
from bitladder.files.gguf import read_header
from bitladder.files.hollow import N_VOCAB, write_hollow
from bitladder.stages import measure_machine as stage
from bitladder.units import GiB

MACHINE = Machine("cpu", 2, (), 8 * GiB, 6 * GiB, GiB)
STREAM = {"F16": 2e10, "Q4_K": 1e10}
TRUE = {"layer": 3e-5, "token": 2e-4, "prompt": 4e-3, "kv": 5e9, "matmul": 1e11, "attention": 5e10}


class FakeServer:
    """An engine that takes exactly as long as the model of speed says."""

    def __init__(self, path, **_):
        self.model = read_header(path)
        self.process = self
        self.engine = "fake 1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def time_tokens(self, tokens, *, max_tokens):
        dims, count = self.model.dims, len(tokens)
        layers = [t for t in self.model.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
        qtype = layers[0].qtype
        stream = STREAM.get(qtype, 1e10)
        width = dims.n_head_kv * dims.head_dim_k
        token = TRUE["token"] + dims.n_layer * TRUE["layer"] + sum(t.nbytes for t in layers) / stream
        token += dims.n_layer * 2 * width * 2 * count / TRUE["kv"]
        prompt = TRUE["prompt"] + dims.n_layer * TRUE["layer"]
        prompt += 2 * sum(t.elements for t in layers) * count / TRUE["matmul"]
        prompt += dims.n_layer * 2 * dims.n_head * 2 * dims.head_dim_k * count**2 / 2 / TRUE["attention"]
        return {"prompt_ms": 1e3 * prompt, "predicted_ms": 1e3 * token * (max_tokens - 1), "predicted_n": max_tokens}


def test_rates_are_recovered_from_timings():
    found = stage.measure_machine(MACHINE, engine=FakeServer)
    rates = found.rates
    assert rates.source == "measured"
    assert rates.layer_s == pytest.approx(TRUE["layer"], rel=0.3)
    assert rates.stream_of("F16") == pytest.approx(2e10, rel=0.05)
    assert rates.stream_of("Q4_K") == pytest.approx(1e10, rel=0.05)
    assert rates.matmul_of("Q6_K") == pytest.approx(1e11, rel=0.05)
    assert rates.kv_stream == pytest.approx(5e9, rel=0.05)
    assert rates.attention == pytest.approx(5e10, rel=0.25)
    assert found.ram_read > 1e8
    assert found.engine == "fake 1"


@pytest.mark.model
def test_a_hollow_model_runs_in_the_engine(tmp_path):
    from bitladder.engines.llama import LlamaServer

    write_hollow(tmp_path / "h.gguf", stage._THIN, "Q4_0")
    with LlamaServer(tmp_path / "h.gguf", n_ctx=256, threads=2) as server:
        timings = server.time_tokens([40] * 8, max_tokens=4)
    assert timings["predicted_n"] == 4
    assert timings["prompt_ms"] > 0


def test_a_devices_rates_have_the_right_size():
    import torch

    from bitladder.engines.gpu_rates import measure_device

    found = measure_device(torch.device("cpu"), size=1 << 22, edge=128)
    assert set(found) == {"read", "f16_matmul", "from_host"}
    assert all(1e6 < rate < 1e15 for rate in found.values())


def test_hollow_files_take_no_space(tmp_path):
    size = write_hollow(tmp_path / "h.gguf", stage._WIDE, "F16")
    assert size == 2 * stage._weights(stage._WIDE)
    assert (tmp_path / "h.gguf").stat().st_blocks * 512 < 1 << 20
    assert read_header(tmp_path / "h.gguf").dims.n_vocab == N_VOCAB


def test_a_measurement_is_kept_per_machine():
    rates = PoolRates({"F16": 1.0}, {"F16": 2.0}, 3.0, 4.0, 5.0, 6.0, 7.0, "measured")
    found = MeasuredMachine(measured.machine_key(MACHINE), "e", "2026-01-31T00:00:00+00:00", 9.0, rates, 1.0, 2.0, 3.0)
    assert measured.load_measured(MACHINE) is None
    path = measured.save_measured(found)
    assert measured.load_measured(MACHINE) == found
    assert measured.load_measured(Machine("cpu", 4, (), 8 * GiB, 6 * GiB, GiB)) is None
    path.write_text(json.dumps({"rates": {}}))
    with pytest.raises(BadFile, match="no stored measurement"):
        measured.load_measured(MACHINE)
