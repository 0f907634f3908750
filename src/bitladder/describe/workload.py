"""A workload: the user's own inputs, each with what a good answer must satisfy. ``workload_file`` reads them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Criterion:
    """One thing an answer must satisfy. ``value`` is plain data, already checked by ``describe.criteria``."""

    kind: str
    value: Any
    line: int = 0
    """Where it stands in its file; not part of what it means."""


@dataclass(frozen=True)
class Input:
    """One input: a chat with every variable filled in, and its criteria, all of which a good answer satisfies."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    criteria: tuple[Criterion, ...]
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    max_tokens: int = 256
    line: int = 0


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
            }
        )

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag, in order of first use."""
        return tuple(dict.fromkeys(tag for one in self.inputs for tag in one.tags))

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of criteria used."""
        return frozenset(criterion.kind for one in self.inputs for criterion in one.criteria)


def question_hash(one: Input, temperature: float, sample: int) -> str:
    """SHA-256 of what an engine is asked for one input: what an answer depends on besides the engine.

    Criteria are left out, so that a stored answer survives a change of its criterion and is merely judged
    again.
    """
    asked = {"messages": [dict(message) for message in one.messages], "max_tokens": one.max_tokens}
    return _digest(asked | {"temperature": temperature, "seed": sample})


def questions_of(workload: Workload) -> list[str]:
    """The hash of everything that a workload asks, input by input, each once for each sample."""
    return [
        question_hash(one, workload.temperature, sample)
        for one in workload.inputs
        for sample in range(workload.samples)
    ]


def _meaning(one: Input) -> dict[str, Any]:
    plain = dataclasses.asdict(one)
    plain["messages"] = [dict(message) for message in one.messages]
    plain["criteria"] = [[criterion.kind, criterion.value] for criterion in one.criteria]
    del plain["line"]
    return plain


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
