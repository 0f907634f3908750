"""Types for a budget: as good as trying everything, and clear about what cannot be."""

import ctypes
from itertools import product

import numpy as np
import pytest

from bitladder.errors import NothingFits
from bitladder.plan import allocate
from bitladder.plan.allocate import TensorGroup, TypeChoice, fewest, least_loss


def _groups(seed, count=6):
    rng = np.random.default_rng(seed)

    def choice(number, size, bits):
        costs = {"bytes": float(size * bits), "vram": float(size * bits * (number % 2))}
        return TypeChoice(f"q{bits}", float(rng.lognormal(0, 1.5) * 4.0**-bits), costs)

    return [
        TensorGroup(str(number), tuple(choice(number, size, bits) for bits in (2, 3, 4, 6)))
        for number, size in enumerate(rng.integers(1, 9, count))
    ]


def _everything(groups):
    for chosen in product(*(group.choices for group in groups)):
        yield (
            sum(choice.loss for choice in chosen),
            {cost: sum(choice.costs[cost] for choice in chosen) for cost in ("bytes", "vram")},
        )


@pytest.mark.parametrize("seed", range(5))
def test_as_good_as_trying_everything(seed):
    groups = _groups(seed)
    limits = {"bytes": 100.0, "vram": 45.0}
    best = min(
        (loss for loss, costs in _everything(groups) if all(costs[name] <= limits[name] for name in limits)),
        default=None,
    )
    if best is None:
        with pytest.raises(NothingFits):
            least_loss(groups, limits)
        return
    found = least_loss(groups, limits)
    assert found.loss == pytest.approx(best, rel=1e-3)
    assert all(found.costs[name] <= limits[name] for name in limits)


@pytest.mark.parametrize("seed", range(5))
def test_the_fewest_bytes_for_a_loss(seed):
    groups = _groups(seed)
    loss = float(np.median([loss for loss, _ in _everything(groups)]))
    best = min(costs["bytes"] for own, costs in _everything(groups) if own <= loss)
    found = fewest("bytes", groups, {}, loss=loss)
    assert found.costs["bytes"] == pytest.approx(best, rel=1e-3)
    assert found.loss <= loss * (1 + 1e-6)


def test_what_cannot_be_is_said_with_numbers():
    groups = _groups(0)
    least = sum(min(choice.costs["bytes"] for choice in group.choices) for group in groups)
    with pytest.raises(NothingFits, match=f"{least:,.6g}"):
        least_loss(groups, {"bytes": least - 1})
    with pytest.raises(NothingFits, match="most precise"):
        fewest("bytes", groups, {}, loss=1e-12)


def test_what_the_solver_prints_reaches_nobody(capfd):
    """HiGHS prints lines of debugging through the C library, to where --json goes."""
    library = ctypes.CDLL(None)
    with allocate._nothing_printed():
        library.puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution")
    library.puts(b"kept")
    library.fflush(None)
    assert capfd.readouterr().out == "kept\n"
