"""Speculative decoding: guesses of the next tokens that the model checks together, a batch for the price of a step.

llama.cpp takes guesses from n-grams of the prompt and the answer so far (``ngram``), from a small model with the same
tokens (``draft:FILE``), or from heads that the model itself holds for further tokens (``mtp``). Only guesses that the
model would have chosen are kept, so greedy answers stay the same but for the last bits of sums that are computed in
batches of another shape; whether they do is measured (``stages.speculate``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitladder.describe.model import Model
from bitladder.errors import BadInput, UsageError
from bitladder.files.gguf import read_header
from bitladder.formats.families.heads import HEADS_RUN
from bitladder.formats.parts import nextn_blocks

NGRAM, DRAFT, MTP = "ngram", "draft", "mtp"
_FEW_MORE = 128
"""Tokens that one vocabulary may have beyond the other's, llama.cpp's own limit: padding."""


@dataclass(frozen=True)
class Speculation:
    """Where guesses come from."""

    kind: str
    """``ngram``, ``draft`` or ``mtp``."""
    draft: Path | None = None
    """The small model's GGUF file."""

    def __str__(self) -> str:
        return self.kind if self.draft is None else f"{self.kind}:{self.draft}"


def parse_speculation(text: str) -> Speculation:
    """``ngram``, ``mtp`` or ``draft:FILE``.

    Raises:
        UsageError: it is none of them.
        BadInput: there is no such file.
    """
    kind, colon, file = text.strip().partition(":")
    if kind in (NGRAM, MTP) and not colon:
        return Speculation(kind)
    if kind != DRAFT or not file:
        raise UsageError(
            f"'{text[:60]}' is no way to speculate.",
            do="Write ngram, mtp for the model's own heads, or draft:FILE with a small model.",
        )
    if not Path(file).is_file():
        raise BadInput(f"There is no file '{file}' to draft with.", do="Give the path of a small model's GGUF file.")
    return Speculation(DRAFT, Path(file))


def draft_gap(model: Model, draft: Model) -> str:
    """Why a model's guesses would mean nothing to another; empty where they have the same tokens."""
    own, other = model.metadata, draft.metadata
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre"):
        if own.get(key) != other.get(key):
            return f"its {key.rpartition('.')[2]} is '{other.get(key)}', the model's is '{own.get(key)}'"
    mine, theirs = own.get("tokenizer.ggml.tokens"), other.get("tokenizer.ggml.tokens")
    if not isinstance(mine, list) or not isinstance(theirs, list):
        return "one of the two files has no tokens"
    both = min(len(mine), len(theirs))
    if max(len(mine), len(theirs)) - both > _FEW_MORE:
        return f"it has {len(theirs):,} tokens, the model {len(mine):,}"
    if mine[:both] != theirs[:both]:
        first = next(at for at in range(both) if mine[at] != theirs[at])
        return f"its token {first} is {str(theirs[first])[:20]!r}, the model's is {str(mine[first])[:20]!r}"
    return ""


def heads_gap(model: Model) -> str:
    """Why llama.cpp cannot guess with a model's own heads for further tokens; empty where it can."""
    architecture = model.dims.architecture
    told = model.metadata.get(f"{architecture}.nextn_predict_layers")
    if not nextn_blocks(tensor.name for tensor in model.tensors):
        left = ": it was written without those that its header speaks of" if told else ""
        return f"it holds no heads that predict further tokens (MTP){left}"
    if architecture not in HEADS_RUN:
        return f"llama.cpp does not run the heads of '{architecture}', though the file holds them"
    return ""


def check_speculation(model: Path, speculation: Speculation | None) -> None:
    """Refuse a draft with another tokenizer and heads that are not there, before anything is started.

    Raises:
        BadInput: the draft is no model, or has other tokens; the model has no heads that the engine runs.
    """
    if speculation is None or speculation.kind == NGRAM:
        return
    header = read_header(model)
    if speculation.draft is None:
        if gap := heads_gap(header):
            raise BadInput(
                f"{model} cannot guess with mtp: {gap}.",
                means="Guesses of this kind come from blocks within the model's own file.",
                do="Guess with ngram or draft:FILE, or take a file that keeps its heads.",
            )
        return
    if gap := draft_gap(header, read_header(speculation.draft)):
        raise BadInput(
            f"{speculation.draft} cannot draft for {model}: {gap}.",
            means="A guess is a token, and must be the same token in both.",
            do="Take a smaller model of the same family, or a lower level of the model itself.",
        )
