"""A short run of the fuzzer of each kind of input, from a fixed seed; `scripts/fuzz MINUTES` runs them for longer."""

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("fuzz_inputs", Path(__file__).parent / "inputs.py")
inputs = sys.modules["fuzz_inputs"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(inputs)

ROUNDS = 40


@pytest.mark.parametrize("kind", inputs.FUZZED)
def test_hostile_inputs_end_in_our_error_or_a_result(kind, monkeypatch):
    monkeypatch.setattr(inputs, "MOST_S", 20.0)  # a machine that is busy, or tested on for the first time
    found = list(inputs.rounds([kind], 0, lambda number: number == ROUNDS))
    assert not found, "\n".join(f"{one.kind} {one.seed}: {one.what}" for one in found)


@pytest.mark.parametrize("fault", [ValueError("x"), RecursionError(), KeyError("x"), SystemError()])
def test_a_finding_is_found(fault, monkeypatch):
    def breaks(*_):
        raise fault

    monkeypatch.setitem(inputs.FUZZED, "documents", inputs.FUZZED["documents"]._replace(read=breaks))
    [found] = inputs.rounds(["documents"], 0, lambda number: number == 1)
    assert type(fault).__name__ in found.what
