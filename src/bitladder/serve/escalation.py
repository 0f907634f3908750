"""Escalation: keep the speed tier's answer only when it was sure of it.

The score of an answer is the lowest log-probability among its tokens (or the first ``window`` of them). Two
levels of one model part where the choice was close, so one unsure token is the sign; an average would bury
it under the sure ones. An answer scored below the threshold is thrown away and the quality tier answers
instead, before any byte was sent.

The threshold comes from a workload: the speed tier's scores, and which of its answers the quality tier
would have got right. What it gives up: twenty-five inputs with three losses say little, so ``calibrate``
also says what a held-out half showed, and reports that it cannot where it cannot. The discarded answers
cost their time twice.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_EXTRA_COST = 0.20
MIN_RECOVERED = 0.80


@dataclass(frozen=True)
class ScoredInput:
    """One input of a workload: the speed tier's score, who passed it, and what each tier needed (seconds)."""

    score: float
    speed_passed: bool
    quality_passed: bool
    speed_s: float
    quality_s: float


@dataclass(frozen=True)
class CalibratedThreshold:
    """A threshold and what it would have done on the inputs it was made from.

    ``recovered`` is the share of the speed tier's net loss that is made good, ``extra_cost`` the added time
    as a share of the speed tier's own; both NaN where there was nothing to recover.
    """

    threshold: float
    escalated: float
    recovered: float
    extra_cost: float

    @property
    def pays(self) -> bool:
        """At least 80% of the loss recovered for at most 20% more than the speed tier's cost."""
        return self.recovered >= MIN_RECOVERED and self.extra_cost <= MAX_EXTRA_COST


def score(logprobs: Sequence[float], window: int | None = None) -> float:
    """Lowest natural log-probability of the first ``window`` tokens; NaN for an answer without tokens."""
    seen = logprobs if window is None else logprobs[:window]
    return min(seen, default=math.nan)


def is_sure(value: float, threshold: float) -> bool:
    """Whether an answer with this score is kept. An answer without tokens is never sure."""
    return value >= threshold


def outcome(inputs: Sequence[ScoredInput], threshold: float) -> CalibratedThreshold:
    """What escalating below ``threshold`` would have done on these inputs."""
    escalated = [item for item in inputs if not is_sure(item.score, threshold)]
    loss = sum(item.quality_passed - item.speed_passed for item in inputs)
    gain = sum(item.quality_passed - item.speed_passed for item in escalated)
    spent = sum(item.speed_s for item in inputs)
    added = sum(item.quality_s for item in escalated)
    return CalibratedThreshold(
        threshold,
        len(escalated) / len(inputs) if inputs else math.nan,
        gain / loss if loss > 0 else math.nan,
        added / spent if spent > 0 else math.nan,
    )


def calibrate(inputs: Sequence[ScoredInput], recover: float = MIN_RECOVERED) -> CalibratedThreshold:
    """The lowest threshold that recovers at least ``recover`` of the net loss.

    Candidates lie half-way between neighbouring scores. Without a loss the threshold is minus infinity:
    nothing is ever escalated. When no threshold is enough, it is plus infinity: everything is.
    """
    scores = sorted({item.score for item in inputs if not math.isnan(item.score)})
    middles = [(low + high) / 2 for low, high in itertools.pairwise(scores)]
    found = outcome(inputs, -math.inf)
    if math.isnan(found.recovered):
        return found
    for threshold in (-math.inf, *middles, math.inf):
        found = outcome(inputs, threshold)
        if found.recovered >= recover:
            break
    return found


def logprobs_of(document: dict[str, Any]) -> list[float]:
    """Log-probabilities in a reply or an event of the chat or completions API, in order; empty where there
    are none.

    Raises:
        ValueError: they are not in OpenAI's shape.
    """
    found: list[float] = []
    try:
        for choice in document.get("choices") or ():
            logprobs = choice.get("logprobs") or {}
            found += [float(token["logprob"]) for token in logprobs.get("content") or ()]
            found += [float(value) for value in logprobs.get("token_logprobs") or () if value is not None]
    except (AttributeError, KeyError, TypeError):
        raise ValueError("log-probabilities of another shape than OpenAI's") from None
    return found


def without_logprobs(document: dict[str, Any]) -> bytes:
    """The document as JSON without the log-probabilities that the client had not asked for."""
    for choice in document.get("choices") or ():
        choice.pop("logprobs", None)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
