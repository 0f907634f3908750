"""Fidelity of a whole ladder in one pass over the model's layers.
 One layer of weights is in memory at a time. Each level has its own hidden states; levels whose tensors have
been equal so far share theirs. At the end the next-token distributions of the reference and of every level
meet (``engines/head.py``): KL divergence, nll and the most likely token of every scored position, without a
logits file. ``docs/measure.md`` defines each figure.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.describe.model import Model
from bitladder.describe.text import Document
from bitladder.describe.windows import SHORTEST, WINDOW, Window, cut
from bitladder.engines.head import HeadInput, TokenScores, compare
from bitladder.engines.layers import LayeredModel, inference
from bitladder.engines.states import Batch, Shelf, States, batches_of
from bitladder.engines.weights import FileWeights, LevelWeights
from bitladder.errors import BadInput
from bitladder.files.gguf import GgufFile
from bitladder.formats.roles import OUTPUT_NORM
from bitladder.progress import Progress, silent
from bitladder.records.fidelity import Fidelity
from bitladder.stats.bootstrap import quantile_interval, ratio_interval
from bitladder.units import GiB, MiB

_HEAD_BYTES = 512 * MiB
_SEED = 20240229  # intervals are the same in every run on the same scores


@dataclass(frozen=True)
class Candidate:
    """A level to compare with the source: its name, and where its weights come from."""

    level: str
    weights: LevelWeights


@dataclass
class _Group:
    """Models (0 is the reference, then the candidates in order) that have shared all weights so far, and
    their states."""

    members: list[int]
    states: States


def text_windows(
    documents: Sequence[Document], tokenize: Callable[[str], Sequence[int]], model: Model, *, n: int = WINDOW
) -> list[Window]:
    """Tokenize documents as the engine does and cut them into windows.

    Args:
        documents: the text.
        tokenize: the engine's own tokenizer, special tokens added as the model asks for.
        model: says whether a BOS token starts every window, and bounds ``n`` by the trained context.
        n: tokens in a window.

    Raises:
        BadInput: too little text to score anything.
    """
    ids = [(document.name, tokenize(document.text)) for document in documents]
    bos = model.metadata.get("tokenizer.ggml.bos_token_id")
    adds_bos = bool(model.metadata.get("tokenizer.ggml.add_bos_token", False)) or any(
        len(tokens) > 0 and tokens[0] == bos for _, tokens in ids
    )
    windows = cut(ids, n=min(n, model.dims.n_ctx_train), bos=bos if adds_bos else None)
    if not windows:
        longest = max((len(tokens) for _, tokens in ids), default=0)
        raise BadInput(
            f"The text is too short to measure on: {len(ids)} document(s), the longest of {longest} tokens; "
            f"at least {SHORTEST} tokens in one document are needed.",
            means="Each prediction needs context before it, and an average needs many predictions.",
            do="Give a longer text (a few thousand words are a good start), or leave out --text to use the one that ships.",
        )
    return windows


def walk(
    source: GgufFile,
    candidates: Sequence[Candidate],
    windows: Sequence[Window],
    *,
    progress: Progress = silent,
    device: str = "cpu",
    threads: int = 1,
    state_bytes: int = GiB,
    spill: Path | None = None,
) -> list[Fidelity]:
    """Compare levels with their source on the same tokens, in one pass.

    Args:
        source: the reference model.
        candidates: the levels, each with its weights.
        windows: token windows of the text (``text_windows``).
        progress: told after each layer.
        device: where arithmetic happens, as torch names it.
        threads: for dequantizing the source; torch's own threads are torch's setting.
        state_bytes: hidden states beyond this go to a file in ``spill`` (the system's folder for temporary
            files by default).
        spill: see ``state_bytes``.

    Returns:
        One record per candidate, in order.

    Raises:
        BadInput: no windows, or token ids that the model does not have.
        BadFile, BadWeights, UnknownArchitecture: the model cannot be walked.
        OutputError: no room for hidden states.
    """
    scores = token_scores(
        source, candidates, windows,
        progress=progress, device=device, threads=threads, state_bytes=state_bytes, spill=spill,
    )  # fmt: skip
    return [
        fidelity(candidate.level, own, scores[0], windows)
        for candidate, own in zip(candidates, scores[1:], strict=True)
    ]


def token_scores(
    source: GgufFile,
    candidates: Sequence[Candidate],
    windows: Sequence[Window],
    *,
    progress: Progress = silent,
    device: str = "cpu",
    threads: int = 1,
    state_bytes: int = GiB,
    spill: Path | None = None,
) -> list[TokenScores]:
    """The walk itself: scores of every scored token, windows in the caller's order, of the reference and then
    of each candidate.

    Arguments and errors as ``walk``.
    """
    _check_tokens(windows, source.model.dims.n_vocab)
    reference = FileWeights(source, threads=threads)
    weights: list[LevelWeights] = [reference, *(candidate.weights for candidate in candidates)]
    model = LayeredModel(source.model, reference, device=device)
    batches = batches_of(windows)
    shelf = Shelf(batches, source.model.dims.n_embd, budget_bytes=state_bytes, folder=spill)
    groups = _embedded(model, weights, batches, shelf)
    total = model.n_layer + 2.0
    for layer in range(model.n_layer):
        progress(f"layer {layer + 1} of {model.n_layer}", layer, total)
        groups = [
            part for group in groups for part in _through_layer(model, weights, group, layer, batches, shelf)
        ]
        for name in model.layer_names(layer):
            for own in weights:
                own.forget(name)
    progress("comparing predictions", model.n_layer, total)
    found = _at_the_head(model, weights, groups, batches, windows)
    progress("comparing predictions", total, total)
    return found


def _check_tokens(windows: Sequence[Window], n_vocab: int) -> None:
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


def _split(members: Sequence[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Members with equal keys together, in order."""
    parts: dict[Hashable, list[int]] = {}
    for member in members:
        parts.setdefault(key(member), []).append(member)
    return list(parts.values())


def _embedded(
    model: LayeredModel, weights: Sequence[LevelWeights], batches: Sequence[Batch], shelf: Shelf
) -> list[_Group]:
    """Embeddings of every distinct table."""
    groups = []
    for members in _split(range(len(weights)), lambda one: weights[one].identity(model.embedding)):
        states = shelf.take()
        for batch in batches:
            states.put(batch, model.embed(batch.tokens, weights[members[0]]))
        groups.append(_Group(members, states))
    return groups


def _through_layer(
    model: LayeredModel,
    weights: Sequence[LevelWeights],
    group: _Group,
    layer: int,
    batches: Sequence[Batch],
    shelf: Shelf,
) -> list[_Group]:
    """Push a group through a layer; it falls apart into groups that still share everything."""
    names = model.layer_names(layer)
    parts = _split(group.members, lambda one: tuple(weights[one].identity(name) for name in names))
    result = []
    for number, members in enumerate(parts):
        # The last part to go may overwrite the states that all parts start from.
        states = group.states if number == len(parts) - 1 else shelf.take()
        block = model.layer(layer, weights[members[0]])
        for batch in batches:
            out = model.run(block, layer, group.states.get(batch).to(model.device))
            states.put(batch, out)
        result.append(_Group(members, states))
    return result


def _at_the_head(
    model: LayeredModel,
    weights: Sequence[LevelWeights],
    groups: Sequence[_Group],
    batches: Sequence[Batch],
    windows: Sequence[Window],
) -> list[TokenScores]:
    """Scores of every model. Models with the same states and the same head are scored once."""
    distinct: list[tuple[int, States]] = []
    place = [0] * len(weights)
    for group in groups:
        for members in _split(group.members, lambda one: _head_identity(model, weights[one])):
            for member in members:
                place[member] = len(distinct)
            distinct.append((members[0], group.states))
    # The reference is compared with all others, so it stands first.
    order = sorted(range(len(distinct)), key=lambda at: at != place[0])
    rank = {at: number for number, at in enumerate(order)}
    per_token = len(distinct) * model.model.dims.n_embd * 4
    found: list[dict[int, TokenScores]] = [{} for _ in distinct]
    for chunk in _chunks(batches, windows, max(1, _HEAD_BYTES // per_token)):
        inputs = [
            _head_input(model, weights[distinct[at][0]], distinct[at][1], chunk, windows) for at in order
        ]
        targets = np.concatenate(
            [windows[at].tokens[windows[at].first + 1 :] for batch in chunk for at in batch.windows]
        )
        scores = compare(inputs, targets, model.model.dims.n_vocab, softcap=model.logit_softcap)
        for number, one in enumerate(scores):
            found[number].update(_by_window(one, chunk, windows))
    joined = [_joined([scores[at] for at in range(len(windows))]) for scores in found]
    return [joined[rank[place[member]]] for member in range(len(weights))]


def _head_identity(model: LayeredModel, weights: LevelWeights) -> Hashable:
    norm = weights.identity(OUTPUT_NORM) if model.family.has_output_norm else None
    return norm, weights.identity(model.output)


def _chunks(batches: Sequence[Batch], windows: Sequence[Window], limit: int) -> list[list[Batch]]:
    """Batches together as long as their scored tokens fit the limit."""
    chunks: list[list[Batch]] = []
    held = 0
    for batch in batches:
        scored = sum(windows[at].scored for at in batch.windows)
        if chunks and held + scored <= limit:
            chunks[-1].append(batch)
            held += scored
        else:
            chunks.append([batch])
            held = scored
    return chunks


def _head_input(
    model: LayeredModel,
    weights: LevelWeights,
    states: States,
    chunk: Sequence[Batch],
    windows: Sequence[Window],
) -> HeadInput:
    """The normed states of scored positions, and the rows of the output matrix."""
    norm = model.norm(weights)
    kept = []
    with inference():
        for batch in chunk:
            held = states.get(batch)
            for row, at in enumerate(batch.windows):
                kept.append(norm(held[row, windows[at].first : len(windows[at].tokens) - 1].to(model.device)))
    return HeadInput(
        torch.cat(kept), weights.identity(model.output), lambda rows: weights(model.output, rows)
    )


def _by_window(
    scores: TokenScores, chunk: Sequence[Batch], windows: Sequence[Window]
) -> dict[int, TokenScores]:
    parts, start = {}, 0
    for at in (at for batch in chunk for at in batch.windows):
        here = slice(start, start + windows[at].scored)
        parts[at] = TokenScores(scores.kl[here], scores.nll[here], scores.top1[here])
        start = here.stop
    return parts


def _joined(parts: Sequence[TokenScores]) -> TokenScores:
    return TokenScores(
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.nll for part in parts]),
        np.concatenate([part.top1 for part in parts]),
    )


def _clusters(windows: Sequence[Window]) -> tuple[str, NDArray[np.int64]]:
    """The unit that intervals resample, and which unit each scored token belongs to.

    Documents; in a single document its windows, which are further from independent than documents are.
    """
    names = list(dict.fromkeys(window.document for window in windows))
    if len(names) > 1:
        return "document", np.concatenate([np.full(w.scored, names.index(w.document)) for w in windows])
    return "window", np.concatenate([np.full(w.scored, at) for at, w in enumerate(windows)])


def fidelity(level: str, own: TokenScores, reference: TokenScores, windows: Sequence[Window]) -> Fidelity:
    """A level's figures and their intervals from the scores of every token (``docs/measure.md``)."""
    unit, cluster = _clusters(windows)
    units = int(cluster.max()) + 1
    rng = np.random.default_rng(_SEED)

    def sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(cluster, weights=values, minlength=units).astype(np.float64)

    tokens = sums(np.ones(len(cluster)))
    kl = ratio_interval(sums(own.kl), tokens, rng, scale="log")
    lost = ratio_interval(sums(own.nll - reference.nll), tokens, rng)
    same = (own.top1 == reference.top1).astype(np.float64)
    top1 = ratio_interval(sums(same), tokens, rng)
    median = quantile_interval(own.kl, cluster, 0.5, rng)
    p99 = quantile_interval(own.kl, cluster, 0.99, rng)
    return Fidelity(
        level=level, tokens=len(cluster), units=units, unit=unit,
        kl_mean=kl.value, kl_low=kl.low, kl_high=kl.high,
        kl_median=median.value, kl_median_low=median.low, kl_median_high=median.high,
        kl_p99=p99.value, kl_p99_low=p99.low, kl_p99_high=p99.high, kl_max=float(own.kl.max()),
        ppl=float(np.exp(own.nll.mean())), ppl_reference=float(np.exp(reference.nll.mean())),
        ppl_ratio=float(np.exp(lost.value)), ppl_ratio_low=float(np.exp(lost.low)), ppl_ratio_high=float(np.exp(lost.high)),
        top1=top1.value, top1_low=max(0.0, top1.low), top1_high=min(1.0, top1.high),
    )  # fmt: skip
