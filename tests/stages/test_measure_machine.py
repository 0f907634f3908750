import json

import pytest

from bitladder.describe.machine import Machine
from bitladder.describe.rates import MeasuredMachine, PoolRates
from bitladder.describe.shapes import Shape
from bitladder.engines.base import Identity, Launch
from bitladder.errors import BadFile
from bitladder.files import measured
from bitladder.files.gguf import read_header
from bitladder.files.stub_gguf import N_VOCAB, write_stub
from bitladder.formats.parts import parts_of
from bitladder.plan.cost import LevelBytes
from bitladder.plan.placement import Usage, place
from bitladder.plan.search import MachineRates, shares_of
from bitladder.plan.speed import decode_seconds, prefill_seconds
from bitladder.stages import measure_machine as stage
from bitladder.units import GiB

MACHINE = Machine("cpu", 2, (), 8 * GiB, 6 * GiB, GiB)
STREAM = {"F16": 2e10, "Q4_K": 1e10}
ROW = {"F16": 2e-8}
TRUE = {
    "layer": 3e-5, "token": 2e-4, "prompt": 4e-3, "kv": 5e9, "matmul": 1e11, "prompt_row": 1e-9, "attention": 5e10,
}  # fmt: skip


class FakeServer:
    """An engine that takes exactly as long as the model of speed says."""

    def __init__(self, launch):
        self.model = read_header(launch.path)
        self.identity = Identity("fake", "1")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def time_tokens(self, tokens, *, max_tokens, again=False):
        dims, count = self.model.dims, len(tokens)
        layers = [t for t in self.model.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
        last = [t for t in layers if t.name.startswith(f"blk.{dims.n_layer - 1}.ffn")]
        qtype = layers[0].qtype
        stream, row = STREAM.get(qtype, 1e10), ROW.get(qtype, 0.0)
        heads = dims.n_layer * 2 * dims.n_head * dims.head_dim_k * 2
        fixed = dims.n_layer * TRUE["layer"]
        token = TRUE["token"] + fixed + sum(t.nbytes for t in layers) / stream + sum(t.shape[0] for t in layers) * row
        token += heads * (count + max_tokens / 2) / TRUE["kv"]
        computed = [t for t in layers if t not in last]
        prompt = TRUE["prompt"] + fixed + sum(t.nbytes for t in last) / stream
        prompt += 2 * sum(t.elements for t in computed) * count / TRUE["matmul"]
        prompt += sum(t.shape[0] for t in computed) * count * TRUE["prompt_row"]
        prompt += heads * count**2 / 2 / TRUE["attention"]
        return {"prompt_ms": 1e3 * prompt, "predicted_ms": 1e3 * token * (max_tokens - 1), "predicted_n": max_tokens}


def test_rates_are_recovered_from_timings():
    found = stage.measure_machine(MACHINE, engine=FakeServer)
    rates = found.rates
    assert rates.source == "measured"
    assert rates.layer_s == pytest.approx(TRUE["layer"], rel=0.05)
    assert rates.token_s == pytest.approx(TRUE["token"], rel=0.05)
    assert rates.prompt_s == pytest.approx(TRUE["prompt"], rel=0.05)
    assert rates.stream_of("F16") == pytest.approx(2e10, rel=0.02)
    assert rates.row_of("F16") == pytest.approx(2e-8, rel=0.05)
    assert rates.stream_of("Q4_K") == pytest.approx(1e10, rel=0.02)
    assert rates.row_of("Q4_K") == pytest.approx(0, abs=5e-10)
    assert rates.matmul_of("Q6_K") == pytest.approx(1e11, rel=0.03)
    assert rates.prompt_row_of("Q6_K") == pytest.approx(1e-9, rel=0.1)
    assert rates.heads_stream == rates.kv_stream == pytest.approx(5e9, rel=0.05)
    assert rates.attention == pytest.approx(5e10, rel=0.1)
    assert rates.noise == 1
    assert found.ram_read > 1e8
    assert found.engine == "fake 1"


def test_what_was_measured_predicts_a_model_that_was_not(tmp_path):
    """The whole chain, against an engine whose times are known: a model of other shape, in types of both kinds."""
    rates = MachineRates(stage.measure_machine(MACHINE, engine=FakeServer).rates)
    shape = Shape("other", "llama", 12, 1024, 3072, 16, 16, N_VOCAB, 4096, tied=True)
    path = tmp_path / "other.gguf"
    for qtype in ("F16", "Q4_K"):
        write_stub(path, shape, qtype)
        model = read_header(path)
        level = LevelBytes(qtype, parts_of([t for t in model.tensors if t.name.startswith("blk.")]))
        shares = shares_of(model, level, place(model, level, MACHINE, Usage(2048)), rates)
        engine = FakeServer(Launch(path))
        for count in (64, 512):
            took = engine.time_tokens([1] * count, max_tokens=24)
            token = took["predicted_ms"] / 1e3 / 23
            assert decode_seconds(shares, model, count + 12) == pytest.approx(token, rel=0.05)
            assert prefill_seconds(shares, model, count) == pytest.approx(took["prompt_ms"] / 1e3, rel=0.07)


def test_rows_never_cost_less_than_nothing():
    assert stage._two_costs((2.0, 100.0, 1.0), (1.0, 100.0, 50.0)) == (pytest.approx(3 / 200), 0.0)
    unit, row = stage._two_costs((100 * 0.01 + 1 * 0.5, 100.0, 1.0), (100 * 0.01 + 50 * 0.5, 100.0, 50.0))
    assert (unit, row) == (pytest.approx(0.01), pytest.approx(0.5))


@pytest.mark.model
def test_a_hollow_model_runs_in_the_engine(tmp_path):
    from bitladder.engines.registry import start

    write_stub(tmp_path / "h.gguf", stage._THIN, "Q4_0")
    with start(Launch(tmp_path / "h.gguf", n_ctx=256, threads=2)) as server:
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
    size = write_stub(tmp_path / "h.gguf", stage._WIDE, "F16")
    assert size == 2 * stage._WIDE.n_layer * stage._matrices(stage._WIDE)[0]
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
