"""The quality a level must hold, in the user's words, and what the evidence says about it.

A bar is one or more clauses joined by "and":

    kl < 0.05                          mean KL divergence per token, nats
    kl p99 < 1                         its 99th percentile (a point, no interval)
    ppl ratio < 1.02                   perplexity over the reference's; "ppl < +2%" says the same
    top1 > 95%                         same most likely next token
    passes >= 80%                      inputs of the workload passed
    passes >= reference - 4 points     not worse than the reference by four points
    no loss                            every input that the reference passed is passed
    no known loss                      the workload does not prove a loss
    recall >= 98%                      items that the reference catches and the level, too (``set_recall``)
    arithmetic: no loss                any clause on passes, for the inputs with this tag
    speed >= 20                        decoded tokens per second
    memory < 6GiB, size < 4GiB         at the context; of the file

Each clause is judged from an interval's bound, so that an answer is one of three: met (the whole 95% interval
lies on the right side), failed (the whole interval lies on the wrong side), or unknown, with what would
settle it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from bitladder.errors import UsageError
from bitladder.units import parse_bytes

DEFAULT_BAR = "kl < 0.1 and no known loss"
"""A mean KL of 0.1 nats keeps the average shift of any answer's probability under 22 points (Pinsker's
inequality); the workload has a veto. Small models need a wider bar, large ones hold a tighter one."""

DEFAULT_BAR_WITHOUT_KL = "no loss"
"""Where no KL could be measured the workload must carry the decision alone, and a veto is not enough."""

UPPER = ("kl", "kl p99", "ppl ratio", "memory", "size")
LOWER = ("top1", "passes", "recall", "speed")
_NAMES = {
    "kl": "kl", "kld": "kl", "mean kl": "kl", "kl mean": "kl", "kl divergence": "kl",
    "kl p99": "kl p99", "p99 kl": "kl p99", "99% kl": "kl p99",
    "ppl": "ppl ratio", "ppl ratio": "ppl ratio", "perplexity": "ppl ratio", "perplexity ratio": "ppl ratio",
    "top1": "top1", "top-1": "top1", "top 1": "top1", "top1 agreement": "top1",
    "passes": "passes", "pass rate": "passes", "passed": "passes",
    "recall": "recall", "item recall": "recall", "items": "recall",
    "speed": "speed", "decode": "speed", "tok/s": "speed", "tokens/s": "speed",
    "memory": "memory", "size": "size", "file": "size",
}  # fmt: skip
_OPERATORS = {
    "<": "<", "<=": "<=", ">": ">", ">=": ">=", "≤": "<=", "≥": ">=", "=<": "<=", "=>": ">=",
    "under": "<", "below": "<", "over": ">", "above": ">", "at most": "<=", "at least": ">=",
}  # fmt: skip
_CLAUSE = re.compile(
    r"(?P<metric>[a-z0-9 _%/-]*?[a-z0-9])\s*"
    r"(?P<op><=|>=|=<|=>|[<>≤≥]|\b(?:under|below|over|above|at most|at least)\b)\s*"
    r"(?P<value>.+)"
)
_RELATIVE = re.compile(r"(?:the )?reference(?:'s)?(?:\s*[-−–]\s*(?P<points>[0-9.]+)\s*(?P<unit>points?|%|pp|))?")
_NUMBER = re.compile(
    r"(?P<sign>\+?)(?P<number>[0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(?P<unit>%|points?|nats?|x|tok/s|tokens/s|t/s|)"
)


@dataclass(frozen=True)
class Clause:
    """One condition.

    ``metric`` is a name of `UPPER` or `LOWER`, or ``no loss`` or ``no known loss``. ``value`` is in nats, a
    ratio, a share, tokens per second or bytes; for a relative clause the margin under the reference, as a
    share.
    """

    text: str
    metric: str
    op: str = ""
    value: float = 0.0
    relative: bool = False
    tag: str = ""


@dataclass(frozen=True)
class Bar:
    """Clauses that must all hold."""

    text: str
    clauses: tuple[Clause, ...]


def parse_bar(text: str) -> Bar:
    """A bar from the user's words.

    Raises:
        UsageError: a clause cannot be read, or asks for the wrong direction.
    """
    parts = [part.strip() for part in re.split(r"\s+and\s+|[;&,]", text.strip()) if part.strip()]
    if not parts:
        raise UsageError("The bar is empty.", do=f'Write a condition, like "{DEFAULT_BAR}".')
    return Bar(" and ".join(parts), tuple(_clause(part) for part in parts))


def _clause(text: str) -> Clause:
    """One clause."""
    tag, _, rest = text.rpartition(":")
    tag, body = tag.strip(), " ".join(rest.lower().split())
    plain = re.fullmatch(r"(?:passes )?(no (?:known )?loss)", body)
    if plain:
        return Clause(text, plain[1], tag=tag)
    match = _CLAUSE.fullmatch(body)
    if match is None:
        raise _unreadable(text)
    name = _NAMES.get(match["metric"].replace("_", " "))
    if name is None:
        near = difflib.get_close_matches(match["metric"], _NAMES, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise UsageError(f"The bar names '{match['metric']}', which is not measured.", do=f"{hint}{_known()}")
    op = _OPERATORS[match["op"]]
    if (op[0] == "<") != (name in UPPER):
        better, right = ("smaller", "<") if name in UPPER else ("larger", ">=")
        raise UsageError(
            f"The bar '{text}' looks the wrong way.",
            means=f"'{name}' is better when {better}.",
            do=f"Write '{name} {right} {match['value']}'.",
        )
    if tag and name != "passes":
        raise UsageError(f"The bar '{text}' limits '{name}' to a tag.", do="Only clauses on passes can name a tag.")
    relative = _RELATIVE.fullmatch(match["value"])
    if relative is not None and name == "passes":
        return Clause(text, name, op, float(relative["points"] or 0) / 100, relative=True, tag=tag)
    return Clause(text, name, op, _value(name, match["value"], text), tag=tag)


def _value(name: str, written: str, text: str) -> float:
    """The number of a clause in the metric's own unit."""
    if name in ("memory", "size"):
        return float(parse_bytes(written))
    match = _NUMBER.fullmatch(written)
    if match is None:
        raise _unreadable(text)
    number = float(match["number"])
    if name == "ppl ratio":
        return 1 + number / 100 if match["unit"] == "%" else number
    if name in ("top1", "passes", "recall"):
        share = number / 100 if match["unit"] == "%" or number > 1 else number
        if share > 1:
            raise UsageError(
                f"The bar '{text}' asks for {written}, more than 100%.", do="Write a share from 0 to 100%."
            )
        return share
    return number


def spoken(metric: str) -> str:
    """A metric's name as sentences write it."""
    return {
        "kl": "KL",
        "kl p99": "KL p99",
        "ppl ratio": "perplexity ratio",
        "top1": "top-1",
        "recall": "item recall",
    }.get(metric, metric)


def _known() -> str:
    return "Known: " + ", ".join((*UPPER, *LOWER, "no loss", "no known loss")) + "."


def _unreadable(text: str) -> UsageError:
    return UsageError(
        f"The bar '{text}' cannot be read.",
        means="A clause is a measure, a comparison and a number, or 'no loss'.",
        do=f'Write for example "kl < 0.05", "passes >= reference - 4 points" or "top1 > 95%". {_known()}',
    )
