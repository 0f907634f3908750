"""Which type each tensor gets: the least predicted loss that a budget of bytes allows, or the fewest bytes for a loss.

A multiple-choice knapsack: one type per group of tensors, a loss and some costs for each choice, and a limit on each
cost. Solved exactly (to a stated gap) as a mixed-integer linear program by scipy's HiGHS. Dominated choices, larger
and no better than another of the same group, are left out first.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from bitladder.errors import NothingFits

_GAP = 1e-4
"""Share of the optimum within which a solution counts as one: far below what predictions are good for."""
_SECONDS = 30.0


@dataclass(frozen=True)
class TypeChoice:
    """One type for one group: what it loses and what it costs, by the names of the limits (``bytes`` and others)."""

    qtype: str
    loss: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that must have one type (fused ones), with the types they may have."""

    name: str
    choices: tuple[TypeChoice, ...]


@dataclass(frozen=True)
class Allocation:
    """A type per group, the loss predicted in all, and the total of every cost."""

    qtypes: Mapping[str, str]
    loss: float
    costs: Mapping[str, float]


def least_loss(groups: Sequence[TensorGroup], limits: Mapping[str, float]) -> Allocation:
    """The least loss within ``limits``, a limit for each cost that is bounded.

    Raises:
        NothingFits: a limit lies below the least that the cheapest types cost.
    """
    for cost, limit in limits.items():
        least = sum(min(choice.costs.get(cost, 0.0) for choice in group.choices) for group in groups)
        if least > limit:
            raise NothingFits(
                f"{cost}: {limit:,.6g} are allowed, the cheapest types take {least:,.6g}.",
                means="No recipe of these types is that small.",
                do="Allow more, or take a smaller model.",
            )
    return _solve(groups, "loss", limits)


def fewest(cost: str, groups: Sequence[TensorGroup], limits: Mapping[str, float], *, loss: float) -> Allocation:
    """The least of one cost with a predicted loss of at most ``loss`` and within the other limits.

    Raises:
        NothingFits: even the most precise types lose more.
    """
    least = sum(min(choice.loss for choice in group.choices) for group in groups)
    if least > loss:
        raise NothingFits(
            f"A loss of {loss:g} is asked for; the most precise types allowed are predicted to lose {least:.3g}.",
            means="No recipe of these types comes that close to the source.",
            do="Ask for a larger loss, or take the source itself.",
        )
    return _solve(groups, cost, {**limits, "loss": loss})


def _value(choice: TypeChoice, what: str) -> float:
    return choice.loss if what == "loss" else choice.costs.get(what, 0.0)


def _undominated(group: TensorGroup, measures: Sequence[str]) -> list[TypeChoice]:
    """Choices that no other one of the group beats in every measure; of equal ones the first."""
    kept: list[TypeChoice] = []
    rows = [[_value(choice, measure) for measure in measures] for choice in group.choices]
    for at, row in enumerate(rows):
        beaten = any(
            all(b <= a for a, b in zip(row, other, strict=True)) and (other != row or number < at)
            for number, other in enumerate(rows)
            if number != at
        )
        if not beaten:
            kept.append(group.choices[at])
    return kept


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """HiGHS prints lines of its own debugging to the C library's stdout, whatever it is told; --json goes there too."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what it buffered goes nowhere too, after an error as well
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _solve(groups: Sequence[TensorGroup], objective: str, limits: Mapping[str, float]) -> Allocation:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    measures = [objective, *limits]
    open_choices = [_undominated(group, measures) for group in groups]
    flat = [choice for choices in open_choices for choice in choices]
    owner = np.repeat(np.arange(len(groups)), [len(choices) for choices in open_choices])
    goal = np.array([_value(choice, objective) for choice in flat])
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(groups), len(flat)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for measure, limit in limits.items():
        row = np.array([[_value(choice, measure) for choice in flat]])
        scale = max(abs(limit), np.finfo(float).tiny)  # limits of 1e9 bytes and 1e-2 loss alike, as solvers want
        constraints.append(LinearConstraint(row / scale, -np.inf, limit / scale))
    with _nothing_printed():
        found = milp(
            goal / max(goal.max(initial=0), np.finfo(float).tiny),
            constraints=constraints,
            integrality=np.ones(len(flat), np.int64),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    if found.x is None:
        raise NothingFits(
            "No choice of types meets all limits together: " + ", ".join(f"{k} {v:,.4g}" for k, v in limits.items()),
            means="Each limit can be met alone, not all at once.",
            do="Loosen one of them.",
        )
    chosen = [flat[at] for at in np.flatnonzero(found.x > 0.5)]
    names = sorted({cost for choice in flat for cost in choice.costs})
    return Allocation(
        {group.name: choice.qtype for group, choice in zip(groups, chosen, strict=True)},
        sum(choice.loss for choice in chosen),
        {name: sum(choice.costs.get(name, 0.0) for choice in chosen) for name in names},
    )
