"""Token windows: what a text becomes before a model reads it, for measuring and for calibration alike.

As llama.cpp's perplexity tool does: each document is cut into windows of ``n`` tokens that do not overlap;
where the tokenizer adds a BOS token, the first token of every window is replaced by it; and a window scores
the predictions of its second half only, so that each has at least half a window of context. Unlike there,
documents are never joined, and a document's last, shorter window is kept when it has at least ``shortest``
tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitladder.describe.model import Model
from bitladder.describe.text import Document
from bitladder.errors import BadInput, TooShort

WINDOW = 512
SHORTEST = 64
WORTH_KEEPING = 128
_WEIGHING_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Window:
    """Token ids int64[n] of one window of one document."""

    document: str
    tokens: NDArray[np.int64]
    begin: int = 0
    """The first position whose next token is scored, where that is not half the window; 0 for half."""

    @property
    def first(self) -> int:
        """The first position whose next token is scored."""
        return self.begin or len(self.tokens) // 2

    @property
    def scored(self) -> int:
        """How many predictions count: those at ``first`` up to the last but one position."""
        return len(self.tokens) - 1 - self.first


def cut(
    documents: Iterable[tuple[str, Sequence[int]]],
    *,
    n: int = WINDOW,
    shortest: int = SHORTEST,
    bos: int | None = None,
) -> list[Window]:
    """Cut tokenized documents (name, ids) into windows.

    Args:
        documents: ids as the engine's tokenizer gives them, its BOS included when it adds one.
        n: tokens in a window.
        shortest: a document's last window is kept from this many tokens on.
        bos: the BOS token when the tokenizer adds one: replaces the first token of every window.
    """
    windows = []
    for name, ids in documents:
        tokens = np.asarray(ids, np.int64)
        for start in range(0, len(tokens), n):
            part = tokens[start : start + n].copy()
            if len(part) < min(shortest, n):
                break
            if bos is not None:
                part[0] = bos
            windows.append(Window(name, part))
    return windows


def tokens_in_common(before: Sequence[int], tokens: Sequence[int], first: int) -> int:
    """Tokens in front of the ``first`` scored one that a window has in common with the one before it, and that need not
    be computed again; 0 where they are few, so that windows of one text are each computed from their beginning."""
    one, other = (np.asarray(ids, np.int64) for ids in (before[:first], tokens[:first]))
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    same = int(differ[0]) if len(differ) else length
    return same if same >= WORTH_KEEPING else 0


def check_tokens(windows: Sequence[Window], n_vocab: int) -> None:
    """Refuse windows that a model with such a vocabulary cannot be measured on.

    Raises:
        BadInput: nothing to score, or a token id that it does not have.
    """
    if not sum(window.scored for window in windows):
        raise BadInput(
            f"There is nothing to score in {len(windows)} token windows.",
            means="The text is too short.",
            do="Give a longer text.",
        )
    largest = max(int(window.tokens.max()) for window in windows)
    if largest >= n_vocab:
        raise BadInput(
            f"The text has the token id {largest}, the model's vocabulary has {n_vocab}.",
            means="The tokenizer does not belong to these weights.",
            do="Convert the model again, with its own tokenizer.",
        )


def window_hashes(windows: Iterable[Window], *, n: int = 32, step: int | None = None) -> set[bytes]:
    """Hashes of every run of ``n`` tokens that starts at a multiple of ``n // 2``: shared ones betray
    overlapping texts."""
    found = set()
    for window in windows:
        for start in range(0, len(window.tokens) - n + 1, step or max(1, n // 2)):
            found.add(hashlib.blake2b(window.tokens[start : start + n].tobytes(), digest_size=16).digest())
    return found


def different(windows: Iterable[Window]) -> list[Window]:
    """Windows in their order, each text once: what occurs twice would be held out and learnt by heart."""
    first: dict[bytes, Window] = {}
    for window in windows:
        first.setdefault(window.tokens.tobytes(), window)
    return list(first.values())


def weighing_part(windows: Sequence[Window]) -> list[Window]:
    """Windows of about 4,096 tokens, spread over the text: what gradients are taken from, as means over all tokens."""
    return list(windows[:: max(1, round(sum(len(window.tokens) for window in windows) / _WEIGHING_TOKENS))])


def tokens_hash(windows: Iterable[Window]) -> str:
    """SHA-256 over the tokens of windows, in order: the same text cut in the same way."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(len(window.tokens).to_bytes(4, "little") + window.tokens.tobytes())
        if window.begin:
            digest.update(b"from" + window.begin.to_bytes(4, "little"))
    return digest.hexdigest()


def text_windows(
    documents: Sequence[Document],
    tokenize: Callable[[str], Sequence[int]],
    model: Model,
    *,
    n: int = WINDOW,
    bos: int | None = None,
) -> list[Window]:
    """Tokenize documents as the engine does and cut them into windows.

    Args:
        documents: the text.
        tokenize: the engine's own tokenizer, special tokens added as the model asks for.
        model: says whether a BOS token starts every window, and bounds ``n`` by the trained context.
        n: tokens in a window.
        bos: the BOS token of a model whose header has no tokenizer; by default the header's.

    Raises:
        TooShort: too little text to score anything.
    """
    ids = [(document.name, tokenize(document.text)) for document in documents]
    bos = bos_in_front(model, [tokens for _, tokens in ids], bos)
    windows = cut(ids, n=model.dims.context(n), bos=bos)
    if not windows:
        longest = max((len(tokens) for _, tokens in ids), default=0)
        raise TooShort(
            f"The text is too short to measure or calibrate on: {len(ids)} document(s), "
            f"the longest of {longest} tokens; at least {SHORTEST} tokens in one document are needed.",
            means="Each prediction needs context before it, and an average needs many predictions.",
            do="Give a longer text, a few thousand words say, or leave it out to use the one that ships.",
        )
    return windows


def bos_in_front(model: Model, ids: Iterable[Sequence[int]], bos: int | None = None) -> int | None:
    """The token that a window begins with; None where the tokenizer adds none. ``ids``: of whole documents. ``bos``: of
    a model whose header has no tokenizer."""
    bos = model.metadata.get("tokenizer.ggml.bos_token_id", bos)
    adds_bos = bool(model.metadata.get("tokenizer.ggml.add_bos_token", False)) or any(
        len(tokens) > 0 and tokens[0] == bos for tokens in ids
    )
    return bos if adds_bos else None
