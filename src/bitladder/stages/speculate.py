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

from bitladder.describe.cache_types import F16_CACHE, CacheTypes
from bitladder.engines.speculation import (
    DRAFT,
    MTP,
    NGRAM,
    Speculation,
    check_speculation,
    heads_gap,
    parse_speculation,
)
from bitladder.errors import BadInput
from bitladder.records.speculation import Gain, SpeculationReport, SpeculationResult
from bitladder.stages.job import Work

if TYPE_CHECKING:
    from bitladder.describe.workload import Input, Workload
    from bitladder.engines.base import Running
    from bitladder.store.recorded import Recorded

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
    """Measure n-gram guesses, those of the model's own heads where it has some, and those of each draft.

    Raises:
        BadInput: a draft is no model, or has another tokenizer; a file that is not there.
        UnknownLevel, BadWorkload, EngineError: as the parts say.
    """
    from bitladder.files.gguf import read_header
    from bitladder.files.workloads import STARTER, load_workload
    from bitladder.stages.serve import tier_context
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    workload = load_workload(request.workload or STARTER)
    target = _file(request.model, request.level, work)
    n_ctx = tier_context("", str(target), request.n_ctx, work.progress)
    modes = [Speculation(NGRAM)] + ([] if heads_gap(read_header(target)) else [Speculation(MTP)])
    for what in request.drafts:
        # a file is checked before a level is built
        speculation = parse_speculation(f"{DRAFT}:{what}") if Path(what).is_file() else None
        speculation = speculation or Speculation(DRAFT, _file(request.model, what, work))
        check_speculation(target, speculation)
        modes.append(speculation)
    with Evidence.open() as store:
        return measured(Tried(target, tuple(modes)), workload, Recorded(store), n_ctx=n_ctx, work=work, anew=True)


@dataclass(frozen=True)
class Tried:
    """A file, and what is tried on it."""

    path: Path
    modes: tuple[Speculation, ...]
    level: str = ""
    """What a run calls it."""
    cache: CacheTypes = F16_CACHE


def measured(
    tried: Tried, workload: Workload, recorded: Recorded, *, n_ctx: int, work: Work, anew: bool = False
) -> SpeculationReport:
    """What each mode gains on a workload: what is stored of this machine, the rest asked and stored.

    Args:
        tried: the file, and the modes.
        workload: whose inputs are asked.
        recorded: the evidence.
        n_ctx: tokens of context that it is served with, which memory is counted for.
        work: threads and progress.
        anew: whether what is stored is measured once more.

    Raises:
        EngineError: the engine does not run it.
    """
    from bitladder.stages.run_facts import engine_facts, slots

    room, _ = slots(workload, n_ctx)
    facts = engine_facts(n_ctx=room, n_parallel=1, threads=work.threads, path=tried.path)
    facts |= {} if tried.cache.is_default else {"kv": str(tried.cache)}
    file = _sha(tried.path)
    known = {
        mode: found
        for mode in tried.modes
        if not anew and (found := recorded.speculation(file, mode.kind, _sha(mode.draft), workload.hash, facts))
    }
    missing = [mode for mode in tried.modes if mode not in known]
    if missing:
        asked = _ask(tried, missing, workload, room, work)
        report = report_of(tried.path.stem, workload, missing, asked, dict.fromkeys(missing, 0))
        for mode, result in zip(missing, report.results, strict=True):
            known[mode] = replace(report, results=(replace(result, draft_sha256=_sha(mode.draft)),))
            recorded.keep_speculation(file, mode.kind, workload.hash, facts, known[mode])
    else:
        work.journal.reuse("speculation", [tried.level or tried.path.stem])
    results = []
    for mode in tried.modes:  # a draft may have moved since, and memory depends on the context
        extra = _extra_bytes(tried.path, mode, n_ctx)
        results += [replace(one, mode=str(mode), extra_bytes=extra) for one in known[mode].results]
    unstable = tuple(dict.fromkeys(one for found in known.values() for one in found.unstable))
    first = known[tried.modes[0]]
    warnings = ("The workload samples; guesses are compared on greedy answers.",) if workload.temperature else ()
    return replace(first, level=tried.level, results=tuple(results), unstable=unstable, warnings=warnings)


def known_to_pay(path: Path, threads: int, cache: CacheTypes = F16_CACHE) -> Speculation | None:
    """The guesses that surely pay for a file on this machine by what was measured; None where nothing is known to."""
    from bitladder.files.probe import cpu_name
    from bitladder.plan.speculation import paying
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    kv = "" if cache.is_default else str(cache)
    with Evidence.open() as store:
        found = Recorded(store).speculations(_sha(path), cpu=cpu_name(), threads=threads, kv=kv)
    for result in paying(found):
        speculation = usable(path, result.mode, result.draft_sha256)
        if speculation is not None:
            return speculation
    return None


def usable(path: Path, mode: str, draft_sha256: str) -> Speculation | None:
    """What was measured as ``mode``, where it can still be had for a file: the draft lies there and is the same."""
    try:
        speculation = parse_speculation(mode)
        check_speculation(path, speculation)
    except BadInput:
        return None
    return speculation if _sha(speculation.draft) == draft_sha256 else None


AUTO = "auto"
"""Every way that may pay: n-grams, the model's own heads, the smallest level as a draft."""
DRAFT_SHARE = 0.6
"""Of a tier's bytes, that the draft of ``auto`` has at most: a larger one costs more than it can gain."""


def check_ways(words: Sequence[str], source: Path, levels: Sequence[str]) -> None:
    """Refuse what a run cannot try on its tiers, before any work.

    Args:
        words: ``auto``, ``ngram``, ``mtp``, ``draft:LEVEL`` or ``draft:FILE``.
        source: the model's file.
        levels: of the run.

    Raises:
        UsageError: it is no way to guess.
        BadInput: no such draft, one with another tokenizer, or a model without heads.
    """
    for word in words:
        kind, _, draft = word.partition(":")
        if word == AUTO or (kind == DRAFT and draft in levels):
            continue
        check_speculation(source, parse_speculation(word))


def ways_of(words: Sequence[str], path: Path, files: Mapping[str, Path]) -> tuple[Speculation, ...]:
    """What is tried on a tier's file, each once.

    Args:
        words: as `check_ways` takes them.
        path: the tier's file.
        files: of the run's levels.
    """
    from bitladder.files.gguf import read_header

    found: list[Speculation] = []
    for word in words:
        kind, _, draft = word.partition(":")
        if word == AUTO:
            found.append(Speculation(NGRAM))
            found += [] if heads_gap(read_header(path)) else [Speculation(MTP)]
            smallest = min(files.values(), key=lambda file: file.stat().st_size, default=path)
            if smallest.stat().st_size <= DRAFT_SHARE * path.stat().st_size:
                found.append(Speculation(DRAFT, smallest))
        elif kind == DRAFT and draft in files:
            found.append(Speculation(DRAFT, files[draft]))
        else:
            found.append(parse_speculation(word))
    return tuple(one for one in dict.fromkeys(found) if one.draft != path)


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


def _extra_bytes(path: Path, mode: Speculation, n_ctx: int) -> int:
    from bitladder.stages.serve import guess_bytes

    return guess_bytes(path, mode, n_ctx, (1,))[0]


def _ask(
    tried: Tried, modes: Sequence[Speculation], workload: Workload, n_ctx: int, work: Work
) -> Mapping[tuple[str, Speculation | None], list[Asked]]:
    """Answers by input and mode, one of each round."""
    from bitladder.engines.base import Chat, Launch
    from bitladder.engines.llama import with_cache, with_speculation
    from bitladder.engines.registry import start

    every: list[Speculation | None] = [None, *modes]
    found: dict[tuple[str, Speculation | None], list[Asked]] = {}
    launch = with_cache(Launch(tried.path, n_ctx=n_ctx, threads=work.threads), tried.cache)
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
    from bitladder.stats.paired import ratio_above_one, ratio_interval

    answers = [answer for one in ids for answer in asked[one, mode]]
    times = [base[one] for one in ids], [own[one] for one in ids]
    ratio, low, high = ratio_interval(*times)
    drafted, accepted = (sum(getattr(answer, name) for answer in answers) for name in ("drafted", "accepted"))
    return Gain(tag, len(ids), drafted, accepted, ratio, low, high, ratio_above_one(*times))
