"""Golden tests share one run of the commands."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import make


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sources and products."""
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="session")
def made(world: Path) -> dict[str, Any]:
    """What this checkout's commands make of the tiny models, as golden.json holds it."""
    return make.compact(make.results(world, tested=True))
