"""What some criteria of a workload need: a judge model, the user's own functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.errors import UsageError
from bitladder.stages.endpoints import StoredEngine, recognised
from bitladder.stages.job import Journal

if TYPE_CHECKING:
    from bitladder.describe.criteria import Context
    from bitladder.describe.workload import Workload
    from bitladder.engines.endpoint import EndpointSettings
    from bitladder.engines.judge import Judge
    from bitladder.store.recorded import Recorded


@contextmanager
def criteria_help(
    workload: Workload,
    folder: Path,
    *,
    judge: EndpointSettings | None = None,
    trust_python: bool = False,
    recorded: Recorded | None = None,
    journal: Journal | None = None,
) -> Iterator[Context]:
    """A context for ``judge_answers`` with all that the workload needs, checked before anything is run.

    Args:
        workload: its criteria say what is needed; nothing else is opened.
        folder: where the workload's own modules lie.
        judge: the judge model's endpoint.
        trust_python: whether the workload's own functions may run.
        recorded: where the judge's replies are kept, so that none is paid for twice; None keeps none.
        journal: hears how good the judge is on labelled examples.

    Raises:
        UsageError: something that is needed was not given, or a judge that nothing asks.
        BadWorkload: a function cannot be imported.
        WrongModel: the judge's endpoint does not serve the judge.
    """
    from bitladder.describe.criteria import Context
    from bitladder.engines.endpoint import Endpoint
    from bitladder.engines.judge import Judge
    from bitladder.files.workloads import trusted_functions
    from bitladder.stages.evaluate import check_help

    if judge is not None and "judge" not in workload.kinds:
        raise UsageError(
            f"A judge is named, and nothing in the workload '{workload.name}' asks one.",
            do="Leave it out, or give a workload with a criterion 'judge'.",
        )
    with ExitStack() as stack:
        functions = stack.enter_context(trusted_functions(workload, folder, trust=trust_python))
        asked = None
        if judge is not None:
            endpoint = stack.enter_context(Endpoint(judge))
            endpoint.probe()
            journal = journal or Journal()
            if recorded is None:
                asked = Judge(endpoint)
            else:
                remote, _ = recognised(endpoint, judge, recorded, journal)
                asked = Judge(StoredEngine(endpoint, remote, recorded))
            _tell_error(asked, workload, journal)
        context = Context(judge=asked, functions=functions)
        check_help(workload, context)
        yield context


def _tell_error(judge: Judge, workload: Workload, journal: Journal) -> None:
    """How often the judge is wrong on examples that a person labelled."""
    from bitladder.engines.judge import judge_error

    found = judge_error(judge, workload)
    if found.examples:
        journal.warn(
            f"The judge was wrong or undecided on {found.wrong} of {found.examples} labelled examples "
            f"(error rate {found.rate.low:.0%} to {found.rate.high:.0%})."
        )
