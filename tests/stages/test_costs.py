"""What answers cost, of the user's own prices."""

import math

import pytest

from bitladder.describe.machine import Gpu, Machine
from bitladder.engines.endpoint import EndpointSettings
from bitladder.errors import BadInput
from bitladder.files.folders import data_folder
from bitladder.records.evaluation import LevelAnswers, Speed
from bitladder.stages.costs import level_costs, prices_of
from bitladder.units import GiB

HERE = Machine("a CPU", 8, (), 64 * GiB, 60 * GiB, 1 << 40)
CLOUD = {"big": EndpointSettings("http://127.0.0.1:9/v1", "gpt-4o-mini")}
ANSWERS = [LevelAnswers(name, (), Speed(100, rate, 1)) for name, rate in (("F16", 10), ("Q4_K_M", 25), ("big", 50))]


def with_gpus(*names):
    return Machine("a CPU", 8, (), 64 * GiB, 60 * GiB, 1 << 40, tuple(Gpu(name, 24 * GiB, 24 * GiB) for name in names))


def write(text):
    path = data_folder("prices.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def costs(machine=HERE, endpoints=CLOUD, answers=ANSWERS):
    return {one.level: (one.per_million, one.basis) for one in level_costs(answers, prices_of(machine, endpoints))}


def test_without_prices_nothing_is_said():
    assert costs() == {}


def test_an_hour_of_this_machine_becomes_the_cost_of_its_tokens():
    write("machine: {hourly: 0.9, date: 2026-01-31, source: a quote}\ngpt-*: {in: 0.15, out: 0.60}\n")
    found = costs()
    assert found["F16"] == (pytest.approx(0.9 * 1e6 / 10 / 3600), "this machine at 0.9 an hour (2026-01-31, a quote)")
    assert found["Q4_K_M"][0] == pytest.approx(found["F16"][0] / 2.5)
    assert found["big"] == (0.60, "gpt-4o-mini as its row in prices.yaml says"), "not by this machine's hour"
    assert "big" not in costs(endpoints={"big": EndpointSettings("http://127.0.0.1:9/v1", "free")})
    unknown = [LevelAnswers("F16", (), Speed(math.nan, math.nan, math.nan))]
    assert costs(answers=unknown) == {}, "a level whose speed is not known"


def test_gpus_are_priced_by_the_names_of_their_drivers():
    write("gpus: {RTX 4090: {hourly: 0.4, date: 2026-01-31, source: a quote}}\n")
    assert costs(with_gpus("NVIDIA GeForce RTX 4090"))["F16"][0] == pytest.approx(0.4 * 1e6 / 10 / 3600)
    two = costs(with_gpus("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"))
    assert two["F16"][1] == "2 x NVIDIA GeForce RTX 4090 at 0.8 an hour together (2026-01-31)"
    assert costs(with_gpus("NVIDIA GeForce RTX 4090", "NVIDIA H200")) == {}, "one has no price"
    assert costs(with_gpus("Unheard of 9")) == {}
    assert costs() == {}, "a machine without GPUs"


@pytest.mark.parametrize(
    "row",
    [
        "5",
        "{hourly: 1}",
        "{hourly: -1, date: a, source: b}",
        "{hourly: .nan, date: a, source: b}",
        "{hourly: true, date: a, source: b}",
        "{hourly: x, date: a, source: b}",
    ],
)
def test_a_price_that_is_none_is_refused(row):
    write(f"machine: {row}\n")
    with pytest.raises(BadInput, match="price of the 'machine' is not complete"):
        costs()
