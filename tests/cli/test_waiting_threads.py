"""Threads that wait for one another do not keep cores from other work, unless the user has it otherwise."""

import os

import pytest

from bitladder.cli import app


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_how_long_threads_spin(given, spins, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(app, "app", lambda: None)
    app.main()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
