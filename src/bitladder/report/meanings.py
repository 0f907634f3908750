"""What heads of columns and verdicts mean, in a phrase each: for footers, and for the titles that a pointer shows.

The page's ``meanings.js`` has the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from bitladder.records.decision import Loss, Status

HEADS = {
    "level": "how the weights are stored; see bitladder explain NAME",
    "file": "size on disk",
    "bpw": "bits per weight, scales included",
    "on label": "weights stored in the type that the name says; the others got more bits, or do not divide that way",
    "memory": "weights, cache of the context and buffers while it runs",
    "tokens/s": "tokens per second while answering, one request at a time",
    "KL": "how far its next-token probabilities are from the source's, in nats per token; 0 is identical",
    "ppl ratio": "perplexity over the source's on the same text; 1.02 is 2% worse at predicting it",
    "top-1": "how often it finds the same next token most likely as the source does",
    "passes": "inputs of the workload whose answer met its criteria",
    "cost": "of a million answer tokens, in the currency of your prices, and what is saved beside the reference",
    "verdict": "what becomes of the level under the bar",
}
VERDICTS = {
    Status.REFERENCE: "what the others are compared with",
    Status.QUALITY: "chosen where quality counts",
    Status.SPEED: "chosen where speed counts",
    Status.BOTH: "chosen for quality and for speed",
    Status.MEETS: "good enough; another level was the better choice",
    Status.FAILS: "measured, and not good enough for the bar",
    Status.UNKNOWN: "too little was measured to say; the reason names what is missing",
    Status.DOES_NOT_FIT: "larger than the memory there is at this context",
}
LOSSES = {
    Loss.NOT_SEEN: "no loss seen",
    Loss.MEASURABLE: "a measurable loss",
    Loss.BAD: "known to be worse",
}
"""What is known of a loss, where there is something to say."""


def heads_in_words(names: Iterable[str]) -> list[str]:
    """A line for each of these heads."""
    return [f"{name}: {HEADS[name]}." for name in names if name in HEADS]
