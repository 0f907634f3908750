"""The smallest level that meets a bar, with as few inputs asked as the decision needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitladder.describe.criteria import Context
    from bitladder.describe.workload import Input, Workload
    from bitladder.engines.base import Engine
    from bitladder.records.evaluation import Answer
    from bitladder.stages.ladder import LadderOutcome

Open = Callable[[str], "AbstractContextManager[Engine]"]
"""Starts the engine of a level."""


def smallest_level(
    levels: Sequence[str],
    workload: Workload,
    reference: Iterable[Answer],
    open_engine: Open,
    *,
    margin: float,
    alpha: float = 0.05,
    beta: float = 0.1,
    context: Context | None = None,
    on_answer: Callable[[str, Answer], None] = lambda _level, _answer: None,
) -> LadderOutcome:
    """Search a ladder by halving; each level's engine is started at most once.

    Args:
        levels: from the largest to the smallest.
        workload: asked in part; inputs that the reference did not answer are left out.
        reference: its answers, judged.
        open_engine: starts the engine of a level.
        margin: loss of pass rate that the bar allows, as a share.
        alpha: chance that the level found does not meet the bar.
        beta: chance that a level which meets it is set aside.
        context: judge and functions, where criteria need them.
        on_answer: hears every answer with its level.

    Raises:
        UsageError: the workload needs something that is not there.
        EngineError: an engine failed; the answers before it were handed to ``on_answer``.
    """
    from bitladder.stages.evaluate import answer_workload, check_help, judge_answers, pass_shares
    from bitladder.stages.ladder import measure_ladder

    check_help(workload, context)
    expected = list(reference)
    before = pass_shares(expected)
    inputs = [one for one in workload.inputs if one.id in before]

    with ExitStack() as running:
        current: dict[str, Engine] = {}

        def ask(level: str, wanted: Sequence[Input]) -> list[float]:
            if level not in current:
                running.close()
                current.clear()
                current[level] = running.enter_context(open_engine(level))
            part = dataclasses.replace(workload, inputs=tuple(wanted))
            said = answer_workload(current[level], part, on_answer=lambda answer: on_answer(level, answer))
            shares = pass_shares(judge_answers(part, said, reference=expected, context=context))
            return [shares[one.id] - before[one.id] for one in wanted]

        return measure_ladder(levels, inputs, ask, margin=margin, alpha=alpha, beta=beta)
