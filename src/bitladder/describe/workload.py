"""A workload: the user's own inputs, each with what a good answer must satisfy. ``workload_file`` reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOOLS_TAG, TURNS_TAG, GRAMMAR_TAG, FREE_TAG = "tools", "turns", "JSON by grammar", "JSON free"
"""Tags that inputs get by what they ask: results tell these kinds of work apart without a word of the user."""


@dataclass(frozen=True)
class Criterion:
    """One thing an answer must satisfy. ``value`` is plain data, already checked by ``describe.criteria``."""

    kind: str
    value: Any
    line: int = 0
    """Where it stands in its file; not part of what it means."""


@dataclass(frozen=True)
class Turn:
    """How a chat goes on after an answer of the model: with results of the tools that it called, then with messages,
    of which the last is the user's."""

    messages: tuple[Mapping[str, Any], ...] = ()
    results: Mapping[str, str] = field(default_factory=dict)
    """Tool to what each call of it gives; where there are some, the answer before must have called a tool."""
    criteria: tuple[Criterion, ...] = ()
    """What the answer *before* this turn must satisfy."""


@dataclass(frozen=True)
class Input:
    """One input: a chat with every variable filled in, and its criteria, all of which a good answer satisfies."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    """What the model is asked first; each has ``role`` and ``content``, and what belongs to calls of tools."""
    criteria: tuple[Criterion, ...]
    """Of the last answer."""
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    max_tokens: int = 256
    line: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()
    """In OpenAI's form."""
    response_format: Mapping[str, Any] | None = None
    """In OpenAI's form: what the engine holds every answer to with a grammar."""
    max_thought_tokens: int | None = None
    """Tokens of a thought before an answer, beside ``max_tokens`` of the answer; None where both share them."""
    turns: tuple[Turn, ...] = ()

    @property
    def everything_asked(self) -> tuple[Mapping[str, Any], ...]:
        """All messages of the chat that are known beforehand."""
        results = [{"role": "tool", "content": text} for turn in self.turns for text in turn.results.values()]
        return (*self.messages, *results, *(message for turn in self.turns for message in turn.messages))

    @property
    def every_criterion(self) -> tuple[Criterion, ...]:
        """Those of every answer."""
        return (*(one for turn in self.turns for one in turn.criteria), *self.criteria)

    @property
    def most_tokens(self) -> int:
        """Tokens that one answer with its thought may have."""
        return self.max_tokens + (self.max_thought_tokens or 0)


@dataclass(frozen=True)
class Workload:
    """Inputs in the order of their file.

    ``temperature`` 0 is greedy; a deployment that samples is measured as it samples, ``samples`` times per
    input with the seeds 0, 1, 2, ...
    """

    name: str
    inputs: tuple[Input, ...]
    temperature: float = 0.0
    samples: int = 1
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Further settings of the sampler by OpenAI's and llama.cpp's names: ``top_p``, ``top_k``, ``min_p``, ..."""
    recommended: bool = False
    """Whether temperature and sampling are the model's own, which are filled in once the model is known."""
    warnings: tuple[str, ...] = field(default=(), compare=False)
    """Criteria that can never fail or never pass, and the like; each names its line."""

    @property
    def hash(self) -> str:
        """SHA-256 over what is asked and how it is judged; names, line numbers and warnings are left out."""
        return _digest(
            {
                "inputs": [_meaning(one) for one in self.inputs],
                "temperature": self.temperature,
                "samples": self.samples,
                **({"sampling": dict(self.sampling)} if self.sampling else {}),
                **({"recommended": True} if self.recommended else {}),
            }
        )

    def question(self, one: Input, sample: int) -> str:
        """The hash (``question_hash``) of one of its inputs, asked for the ``sample``-th time."""
        return question_hash(one, self.temperature, sample, self.sampling)

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag, in order of first use."""
        return tuple(dict.fromkeys(tag for one in self.inputs for tag in one.tags))

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of criteria used."""
        return frozenset(criterion.kind for one in self.inputs for criterion in one.every_criterion)


def question_hash(one: Input, temperature: float, sample: int, sampling: Mapping[str, float] | None = None) -> str:
    """SHA-256 of what an engine is asked for one input: what an answer depends on besides the engine.

    Criteria are left out, so that a stored answer survives a change of its criterion and is merely judged
    again.
    """
    asked = {"messages": [dict(message) for message in one.messages], "max_tokens": one.max_tokens}
    asked |= _asked_besides(one) | ({"sampling": dict(sampling)} if sampling else {})
    return _digest(asked | {"temperature": temperature, "seed": sample})


def _asked_besides(one: Input) -> dict[str, Any]:
    """What few inputs have; left out where there is none, so that stored answers of older inputs are found."""
    found: dict[str, Any] = {}
    if one.tools:
        found["tools"] = [dict(tool) for tool in one.tools]
    if one.response_format is not None:
        found["response_format"] = dict(one.response_format)
    if one.max_thought_tokens is not None:
        found["max_thought_tokens"] = one.max_thought_tokens
    if one.turns:
        found["turns"] = [
            [[dict(message) for message in turn.messages], dict(sorted(turn.results.items()))] for turn in one.turns
        ]
    return found


def questions_of(workload: Workload) -> list[str]:
    """The hash of everything that a workload asks, input by input, each once for each sample."""
    return [workload.question(one, sample) for one in workload.inputs for sample in range(workload.samples)]


def _meaning(one: Input) -> dict[str, Any]:
    earlier = [[[criterion.kind, criterion.value] for criterion in turn.criteria] for turn in one.turns]
    return {
        "id": one.id,
        "messages": [dict(message) for message in one.messages],
        "criteria": [[criterion.kind, criterion.value] for criterion in one.criteria],
        "tags": one.tags,
        "weight": one.weight,
        "max_tokens": one.max_tokens,
        **_asked_besides(one),
        **({"earlier": earlier} if any(earlier) else {}),
    }


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
