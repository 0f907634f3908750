"""A short run of each fuzzer in fuzz/; `scripts/fuzz NAME` runs one for longer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(name: str, *options: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "tests" / "fuzz" / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("which", [["--rounds", "5"], ["--small"]])
def test_the_gateway_stays_within_its_memory_whatever_clients_send(which):
    code, said = run("gateway", "--seconds", "8", "--longest", "1.5", "--clients", "12", *which)
    assert code == 0, said
    found = json.loads(said.splitlines()[-1])
    assert found["good"] > 0 and found["sent_mib"] > 20
