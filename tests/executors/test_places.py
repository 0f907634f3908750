"""Words of --on, --device and --unit-needs."""

import sys

import pytest

from bitladder.errors import UsageError
from bitladder.executors.base import Lane
from bitladder.executors.devices import Devices
from bitladder.executors.needs import Needs, parse_needs
from bitladder.executors.places import devices_named, executor_of, own_device


def test_one_device_here_needs_no_executor():
    assert executor_of("local", "cpu") is None
    assert own_device(None, " cuda:1 ") == "cuda:1"


def test_several_devices():
    assert devices_named("cpu, cuda:0,,cuda:0") == ("cpu", "cuda:0", "cuda:0")
    with executor_of("local", "cpu,cuda:0") as found:
        assert found.here == ("cpu", "cuda:0")
        assert found.device == "cuda:0"
        assert own_device(found, "cpu,cuda:0") == "cpu"


@pytest.mark.parametrize(
    ("on", "device", "needs", "words"),
    [
        ("local", ",", "", "No --device"),
        ("local", "cpu", "GPU=1", "--unit-needs is for a cluster"),
        ("ray", "cuda:0,cuda:1", "", "several devices"),
        ("rya", "cpu", "", "--on rya is no place"),
        ("ray", "cpu", "GPU", "'GPU' is not what"),
    ],
)
def test_words_that_mean_nothing(on, device, needs, words):
    with pytest.raises(UsageError, match=words):
        executor_of(on, device, needs)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for on in ("ray", "auto", "ray://10.0.0.1:10001"):
        with pytest.raises(UsageError) as caught:
            executor_of(on, "cpu")
        assert caught.value.do == "pip install 'bitladder[ray]'"


def test_needs():
    assert parse_needs("") == Needs()
    assert parse_needs("CPU=2, GPU=0.5,memory=8GB,big=1") == Needs(2.0, 0.5, 8_000_000_000, {"big": 1.0})


@pytest.mark.parametrize(
    "text", ["GPU=1.5", "GPU=-1", "GPU=nan", "GPU=inf", "GPU=", "=1", "GPU=1,GPU=1", "memory=x", "GPU=1e999"]
)
def test_needs_that_cannot_be(text):
    with pytest.raises(UsageError):
        parse_needs(text)


class Where:
    """Says on which lane a unit was computed, and passes on what it is given."""

    threads = 1

    def compute(self, lane: Lane, unit, *held):
        if unit == "fails":
            raise ValueError(unit)
        return lane.device, (unit, *held)


def test_places_of_units_do_not_depend_on_who_is_free():
    with Devices(["a", "b", "c"]) as three:
        begun = [three.start(Where(), number, place=number) for number in range(7)]
        assert [one.result() for one in begun] == list("abcabca")
        after = three.start(Where(), "after", begun[1].held, three.put("put"), place=0)
        assert three.fetch(after.held) == ("after", (1,), "put")


def test_what_a_unit_raises_reaches_those_that_wait_for_it():
    with Devices(["a", "b"]) as two:
        failed = two.start(Where(), "fails")
        for one in (failed, two.start(Where(), "after", failed.held)):
            with pytest.raises(ValueError, match="fails"):
                one.result()
