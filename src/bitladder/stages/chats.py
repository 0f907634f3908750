"""One input's chat with an engine, turn by turn, and its answers judged."""

from __future__ import annotations

import dataclasses
from typing import Any

from bitladder.describe.criteria import Context, Mark, judge
from bitladder.describe.workload import Input, Turn, Workload
from bitladder.engines.base import Chat, Completion, Engine
from bitladder.records.evaluation import Answer, Reply

NO_RESULT = '{"error": "there is no such tool"}'
"""What a call gives for which the workload has no result."""


def first_chat(one: Input, workload: Workload, sample: int, logprobs: int) -> Chat:
    """What an engine is asked first for an input."""
    return Chat(
        one.messages,
        one.most_tokens,
        workload.temperature,
        seed=sample,
        logprobs=logprobs,
        tools=one.tools,
        response_format=one.response_format,
        sampling=workload.sampling,
        max_thought_tokens=one.max_thought_tokens,
    )


def chat_through(engine: Engine, first: Chat, one: Input) -> list[Completion]:
    """Every answer of a chat, each with the model's own answers before it; without its thoughts, as chat templates
    have it. It ends early where results of tools are at hand and no tool was called.

    Raises:
        EngineError: the engine failed.
    """
    done = [engine.chat(first)]
    messages = list(first.messages)
    for turn in one.turns:
        last = done[-1]
        if turn.results and not last.calls:
            break
        messages += [_as_message(last), *_results(last, turn), *turn.messages]
        # Probabilities tell routes apart, and only the last answer's are kept.
        done.append(engine.chat(dataclasses.replace(first, messages=tuple(messages))))
    return done


def _as_message(done: Completion) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": done.text}
    if done.calls:
        message["tool_calls"] = [
            {"id": f"call_{number}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for number, call in enumerate(done.calls, start=1)
        ]
    return message


def _results(done: Completion, turn: Turn) -> list[dict[str, Any]]:
    return [
        {"role": "tool", "tool_call_id": f"call_{number}", "content": turn.results.get(call.name, NO_RESULT)}
        for number, call in enumerate(done.calls, start=1)
    ]


def judge_chat(one: Input, answer: Answer, context: Context) -> Mark:
    """Judge the answers of a chat by what each must satisfy; a thought without an answer is none."""
    outcome = Mark(True, "")
    for number, reply in enumerate(answer.replies):
        is_last = number == len(one.turns)
        criteria = one.criteria if is_last else one.turns[number].criteria
        outcome = _judge_reply(one, reply, context, criteria)
        if not outcome.passed:
            where = f"answer {number + 1} of {len(one.turns) + 1}: " if one.turns else ""
            return Mark(False, where + outcome.detail)
    if len(answer.replies) <= len(one.turns):
        return Mark(False, f"no tool was called after {len(answer.replies)} of {len(one.turns) + 1} answers")
    return outcome


def _judge_reply(one: Input, reply: Reply, context: Context, criteria: Any) -> Mark:
    if unfinished_thought(reply):
        within = reply.finish_reason == "length"
        how = f"did not end within {reply.completion_tokens} tokens" if within else "ended with nothing behind it"
        return Mark(False, f"no answer: its thought {how}")
    return judge(one, reply.text, dataclasses.replace(context, calls=reply.calls), criteria)


def unfinished_thought(reply: Reply) -> bool:
    """Whether a reply is a thought alone: it was cut in it, or the model stopped there."""
    return bool(reply.thought) and not reply.text and not reply.calls
