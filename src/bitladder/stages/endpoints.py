"""Steps with endpoints: consent before money is spent, answers kept, and a model known again by what it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bitladder.errors import EngineError, UsageError, WrongModel
from bitladder.progress import Progress, silent
from bitladder.stages.job import Journal
from bitladder.stages.measure import Replies
from bitladder.store.recorded import Remote

if TYPE_CHECKING:
    from bitladder.describe.workload import Input, Workload
    from bitladder.engines.base import Chat, Completion
    from bitladder.engines.endpoint import Endpoint, EndpointSettings
    from bitladder.plan.spending import Spending
    from bitladder.records.endpoint import Fingerprint
    from bitladder.records.evaluation import Answer, Speed
    from bitladder.store.recorded import Recorded

Confirm = Callable[[str], bool]
"""Shows a person what will be spent and says whether they agree."""
REMOTE_ENGINE = {"engine": "endpoint"}
"""Settings under which answers of endpoints are stored: all else is theirs, and not ours to know."""


def remote_of(settings: EndpointSettings, recorded: Recorded) -> Remote:
    """The endpoint as evidence names it, with the fingerprint that it was last known by."""
    remote = Remote(settings.base_url, settings.model)
    known = recorded.fingerprint(remote)
    return remote if known is None else remote.known_as(known)


def missing_inputs(remote: Remote, workload: Workload, recorded: Recorded) -> list[Input]:
    """Inputs whose answer is not stored, once for each sample."""
    return [
        one
        for one in workload.inputs
        for sample in range(workload.samples)
        if recorded.answer(remote, workload.question(one, sample), REMOTE_ENGINE) is None
    ]


def agree_to_spend(
    endpoints: Sequence[EndpointSettings],
    workload: Workload,
    recorded: Recorded,
    confirm: Confirm,
    *,
    judge: EndpointSettings | None = None,
    judged: int = 0,
) -> None:
    """Ask before money is spent: about endpoints that want a key or have a price, as far as anything is missing.

    Then see that they are there and serve their models, which costs nothing, before any other work is done.

    Args:
        endpoints: reference and others; each is asked the whole workload once.
        workload: what they are asked.
        recorded: what is known already costs nothing.
        confirm: shows the sentence.
        judge: the judge model.
        judged: levels whose answers it reads.

    Raises:
        UsageError: the person did not agree, or a key is missing; nothing was asked.
        WrongModel, EngineError: an endpoint does not serve its model, or cannot be reached.
    """
    from bitladder.engines.endpoint import Endpoint

    missing = {one: missing_inputs(remote_of(one, recorded), workload, recorded) for one in endpoints}
    planned = [_spending(one, asked) for one, asked in missing.items() if asked]
    if judge is not None and "judge" in workload.kinds:
        read = [one for one in workload.inputs if any(criterion.kind == "judge" for criterion in one.criteria)]
        planned.append(_spending(judge, [*read] * (2 * judged * workload.samples), answer_tokens=16))
    paid = [one for one in planned if one is not None]
    if paid and not confirm("\n".join(one.sentence for one in paid)):
        raise UsageError(
            "No request was sent, because the cost was not agreed to: " + "; ".join(one.sentence for one in paid) + ".",
            do=f"Agree when you are asked, or give --yes. Prices are rows of {_price_file()}.",
        )
    for one, asked in missing.items():
        if asked:
            with Endpoint(one) as engine:
                engine.probe()


def _price_file() -> str:
    from bitladder.files.prices import price_file

    return str(price_file())


def _spending(
    settings: EndpointSettings, asked: Sequence[Input], *, answer_tokens: int | None = None
) -> Spending | None:
    """What it costs; None for an endpoint that wants no key and has no price."""
    import dataclasses

    from bitladder.engines.fingerprint import REQUESTS
    from bitladder.files.prices import price_of
    from bitladder.plan.spending import expected_spending

    price = price_of(settings.model)
    if not settings.wants_key and price is None:
        return None
    if answer_tokens is not None:
        asked = [dataclasses.replace(one, max_tokens=answer_tokens, max_thought_tokens=None) for one in asked]
    return expected_spending(
        settings.label,
        asked,
        prices=None if price is None else (price.prompt, price.answer),
        extra_requests=0 if answer_tokens is not None else REQUESTS,
    )


def endpoint_answers(
    settings: EndpointSettings,
    workload: Workload,
    recorded: Recorded,
    journal: Journal,
    *,
    timed: bool,
    progress: Progress = silent,
    connect: Callable[[EndpointSettings], Endpoint] | None = None,
) -> Replies:
    """Answers and speed of an endpoint.

    Every new answer is stored as it comes. Inputs that fail are left out and told, as long as others are
    answered.

    Args:
        settings: where, and which model.
        workload: what to ask.
        recorded: what is known already.
        journal: hears what went wrong.
        timed: whether its speed is wanted, too.
        progress: hears how many answers there are.
        connect: opens the endpoint; for tests.

    Raises:
        WrongModel: it serves another model, or the model was exchanged on the way; what it said since is
            forgotten.
        EngineError: it answered nothing at all.
    """
    from bitladder.describe.workload import questions_of
    from bitladder.engines.endpoint import Endpoint
    from bitladder.records.evaluation import Speed
    from bitladder.stages.evaluate import answer_workload, in_order

    unknown_speed = Speed(math.nan, math.nan, math.nan)
    remote = remote_of(settings, recorded)
    speed = recorded.speed(remote, REMOTE_ENGINE) if timed else unknown_speed
    new: list[Answer] = []

    def keep(answer: Answer) -> None:
        recorded.keep_answer(remote, answer.question, REMOTE_ENGINE, answer)
        new.append(answer)

    questions = questions_of(workload)
    known = recorded.answers(remote, questions, REMOTE_ENGINE)
    if speed is not None and len(known) == len(set(questions)):
        return Replies(in_order(workload, known), speed, stored=True)
    with (connect or Endpoint)(settings) as engine:
        engine.probe()
        remote, fingerprint = recognised(engine, settings, recorded, journal)
        failures: list[EngineError] = []
        answers = answer_workload(
            engine,
            workload,
            known=recorded.answers(remote, questions, REMOTE_ENGINE),  # by now it may be known as another model
            on_answer=keep,
            on_failure=failures.append,
            logprobs=0,
            progress=progress,
        )
        if not answers:
            raise failures[0]
        if failures:
            journal.warn(
                f"{settings.label} answered {len(answers)} of {len(questions)} inputs; the rest is left out. "
                f"The first failure: {failures[0].found} The same command asks again for what is missing."
            )
        elif new:
            _refuse_exchanged(engine, fingerprint, remote, new, recorded)
        journal.warn(*engine.notes)
        if timed and speed is None:
            speed = _speed(engine, settings, journal)
            recorded.keep_speed(remote, REMOTE_ENGINE, speed)
    return Replies(answers, speed or unknown_speed, stored=False)


def _refuse_exchanged(
    engine: Endpoint, fingerprint: Fingerprint, remote: Remote, new: Sequence[Answer], recorded: Recorded
) -> None:
    """Raises WrongModel, and forgets the new answers, when the model is another one than when they were begun."""
    from bitladder.engines.fingerprint import still_the_same

    if still_the_same(engine, fingerprint):
        return
    for answer in new:
        recorded.forget_answer(remote, answer.question, REMOTE_ENGINE)
    raise WrongModel(
        f"{engine.settings.label} no longer answers as it did when this run began.",
        means="Its model was exchanged on the way, under the same name.",
        do="Measure again: its answers of this run are discarded.",
    )


def recognised(
    engine: Endpoint, settings: EndpointSettings, recorded: Recorded, journal: Journal
) -> tuple[Remote, Fingerprint]:
    """The endpoint under the fingerprint that it has today, and what of it must be told.

    Raises:
        EngineError: it cannot be asked.
    """
    from bitladder.engines.fingerprint import still_the_same, take_fingerprint

    remote = Remote(settings.base_url, settings.model)
    known = recorded.fingerprint(remote)
    if known is not None and still_the_same(engine, known):
        return remote.known_as(known), known
    found = take_fingerprint(engine)
    if known is not None:
        journal.warn(
            f"{settings.label} answers differently than last time: it is another model under the same "
            "name, or another version. Its stored answers are not used."
        )
    if not found.repeats:
        journal.warn(
            f"{settings.label} does not repeat itself at temperature 0, so a changed model behind its name would "
            "go unseen."
        )
    recorded.keep_fingerprint(remote, found)
    return remote.known_as(found), found


def _speed(engine: Endpoint, settings: EndpointSettings, journal: Journal) -> Speed:
    """As seen from here; unknown, with a warning, where it cannot be measured."""
    from bitladder.records.evaluation import Speed
    from bitladder.stages.evaluate import measure_speed

    try:
        return measure_speed(engine)
    except EngineError as error:
        journal.warn(f"The speed of {settings.label} could not be measured: {error.found}")
        return Speed(math.nan, math.nan, math.nan)


@dataclass
class StoredEngine:
    """An endpoint whose answers are kept, so that the same question is paid for once; for the judge."""

    engine: Endpoint
    remote: Remote
    recorded: Recorded
    name: str = field(init=False)
    parallel: int = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.parallel = self.engine.name, self.engine.parallel

    def chat(self, chat: Chat) -> Completion:
        """``engines.base.Engine.chat``; a stored answer has no times and no probabilities."""
        from bitladder.describe.workload import Input, question_hash
        from bitladder.engines.base import Completion
        from bitladder.records.evaluation import Answer

        question = question_hash(
            Input("", tuple(chat.messages), (), max_tokens=chat.max_tokens), chat.temperature, chat.seed
        )
        known = self.recorded.answer(self.remote, question, REMOTE_ENGINE)
        if known is not None:
            tokens = known.prompt_tokens, known.completion_tokens
            return Completion(known.text, known.finish_reason, *tokens, self.name, math.nan, math.nan)
        done = self.engine.chat(chat)
        answer = Answer(
            "", done.text, False, "a judge's reply", done.finish_reason,
            done.prompt_tokens, done.completion_tokens, question=question,
        )  # fmt: skip
        self.recorded.keep_answer(self.remote, question, REMOTE_ENGINE, answer)
        return done

    def close(self) -> None:
        """Close the connections."""
        self.engine.close()
