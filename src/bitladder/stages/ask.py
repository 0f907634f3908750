"""The workload through everything that is compared: files in llama.cpp, endpoints, answers kept in a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bitladder.describe.cache_types import F16_CACHE, CacheTypes
from bitladder.engines.endpoint import EndpointSettings
from bitladder.errors import BadWorkload
from bitladder.progress import LevelNews
from bitladder.records.evaluation import LevelAnswers, Speed
from bitladder.stages.endpoints import endpoint_answers
from bitladder.stages.job import Job, Work
from bitladder.stages.measure import Replies, answers

if TYPE_CHECKING:
    from bitladder.describe.criteria import Context
    from bitladder.describe.workload import Input, Workload
    from bitladder.records.evaluation import Answer
    from bitladder.stages.speeds import Race
    from bitladder.store.recorded import Recorded, Subject


class LevelToAsk(NamedTuple):
    """A level in a file, and the KV cache that it is run with."""

    subject: Subject
    path: Path
    cache: CacheTypes = F16_CACHE


class ServedLevel(NamedTuple):
    """A level that an engine behind an address serves: its answers are the level's."""

    level: str
    endpoint: EndpointSettings


UNKNOWN_SPEED = Speed(math.nan, math.nan, math.nan)
Contender = LevelToAsk | ServedLevel | EndpointSettings | Path
"""What answers a workload; a path holds stored answers."""


def name_of(contender: Contender) -> str:
    """What tables call it."""
    if isinstance(contender, LevelToAsk):
        return contender.subject.level
    if isinstance(contender, ServedLevel):
        return contender.level
    return contender.label if isinstance(contender, EndpointSettings) else contender.name


def require_room(workload: Workload, n_ctx: int, job: Job) -> None:
    """Refuse inputs that no context of ``n_ctx`` tokens holds, before anything is built for them.

    Only those are counted that have as many bytes as there is room for tokens; the chat template's own tokens are not.

    Raises:
        BadWorkload: an input is too long, which is named.
        EngineError: the engine does not load the model, and no checkpoint is at hand.
    """
    texts = {one.id: "\n".join(message["content"] for message in one.messages) for one in workload.inputs}
    long = [one for one in workload.inputs if len(texts[one.id].encode("utf-8", "replace")) >= n_ctx]
    if not long:
        return
    counts = [len(ids) for ids in job.tokens([texts[one.id] for one in long])]
    over = [(one, count) for one, count in zip(long, counts, strict=True) if count >= n_ctx]
    if over:
        most = max(count for _, count in over)
        raise BadWorkload(
            "; ".join(f"Input '{one.id}' (line {one.line}) has {count:,} tokens" for one, count in over[:5])
            + (f"; and {len(over) - 5} more" if len(over) > 5 else "")
            + f". A request has room for {n_ctx:,}.",
            means="The chat template's tokens and the answer need room beside them.",
            do=f"Give --ctx {most + 2 * max(one.max_tokens for one, _ in over):,} or so".replace(",", "")
            + ", if the model was trained for it, or shorten them.",
        )


@dataclass(frozen=True)
class Asker:
    """A workload with all that is needed to ask and judge it."""

    workload: Workload
    context: Context
    recorded: Recorded
    n_ctx: int
    work: Work

    def ask_all(self, contenders: Sequence[Contender]) -> list[LevelAnswers]:
        """Everyone's answers, judged; the first is the reference of the others.

        An endpoint under test that answers nothing is left out, with a warning; the reference must answer.

        Raises:
            EngineError: an engine here, the reference or the judge failed. What was answered is kept.
            UsageError, BadWorkload: stored answers cannot be used.
        """
        asking = Asking(self, contenders)
        for contender in contenders:
            asking.ask(contender)
        asking.time([one for one in contenders if isinstance(one, LevelToAsk) and asking.has_asked(one)])
        return asking.finished()

    def judged(
        self, name: str, replies: Iterable[Answer], speed: Speed, reference: LevelAnswers | None
    ) -> LevelAnswers:
        """Answers of one contender, judged, in the workload's order; ``reference`` is None for the reference itself."""
        from bitladder.stages.evaluate import judge_answers, level_answers

        place = {one.id: at for at, one in enumerate(self.workload.inputs)}
        ordered = sorted(replies, key=lambda answer: (place[answer.input_id], answer.sample))
        beside = reference.answers if reference else None
        said = judge_answers(self.workload, ordered, reference=beside, context=self.context)
        return level_answers(name, said, speed)

    def replies(self, contender: Contender, *, timed: bool = False, inputs: Sequence[Input] | None = None) -> Replies:
        """What one contender answers to the workload, or to these inputs of it; of files of answers all they hold.
        ``timed``: an endpoint's speed is measured, too."""
        from bitladder.files.workloads import load_reference

        if isinstance(contender, ServedLevel):
            contender = contender.endpoint
        if isinstance(contender, EndpointSettings):
            return endpoint_answers(contender, self.workload, self.recorded, self.work.journal, timed=timed)
        if isinstance(contender, Path):
            return Replies(load_reference(contender, self.workload), UNKNOWN_SPEED, stored=True)
        subject, path, cache = contender
        return answers(
            subject, path, self.workload, self.recorded, n_ctx=self.n_ctx, work=self.work, inputs=inputs, cache=cache
        )

    def stored(self, contender: Contender) -> set[str] | None:
        """Inputs that a level in a file has answered already, in all samples; None of others: a file of answers costs
        nothing to read."""
        from bitladder.stages.measure import engine_of

        if not isinstance(contender, LevelToAsk):
            return None
        workload = self.workload
        questions = {
            one.id: [workload.question(one, sample) for sample in range(workload.samples)] for one in workload.inputs
        }
        engine, _ = engine_of(contender.path, workload, n_ctx=self.n_ctx, work=self.work)
        flat = [question for each in questions.values() for question in each]
        known = self.recorded.answers(contender.subject, flat, engine)
        return {name for name, each in questions.items() if all(question in known for question in each)}

    def tell_doubts(self, asked: Sequence[LevelAnswers], *, asked_all: bool = True) -> None:
        """What makes answers or speeds worth less than they look. ``asked_all``: everything was to be answered."""
        wanted = len(self.workload.inputs) * self.workload.samples
        if asked_all and 0 < len(asked[0].answers) < wanted:
            self.work.journal.warn(
                f"The reference {asked[0].level} has {len(asked[0].answers)} of {wanted} answers: every level is "
                "compared on those alone."
            )
        for level in asked:
            undecided = sum("undecided" in answer.detail for answer in level.answers)
            if undecided:
                self.work.journal.warn(
                    f"The judge gave no verdict on {undecided} of {len(level.answers)} answers of {level.level}; "
                    "they count as failed."
                )
        impossible = self._passed_by_nobody(asked)
        if impossible:
            shown = ", ".join(impossible[:5]) + (", ..." if len(impossible) > 5 else "")
            self.work.journal.warn(
                f"Neither the reference nor any level that was asked passes {len(impossible)} of "
                f"{len(self.workload.inputs)} inputs ({shown}), so these cannot show a loss. Their criteria may "
                "be wrong, or the work too hard."
            )
        busy = [level for level in asked if level.speed.disturbed]
        if busy:
            shares = ", ".join(f"{level.level} {level.speed.others_share:.0%}" for level in busy)
            self.work.journal.warn(
                f"Other programs used the processor while speeds were measured ({shares}): these are lower than "
                "on a quiet machine, where another level may be the fastest. Close the programs and run again: only "
                "these speeds are measured anew."
            )

    def _passed_by_nobody(self, asked: Sequence[LevelAnswers]) -> list[str]:
        """Inputs that were answered, and by no one well; with one level alone nothing can be said."""
        if sum(bool(level.answers) for level in asked) < 2:
            return []
        answered = {answer.input_id for answer in asked[0].answers}
        passed = {answer.input_id for level in asked for answer in level.answers if answer.passed}
        return [one.id for one in self.workload.inputs if one.id in answered - passed]


class Asking:
    """Contenders that are asked and timed one after the other, the reference before all others."""

    def __init__(self, asker: Asker, contenders: Sequence[Contender]) -> None:
        """``contenders``: all that may be, the reference first."""
        self._asker, self._work = asker, asker.work
        self._contenders = {name_of(one): one for one in contenders}
        self._reference = contenders[0]
        self._asked: dict[str, LevelAnswers] = {}
        self._speeds: dict[str, Speed] = {}
        self._stored: list[Contender] = []
        self._timed_before = True

    def has_asked(self, contender: Contender) -> bool:
        """Whether it has answered."""
        return name_of(contender) in self._asked

    def ask(self, contender: Contender) -> None:
        """The workload through one, and before the first of all through the reference. An endpoint that answers nothing
        is left out, with a warning. Raises as ``Asker.ask_all``."""
        from bitladder.errors import EngineError

        if contender is not self._reference and not self.has_asked(self._reference):
            self.ask(self._reference)
        name, is_first = name_of(contender), contender is self._reference
        self._work.progress(f"workload: {name}", len(self._asked), len(self._contenders))
        self._work.progress.on_level(LevelNews(name, "answering"))
        try:
            replies, speed, stored = self._asker.replies(contender, timed=not is_first)
        except EngineError as error:
            if is_first or not isinstance(contender, EndpointSettings | ServedLevel):
                raise
            self._work.journal.warn(f"{name} is left out: {error.found}")
            return
        reference = None if is_first else self._asked[name_of(self._reference)]
        self._speeds.setdefault(name, speed or UNKNOWN_SPEED)
        self._asked[name] = self._asker.judged(name, replies, self._speeds[name], reference)
        if stored and not isinstance(contender, Path):
            self._stored.append(contender)
        self._tell(name)

    def time(self, levels: Sequence[LevelToAsk], race: Race | None = None) -> None:
        """Speeds of levels in files, in turns; ``race`` as ``stages.speeds.speeds_in_turns`` takes it."""
        from bitladder.stages.speeds import MOST_PAST, speeds_in_turns

        past = 0 if all(level.cache.is_default for level in levels) else min(self._asker.n_ctx // 2, MOST_PAST)
        speeds, stored = speeds_in_turns(levels, self._asker.recorded, self._work, past=past, race=race)
        self._timed_before = self._timed_before and stored
        self._speeds |= {name_of(level): speed for level, speed in zip(levels, speeds, strict=True)}
        for level in levels:
            self._tell(name_of(level))

    def so_far(self) -> list[LevelAnswers]:
        """What is known of all contenders, the reference first; of those that were not asked no answers."""
        return [
            replace(
                self._asked.get(name) or LevelAnswers(name, (), UNKNOWN_SPEED),
                speed=self._speeds.get(name, UNKNOWN_SPEED),
            )
            for name in self._contenders
            if name in self._speeds or name == name_of(self._reference)
        ]

    def finished(self) -> list[LevelAnswers]:
        """The same, with doubts told and what was stored already."""
        in_files = [name_of(one) for one in self._stored if isinstance(one, LevelToAsk)]
        elsewhere = [name_of(one) for one in self._stored if not isinstance(one, LevelToAsk)]
        self._work.progress("workload", len(self._contenders), len(self._contenders))
        self._work.journal.reuse("answers and speed" if self._timed_before else "answers", in_files)
        self._work.journal.reuse("answers and speed", elsewhere)
        found = self.so_far()
        self._asker.tell_doubts(found)
        return found

    def _tell(self, name: str) -> None:
        """What is known of one, for who watches."""
        said = self._asked[name].answers if name in self._asked else ()
        rate = self._speeds[name].decode_tokens_per_s
        if not said:
            self._work.progress.on_level(LevelNews(name, "timed", tokens_per_s=rate))
            return
        passes = sum(answer.passed for answer in said)
        self._work.progress.on_level(LevelNews(name, "answered", passes=passes, inputs=len(said), tokens_per_s=rate))
