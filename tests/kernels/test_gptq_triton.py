"""The kernel for CUDA, run by Triton's interpreter on the CPU, chooses the codes that the loop chooses."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "triton_codes.py"


def test_codes_are_the_loops():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (pip install triton; builds of torch for CUDA bring it)")
    command = [sys.executable, str(SCRIPT)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
