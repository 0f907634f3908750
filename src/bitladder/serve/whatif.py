"""What the page asks of a run beside its record.

``/bitladder/api/what-if``: the decision again, with another memory, context or bar, by the program's own policy.
``/bitladder/api/answers``: what changed in each level's answers, in the report's own words.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from bitladder.errors import BadInput, UsageError
from bitladder.plan.whatif import what_if
from bitladder.records import to_json
from bitladder.records.run import RunRecord
from bitladder.report.behaviour import behaviour_lines
from bitladder.report.reading import read_run
from bitladder.report.tables import evidence_tables
from bitladder.report.wording import answers_view

_MOST = {"memory": 1 << 50, "ctx": 1 << 27}
_LONGEST_BAR = 500


async def answer_what_if(run_json: Path, query: Mapping[str, str]) -> dict[str, Any]:
    """Plan and decision for ``memory`` (bytes), ``ctx`` (tokens) and ``bar``, each as in the run when left out.

    Raises:
        HTTPException: 400 for a value that cannot be used, 404 when the run cannot be read.
    """
    bar = query.get("bar")
    if bar is not None and len(bar) > _LONGEST_BAR:
        raise HTTPException(400, f"A bar has at most {_LONGEST_BAR} characters; got {len(bar)} instead.")
    memory, context = _whole(query, "memory"), _whole(query, "ctx")
    try:
        run = await asyncio.to_thread(stored_run, run_json)
        plan, decision = what_if(run, budget_bytes=memory, n_ctx=context, bar=bar)
    except BadInput as error:
        raise HTTPException(404, str(error)) from None
    except UsageError as error:
        raise HTTPException(400, str(error)) from None
    return {"plan": to_json(plan), "decision": to_json(decision)}


async def answer_changes(run_json: Path) -> dict[str, Any]:
    """What changed in the answers of each level, as ``report.wording`` and ``report.behaviour`` write it, and
    the tables of ``report.tables``.

    Raises:
        HTTPException: 404 when the run cannot be read.
    """
    try:
        run = await asyncio.to_thread(stored_run, run_json)
    except BadInput as error:
        raise HTTPException(404, str(error)) from None
    view, behaviour = answers_view(run), behaviour_lines(run)
    for row in view["rows"]:
        row["notes"] = "; ".join(filter(None, (row["notes"], behaviour.get(row["level"]))))
    return view | {"tables": to_json(evidence_tables(run))}


def stored_run(run_json: Path) -> RunRecord:
    """The run as it now lies there. A slider asks many times a second, and reading takes longer than deciding."""
    try:
        seen = run_json.stat()
    except OSError:
        return read_run(run_json)
    return _read(run_json, seen.st_mtime_ns, seen.st_size)


@functools.lru_cache(maxsize=1)
def _read(run_json: Path, _changed: int, _size: int) -> RunRecord:
    return read_run(run_json)


def _whole(query: Mapping[str, str], name: str) -> int | None:
    """A positive whole number, or None where there is none."""
    text = query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 20 and 0 < int(text) <= _MOST[name]):
        raise HTTPException(400, f"'{name}' must be a whole number from 1 to {_MOST[name]}.")
    return int(text)
