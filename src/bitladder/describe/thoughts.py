"""A model's thought apart from its answer, where a server leaves both in one text.

Models mark their thoughts in dialects of their own; servers that know a model's dialect take the marks away and send
the thought apart. Those that do not leave both in the text of the answer. To add a dialect, add a row to DIALECTS.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Parted(NamedTuple):
    """A text in two: what was thought, and what was answered."""

    thought: str
    answer: str
    thinks: bool
    """Whether there are marks of a thought at all, be it an empty one."""
    finished: bool
    """Whether the thought came to its end."""


class Dialect(NamedTuple):
    """How a thought begins and ends. What is in ``between`` stands between its end and the answer."""

    begin: str
    end: str
    between: str = ""
    end_alone: bool = False
    """Whether the end counts without a beginning, which the chat template has written then."""


DIALECTS = (
    Dialect("<think>", "</think>", end_alone=True),  # DeepSeek R1, Qwen3, GLM, Nemotron, LFM2, MiniMax, EXAONE, ...
    Dialect("<thinking>", "</thinking>", end_alone=True),
    Dialect("<thought>", "</thought>", end_alone=True),
    Dialect("<reasoning>", "</reasoning>", end_alone=True),
    Dialect("<seed:think>", "</seed:think>", end_alone=True),  # Seed-OSS
    Dialect("[THINK]", "[/THINK]", end_alone=True),  # Magistral, Ministral
    Dialect("\u25c1think\u25b7", "\u25c1/think\u25b7", end_alone=True),  # Kimi
    Dialect("<|START_THINKING|>", "<|END_THINKING|>", end_alone=True),  # Command
    Dialect("<|inner_prefix|>", "<|inner_suffix|>", end_alone=True),  # Apertus
    Dialect("<|channel>thought", "<channel|>"),  # Gemma 4
    Dialect("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    Dialect("Here is my thought process:", "Here is my response:"),  # Granite
)
_ANSWER = re.compile(r"\s*<(answer|response)>(.*?)(?:</\1>\s*)?\Z", re.DOTALL)
"""What some models put around the answer after a thought."""
_HARMONY = re.compile(r"<\|(?:end|return|start|channel|message|call)\|>(?:assistant)?")
"""Marks of gpt-oss between the messages of one answer."""
_BEGINS = re.compile(r"(?:<\|start\|>assistant)?\s*")


def parted(text: str) -> Parted:
    """A text with the thought before its answer taken apart; one without a thought is all answer."""
    start = _BEGINS.match(text)
    assert start is not None  # it matches nothing, too
    for dialect in DIALECTS:
        if text.startswith(dialect.begin, start.end()):
            rest = text[start.end() + len(dialect.begin) :]
            thought, end, answer = rest.partition(dialect.end)
            return Parted(_plain(thought), _unwrapped(answer) if end else "", True, bool(end))
    for dialect in DIALECTS:
        if dialect.end_alone:
            thought, end, answer = text.partition(dialect.end)
            if end:
                return Parted(_plain(thought), _unwrapped(answer), True, True)
    return Parted("", text, False, True)


def _plain(thought: str) -> str:
    return _HARMONY.sub("", thought).strip()


def _unwrapped(answer: str) -> str:
    inner = _ANSWER.fullmatch(answer)
    return _HARMONY.sub("", inner[2].strip() if inner else answer).lstrip()
