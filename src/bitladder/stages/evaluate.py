"""Run a workload through an engine, judge the answers, and compare a level with the reference pair by pair.

The engine's slots are kept full (``engine.parallel`` requests in flight, longest first). Each answer is
handed to ``on_answer`` as it comes, so that a run that dies keeps what it has; answers that are known already
are not asked for again, but they are always judged anew, since a criterion may have changed.

Speed is measured apart, with one request at a time: with several in flight the engine computes them together,
and neither of them runs at the speed that one user would see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import numpy as np

from bitladder.describe.criteria import Context
from bitladder.describe.similarity import METRICS
from bitladder.describe.workload import Input, Workload
from bitladder.engines.base import Chat, Completion, Engine, Running, Unsupported
from bitladder.errors import EngineError, EngineReply, UsageError, WrongModel
from bitladder.files.probe import OtherLoad
from bitladder.progress import Progress, silent
from bitladder.records.evaluation import (
    Alternative,
    Answer,
    AnswerToken,
    Difference,
    LevelAnswers,
    Reply,
    Speed,
    TagResult,
    WorkloadResult,
)
from bitladder.stages.behaviour import faults_of, repetition_of, thinking_of
from bitladder.stages.chats import chat_through, first_chat, judge_chat
from bitladder.stages.wording import item_recall
from bitladder.stats.intervals import weighted_wilson, wilson
from bitladder.stats.multiplicity import holm
from bitladder.stats.paired import mcnemar, sign_flip
from bitladder.stats.power import smallest_visible_loss

TOP = 5
"""Likely tokens kept at each place of an answer."""
MOST_FAILURES = 3
"""Inputs that an engine may fail before it is let go: one that is down fails them all, after long waits."""
PREFILL_TOKENS, DECODE_TOKENS, REPEATS = 192, 48, 3


def answer_workload(
    engine: Engine,
    workload: Workload,
    *,
    known: Mapping[str, Answer] | None = None,
    on_answer: Callable[[Answer], None] = lambda _: None,
    on_failure: Callable[[EngineError], None] | None = None,
    logprobs: int = TOP,
    progress: Progress = silent,
) -> tuple[Answer, ...]:
    """Ask every input, in as many samples as the workload wants; answers in the workload's order, not judged yet.

    Args:
        engine: answers; up to ``engine.parallel`` requests are in flight.
        workload: what to ask.
        known: answers by ``question`` hash that need not be asked for again.
        on_answer: called with each new answer as it comes, from this thread.
        on_failure: called with the error of an input that gets no answer, which is left out then; after
            ``MOST_FAILURES`` of them no further input is asked. None: the first failure is the end.
        logprobs: likely tokens to keep at each place; 0 for engines that do not tell.
        progress: hears how many answers there are.

    Raises:
        UsageError: it wants the model's own sampling, which nobody has filled in (``stages.as_deployed``).
        WrongModel: the engine answers as another model than before.
        EngineError: the engine failed; every answer it gave before was handed to ``on_answer``.
    """
    if workload.recommended:
        raise UsageError(
            "The workload wants the sampling that the model recommends, which is not looked up here.",
            do="Write the settings into it, like: sampling: {temperature: 0.7, top_p: 0.95}.",
        )
    known = known or {}
    wanted = [(one, sample) for one in workload.inputs for sample in range(workload.samples)]
    questions = {(one.id, sample): workload.question(one, sample) for one, sample in wanted}
    answers = {key: known[question] for key, question in questions.items() if question in known}
    missing = [(one, sample) for one, sample in wanted if (one.id, sample) not in answers]
    # Longest first, so that no slot is left with a long answer when the others have run dry.
    missing.sort(key=lambda item: -item[0].most_tokens * (1 + len(item[0].turns)))
    progress("answers", len(answers), len(wanted))

    def ask(one: Input, sample: int) -> Answer:
        asked = first_chat(one, workload, sample, logprobs)
        return _answer(one, sample, questions[one.id, sample], chat_through(engine, asked, one))

    pool = ThreadPoolExecutor(max_workers=max(1, engine.parallel), thread_name_prefix="workload")
    failures = 0
    try:
        futures: list[Future[Answer]] = [pool.submit(ask, one, sample) for one, sample in missing]
        for future in as_completed(futures):
            try:
                answer = future.result()
            except EngineError as error:
                if on_failure is None or isinstance(error, WrongModel):
                    raise
                failures += 1
                on_failure(error)
                if failures == MOST_FAILURES:
                    break
                continue
            on_answer(answer)
            answers[answer.input_id, answer.sample] = answer
            progress("answers", len(answers), len(wanted))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return in_order(workload, {questions[key]: answer for key, answer in answers.items()})


def in_order(workload: Workload, answers: Mapping[str, Answer]) -> tuple[Answer, ...]:
    """Answers by ``question`` hash as answers to the workload's inputs, in its order; what has none is left out."""
    found = []
    for one in workload.inputs:
        for sample in range(workload.samples):
            answer = answers.get(workload.question(one, sample))
            if answer is not None:
                found.append(dataclasses.replace(answer, input_id=one.id, sample=sample))
    return tuple(found)


def check_help(workload: Workload, context: Context | None = None) -> None:
    """Refuse a workload whose criteria need something that is not there, before any time is spent on it.

    Raises:
        UsageError: a judge, a function or a library is missing.
    """
    context = context or Context()
    if "judge" in workload.kinds and context.judge is None:
        raise UsageError(
            "The workload asks a judge model, and none was named.",
            do="Name an OpenAI-compatible endpoint for it, or use other criteria.",
        )
    for one in workload.inputs:
        for criterion in one.criteria:
            if criterion.kind == "python" and criterion.value not in context.functions:
                raise UsageError(
                    f"The workload runs Python code of its own: {criterion.value}.",
                    means="It runs only for those who trust the workload.",
                )
            metric = criterion.value.get("metric") if isinstance(criterion.value, dict) else None
            if metric in METRICS:
                METRICS[metric]("a", "a")


def judge_answers(
    workload: Workload,
    answers: Iterable[Answer],
    *,
    reference: Iterable[Answer] | None = None,
    context: Context | None = None,
) -> tuple[Answer, ...]:
    """The answers with ``passed`` and ``detail`` filled in.

    Args:
        workload: the criteria.
        answers: of one level.
        reference: the reference's answers to the same inputs; None while the reference itself is judged.
        context: the judge and the user's functions, where criteria need them.

    Raises:
        UsageError: they need something that is not there.
        EngineError: the judge cannot be asked.
    """
    check_help(workload, context)
    inputs = {one.id: one for one in workload.inputs}
    said = {(answer.input_id, answer.sample): answer.text for answer in reference or ()}
    judged = []
    for answer in answers:
        about = dataclasses.replace(context or Context(), reference=said.get((answer.input_id, answer.sample)))
        outcome = judge_chat(inputs[answer.input_id], answer, about)
        judged.append(dataclasses.replace(answer, passed=outcome.passed, detail=outcome.detail))
    return tuple(judged)


def measure_speed(engine: Engine) -> Speed:
    """Prefill and decode speed with one request at a time: medians over repeats after one that warms up.

    An engine of our own with a clock reports a prompt of 192 tokens computed anew and 48 tokens decoded after it.
    Of others only the stream is seen: prefill then includes the network and the queue, and is a lower bound.
    """
    with OtherLoad() as others:
        rates = [decode_rates(engine, repeat) for repeat in range(REPEATS + 1)]
    prefill, decode = zip(*rates[1:], strict=True)
    return Speed(
        statistics.median(prefill),
        statistics.median(decode),
        *((engine.load_seconds, others.share) if isinstance(engine, Running) else (math.nan, math.nan)),
    )


def level_answers(level: str, answers: Sequence[Answer], speed: Speed) -> LevelAnswers:
    """Everything one level said."""
    return LevelAnswers(level, tuple(answers), speed)


def pass_shares(answers: Iterable[Answer]) -> dict[str, float]:
    """For each input that was answered, the share of its answers that passed."""
    return {name: statistics.fmean(answer.passed for answer in said) for name, said in _by_input(answers).items()}


def compare(reference: LevelAnswers, level: LevelAnswers, workload: Workload) -> WorkloadResult:
    """A level beside the reference, pair by pair, over all inputs and tag by tag.

    Inputs that either has not answered (a run cut short) are left out, never counted as failed.
    """
    pairs = _pairs(reference, level, workload)
    both = {pair.one.id for pair in pairs}
    theirs, ours = ([one for one in side.answers if one.input_id in both] for side in (reference, level))
    shares = np.array([pair.level for pair in pairs])
    before = np.array([pair.reference for pair in pairs])
    weights = np.array([pair.one.weight for pair in pairs])
    rate = weighted_wilson(shares, weights)
    lost = tuple(pair.one.id for pair in pairs if pair.lost)
    gained = tuple(pair.one.id for pair in pairs if pair.gained)
    if workload.samples == 1 and len(set(weights)) <= 1:
        p_value = mcnemar(len(lost), len(gained)) if pairs else math.nan
    else:
        p_value = sign_flip(weights * (shares - before), np.random.default_rng(0))
    items, kept, recall = item_recall(workload, reference.answers, level.answers)
    return WorkloadResult(
        level=level.level,
        passes=sum(pair.level >= 0.5 for pair in pairs),
        inputs=len(pairs),
        pass_low=rate.low,
        pass_high=rate.high,
        lost=lost,
        gained=gained,
        same_answers=sum(pair.same for pair in pairs),
        p_value=p_value,
        decode_tokens_per_s=level.speed.decode_tokens_per_s,
        prefill_tokens_per_s=level.speed.prefill_tokens_per_s,
        pass_rate=rate.value,
        smallest_visible_loss=smallest_visible_loss(len(pairs)) if pairs else math.nan,
        tags=_tag_results(pairs, workload.tags),
        decode_rounds=level.speed.rounds,
        items=items,
        items_kept=kept,
        recall_low=recall.low,
        recall_high=recall.high,
        faults=faults_of(theirs, ours, workload),
        thinking=thinking_of(theirs, ours),
        repetition=repetition_of(ours, theirs),
        reference_repetition=repetition_of(theirs, ours),
        differences=_differences(pairs) if workload.samples > 1 else None,
    )


def _differences(pairs: Sequence[_Pair]) -> tuple[Difference, ...]:
    return tuple(Difference(pair.one.id, pair.level - pair.reference) for pair in pairs if pair.level != pair.reference)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Pass shares of one input at both, and whether every answer is the same text."""

    one: Input
    reference: float
    level: float
    same: bool

    @property
    def lost(self) -> bool:
        return self.reference >= 0.5 > self.level

    @property
    def gained(self) -> bool:
        return self.level >= 0.5 > self.reference


def _pairs(reference: LevelAnswers, level: LevelAnswers, workload: Workload) -> list[_Pair]:
    theirs, ours = _by_input(reference.answers), _by_input(level.answers)
    before, after = pass_shares(reference.answers), pass_shares(level.answers)
    return [
        _Pair(
            one,
            before[one.id],
            after[one.id],
            [_said(answer) for answer in theirs[one.id]] == [_said(answer) for answer in ours[one.id]],
        )
        for one in workload.inputs
        if one.id in theirs and one.id in ours
    ]


def _said(answer: Answer) -> list[tuple[str, object]]:
    """What a user sees of an answer: texts and calls."""
    return [(reply.text, reply.calls) for reply in answer.replies]


def _by_input(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    grouped: dict[str, list[Answer]] = {}
    for answer in sorted(answers, key=lambda answer: answer.sample):
        grouped.setdefault(answer.input_id, []).append(answer)
    return grouped


def _tag_results(pairs: Sequence[_Pair], tags: Sequence[str]) -> tuple[TagResult, ...]:
    groups = {tag: [pair for pair in pairs if tag in pair.one.tags] for tag in tags}
    counts = {tag: (sum(p.lost for p in group), sum(p.gained for p in group)) for tag, group in groups.items()}
    adjusted = holm([mcnemar(*counts[tag]) if groups[tag] else math.nan for tag in tags])
    results = []
    for tag, p_value in zip(tags, adjusted, strict=True):
        passes = sum(pair.level >= 0.5 for pair in groups[tag])
        low, high = wilson(passes, len(groups[tag]))
        results.append(TagResult(tag, len(groups[tag]), passes, low, high, *counts[tag], p_value))
    return tuple(results)


def _answer(one: Input, sample: int, question: str, completions: Sequence[Completion]) -> Answer:
    *earlier, completion = completions
    tokens = []
    for token in completion.tokens:
        top = [Alternative(other.token_id, other.logprob) for other in token.top if other.token_id is not None]
        if token.token_id is not None:
            tokens.append(AnswerToken(token.token_id, token.logprob, token.text, tuple(top)))
    return Answer(
        input_id=one.id,
        text=completion.text,
        passed=False,
        detail="not judged yet",
        finish_reason=completion.finish_reason,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        sample=sample,
        question=question,
        tokens=tuple(tokens),
        thought=completion.reasoning,
        thought_tokens=completion.thought_tokens,
        calls=completion.calls,
        earlier=tuple(_reply(done) for done in earlier),
    )


def _reply(done: Completion) -> Reply:
    return Reply(done.text, done.finish_reason, done.completion_tokens, done.reasoning, done.thought_tokens, done.calls)


_PROSE = (
    "The harbour was quiet in the early morning. A few boats lay at the pier, and an old man mended a net "
    "while the light came slowly over the water. He had done this every day for thirty years, and he knew each "
    "knot by its feel. Behind him the town woke up: a shutter opened, a dog barked, the baker carried bread. "
)


def decode_rates(engine: Engine, repeat: int, *, again: bool = False, past: int = 0) -> tuple[float, float]:
    """Prefill and decode rates of one request; ``repeat`` makes each prompt a new one, which no cache can serve.

    ``again``: the last request had the same ``repeat``; an engine of our own with a clock then decodes after the prompt
    that it holds, in a third of the time, and the prefill rate is NaN. ``past``: tokens of context before the prompt,
    which the engine keeps from one request to the next.
    """
    if isinstance(engine, Running):
        with contextlib.suppress(Unsupported):
            prefill, decode = _clock_rates(engine, repeat, again=again, past=past)
            return math.nan if again else prefill, decode
    return _stream_rates(engine, repeat)


def warm_up(engine: Engine) -> None:
    """A short request, so that weights, threads and the clock of the processor are as they stay."""
    if isinstance(engine, Running):
        with contextlib.suppress(Unsupported):
            engine.time_tokens(engine.tokenize(_PROSE, add_special=True)[:16], max_tokens=8)
            return
    engine.chat(Chat.of(_PROSE, 8))


def _clock_rates(engine: Running, repeat: int, *, again: bool, past: int) -> tuple[float, float]:
    room = engine.launch.n_ctx - past - DECODE_TOKENS - 8
    tokens = engine.tokenize(f"{repeat + 1}. " + _PROSE * 4, add_special=True)[: max(8, min(PREFILL_TOKENS, room))]
    if past:
        once = engine.tokenize(_PROSE)
        tokens = [*(once * -(-past // max(1, len(once))))[:past], *tokens]
    held = again or past > 0
    timings = engine.time_tokens(tokens, max_tokens=min(DECODE_TOKENS, max(2, room)), again=held)
    if timings["prompt_ms"] <= 0 or timings["predicted_ms"] <= 0 or timings["predicted_n"] < 2:
        raise EngineReply(f"The engine's timings make no sense: {dict(timings)}.")
    # The first decoded token comes out of the prefill, so n tokens are n - 1 steps.
    return 1e3 * timings["prompt_n"] / timings["prompt_ms"], 1e3 * (timings["predicted_n"] - 1) / timings[
        "predicted_ms"
    ]


def _stream_rates(engine: Engine, repeat: int) -> tuple[float, float]:
    prompt = f"{repeat + 1}. {_PROSE * 3}\n\nGo on with this story in two hundred words."
    done = engine.chat(Chat.of(prompt, DECODE_TOKENS))
    decode_s = done.total_s - done.first_token_s
    if math.isnan(decode_s) or decode_s <= 0 or done.first_token_s <= 0:
        return math.nan, math.nan
    steps = done.completion_tokens - 1
    return done.prompt_tokens / done.first_token_s or math.nan, steps / decode_s if steps > 0 else math.nan
