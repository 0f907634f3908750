"""What speculative decoding gains on the user's inputs, whether answers stay the same, and what is known of a file.

Each input is asked without guesses and with each kind of them, one after the other, twice, in another order the second
time: what slows the machine down for a while slows all of them. Answers are greedy, since only those can be compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bitladder.engines.speculation import DRAFT, NGRAM, Speculation, check_draft, parse_speculation
from bitladder.errors import BadInput
from bitladder.records.speculation import Gain, SpeculationReport, SpeculationResult
from bitladder.stages.job import Work

if TYPE_CHECKING:
    from bitladder.describe.workload import Input, Workload
    from bitladder.engines.base import Running

ROUNDS = 2
LEAST_TOKENS = 8
"""Answers of fewer tokens have no rate worth comparing."""


@dataclass(frozen=True)
class SpeculateRequest:
    """What is tried on what."""

    model: str
    level: str | None = None
    """A level of the model; None for the model itself."""
    workload: Path | None = None
    drafts: Sequence[str] = ()
    """Files, or levels of the model."""
    n_ctx: int | None = None


class Asked(NamedTuple):
    """One answer: its text, seconds per decoded token (NaN where there are too few), guesses and those accepted."""

    text: str
    seconds: float
    drafted: int
    accepted: int


def try_speculation(request: SpeculateRequest, work: Work) -> SpeculationReport:
    """Measure n-gram guesses, and those of each draft.

    Raises:
        BadInput: a draft is no model, or has another tokenizer; a file that is not there.
        UnknownLevel, BadWorkload, EngineError: as the parts say.
    """
    from bitladder.files.workloads import STARTER, load_workload
    from bitladder.stages.run_facts import engine_facts, slots
    from bitladder.stages.serve import tier_context
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    workload = load_workload(request.workload or STARTER)
    target = _file(request.model, request.level, work)
    n_ctx = tier_context("", str(target), request.n_ctx, work.progress)
    modes = [Speculation(NGRAM)]
    for what in request.drafts:
        # a file is checked before a level is built
        speculation = parse_speculation(f"{DRAFT}:{what}") if Path(what).is_file() else None
        speculation = speculation or Speculation(DRAFT, _file(request.model, what, work))
        check_draft(target, speculation)
        modes.append(speculation)
    room, _ = slots(workload, n_ctx)
    asked = _ask(target, modes, workload, room, work)
    report = report_of(target.stem, workload, modes, asked, {mode: _extra_bytes(mode, room) for mode in modes})
    if workload.temperature:
        report = replace(report, warnings=("The workload samples; guesses are compared on greedy answers.",))
    with Evidence.open() as store:
        facts = engine_facts(n_ctx=room, n_parallel=1, threads=work.threads, path=target)
        recorded = Recorded(store)
        for mode, result in zip(modes, report.results, strict=True):
            recorded.keep_speculation(_sha(target), _sha(mode.draft), workload.hash, facts, result)
    return report


def known_to_pay(path: Path, threads: int) -> Speculation | None:
    """The guesses that surely pay for a file on this machine by what was measured; None where nothing is known to."""
    from bitladder.files.probe import cpu_name
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    with Evidence.open() as store:
        found = Recorded(store).speculations(_sha(path), cpu=cpu_name(), threads=threads)
    for result, draft in sorted(found, key=lambda one: -one[0].gains[0].low if one[0].gains else 0.0):
        if not (result.gains and result.pays):
            continue
        try:
            speculation = parse_speculation(result.mode)
            check_draft(path, speculation)
        except BadInput:
            continue
        if _sha(speculation.draft) == draft:
            return speculation
    return None


def _file(model: str, level: str | None, work: Work) -> Path:
    from bitladder.files.sources import resolve
    from bitladder.stages.measured_levels import latest_run, tier_file
    from bitladder.stages.serve import tier_context

    if level is None:
        return resolve(model, work.progress).path
    n_ctx = tier_context(model, level, None, work.progress)
    return tier_file(model, level, latest_run(model, work.progress), n_ctx=n_ctx, work=work).path


def _sha(path: Path | None) -> str:
    from bitladder.stages.known_files import model_sha256

    return "" if path is None else model_sha256(path)


def _extra_bytes(mode: Speculation, n_ctx: int) -> int:
    from bitladder.stages.serve import draft_bytes

    return draft_bytes(mode, n_ctx, (1,))[0]


def _ask(
    target: Path, modes: Sequence[Speculation], workload: Workload, n_ctx: int, work: Work
) -> Mapping[tuple[str, Speculation | None], list[Asked]]:
    """Answers by input and mode, one of each round."""
    from bitladder.engines.base import Chat, Launch
    from bitladder.engines.llama import with_speculation
    from bitladder.engines.registry import start

    every: list[Speculation | None] = [None, *modes]
    found: dict[tuple[str, Speculation | None], list[Asked]] = {}
    launch = Launch(target, n_ctx=n_ctx, threads=work.threads)
    with ExitStack() as stack:
        engines = {mode: stack.enter_context(start(with_speculation(launch, mode))) for mode in every}
        total = ROUNDS * len(workload.inputs)
        for number in range(ROUNDS):
            order = every if number % 2 == 0 else every[::-1]
            for at, one in enumerate(workload.inputs):
                work.progress("speculation, inputs", number * len(workload.inputs) + at, total)
                for mode in order:
                    found.setdefault((one.id, mode), []).append(_answer(engines[mode], one, Chat))
        work.progress("speculation, inputs", total, total)
    return found


def _answer(engine: Running, one: Input, chat: type) -> Asked:
    done = engine.chat(chat(one.messages, one.max_tokens))
    timings = done.timings
    if timings is None:
        return Asked(done.text, math.nan, 0, 0)
    rate = timings.decode_tokens_per_s if timings.decode_tokens >= LEAST_TOKENS else math.nan
    return Asked(done.text, 1 / rate if rate > 0 else math.nan, timings.drafted, timings.accepted)


def report_of(
    name: str,
    workload: Workload,
    modes: Sequence[Speculation],
    asked: Mapping[tuple[str, Speculation | None], list[Asked]],
    extra_bytes: Mapping[Speculation, int],
) -> SpeculationReport:
    """What the answers say of each mode. Pure."""
    ids = [one.id for one in workload.inputs]
    unstable = tuple(one for one in ids if len({answer.text for answer in asked[one, None]}) > 1)
    base = {one: statistics.median(answer.seconds for answer in asked[one, None]) for one in ids}
    results = []
    for mode in modes:
        own = {one: statistics.median(answer.seconds for answer in asked[one, mode]) for one in ids}
        timed = [one for one in ids if base[one] > 0 and own[one] > 0]  # NaN is neither
        differing = tuple(
            one
            for one in ids
            if one not in unstable and {answer.text for answer in asked[one, mode]} != {asked[one, None][0].text}
        )
        groups = [("", timed)]
        groups += [
            (tag, [one.id for one in workload.inputs if tag in one.tags and one.id in timed]) for tag in workload.tags
        ]
        gains = tuple(_gain(tag, group, asked, mode, base, own) for tag, group in groups)
        rates = [1 / own[one] for one in timed]
        speed = statistics.median(rates) if rates else math.nan
        results.append(SpeculationResult(str(mode), speed, extra_bytes[mode], gains, differing))
    rates = [1 / base[one] for one in ids if base[one] > 0]
    return SpeculationReport(
        name, workload.name, len(ids), statistics.median(rates) if rates else math.nan, tuple(results), unstable
    )


def _gain(
    tag: str,
    ids: Sequence[str],
    asked: Mapping[tuple[str, Speculation | None], list[Asked]],
    mode: Speculation,
    base: Mapping[str, float],
    own: Mapping[str, float],
) -> Gain:
    """Over some inputs: the geometric mean of their ratios, with Student's interval over inputs."""
    from bitladder.stats.paired import ratio_interval

    answers = [answer for one in ids for answer in asked[one, mode]]
    ratio, low, high = ratio_interval([base[one] for one in ids], [own[one] for one in ids])
    drafted, accepted = (sum(getattr(answer, name) for answer in answers) for name in ("drafted", "accepted"))
    return Gain(tag, len(ids), drafted, accepted, ratio, low, high)
