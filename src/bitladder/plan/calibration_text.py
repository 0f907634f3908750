"""Whether a text can be calibrated on, and what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitladder.describe.text import Document, languages_of, subject_of
from bitladder.describe.windows import Window, tokens_hash, window_hashes
from bitladder.errors import BadInput
from bitladder.records.calibration import CalibrationText, TextSource

LEAST_TOKENS = 1024
OVERLAP_TOKENS = 32
"""Tokens in a run that, found in both texts, betrays an overlap."""


def check_text(
    windows: Sequence[Window],
    *,
    n_vocab: int,
    documents: Sequence[Document] = (),
    measuring: Sequence[Window] = (),
    allow_overlap: bool = False,
) -> CalibrationText:
    """Refuse text that calibration cannot or must not use; describe the rest.

    Args:
        windows: The text as tokens.
        n_vocab: How many tokens the model has.
        documents: The text itself, to say what it is.
        measuring: Windows that levels will be measured on.
        allow_overlap: Go on although both texts share passages.

    Raises:
        BadInput: too little text, token ids that the model does not have, or an overlap.
    """
    lengths = [len(window.tokens) for window in windows]
    if sum(lengths) < LEAST_TOKENS:
        raise BadInput(
            f"The calibration text has {sum(lengths)} tokens in {len(lengths)} windows; "
            f"at least {LEAST_TOKENS} are needed.",
            means="Statistics of so few inputs fit the text and not the model's work.",
            do="Give a longer text, 30,000 tokens of several kinds say, or leave it out to use the one that ships.",
        )
    largest = max(int(window.tokens.max()) for window in windows)
    if largest >= n_vocab:
        raise BadInput(
            f"The calibration text holds token {largest}; the model has {n_vocab} tokens.",
            means="The tokenizer does not belong to these weights.",
            do="Check that tokenizer files and weights come from the same model.",
        )
    return CalibrationText(
        documents=len({window.document for window in windows}),
        windows=len(windows),
        tokens=sum(lengths),
        shortest=min(lengths),
        longest=max(lengths),
        hash=tokens_hash(windows),
        overlap=check_overlap(windows, measuring, allow=allow_overlap),
        sources=_sources(windows, {document.name: document for document in documents}),
    )


def check_overlap(calibration: Sequence[Window], measuring: Sequence[Window], *, allow: bool = False) -> float:
    """The share of the measuring text's runs of tokens that calibration has seen.

    Raises:
        BadInput: there are such runs, and it was not allowed.
    """
    asked = window_hashes(measuring, n=OVERLAP_TOKENS)
    shared = asked & window_hashes(calibration, n=OVERLAP_TOKENS, step=1) if asked else set()
    overlap = len(shared) / len(asked) if asked else 0.0
    if overlap and not allow:
        raise BadInput(
            f"{overlap:.1%} of the measuring text also occurs in the calibration text "
            f"({OVERLAP_TOKENS} tokens in a row).",
            means="A level calibrated on what it is measured on looks better than it is.",
            do="Use different texts: measure on another, calibrate on another, or leave out the importance matrix.",
        )
    return overlap


def _sources(windows: Sequence[Window], documents: Mapping[str, Document]) -> tuple[TextSource, ...]:
    tokens: dict[str, int] = {}
    for window in windows:
        tokens[window.document] = tokens.get(window.document, 0) + len(window.tokens)
    return tuple(
        TextSource(name, count, languages_of(documents[name]), subject_of(documents[name]))
        if name in documents
        else TextSource(name, count)
        for name, count in tokens.items()
    )
