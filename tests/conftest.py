"""Fixtures: the real demo model, a cache and a data folder that are nobody's."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitladder.system import spin_limit

# Before anything loads libgomp, as the command line does: beside other work compiled loops spin away 20 times theirs.
os.environ.update(spin_limit(os.environ))

from bitladder.files import demo
from bitladder.files.sources import resolve
from bitladder.stages import evaluate, speeds
from postgres_server import postgres  # noqa: F401 (a fixture)

# What tests run is decided by no speed: the least rounds are timed, and few tokens in each.
speeds.LONG_S = 0.0
evaluate.PREFILL_TOKENS, evaluate.DECODE_TOKENS = 64, 8


@pytest.fixture(autouse=True)
def private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence and settings of a test are its own; the model cache is shared, as it is for a user."""
    monkeypatch.setenv("BITLADDER_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF, fetched once into the user cache."""
    return resolve(demo.NAME).path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch and numba: with tiny matrices several would only wait for one another."""
    import numba
    import torch

    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])
