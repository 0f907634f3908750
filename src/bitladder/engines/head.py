"""The head without logits: next-token distributions of a reference and of several levels compared in slices
of the vocabulary.

A token's logits are needed only in sums over the vocabulary:

    log Z        = log sum_v exp(l_v)                             of each model KL(ref||q)   = sum_v p_v (l_v
    - m_v) - log Z_ref + log Z_q    with p = exp(l) / Z_ref, m the level's logits nll          = log Z -
    l_target top-1        = the v of the largest l_v
 so the vocabulary is taken a slice at a time and the sums are carried in float64, rescaled when a larger
maximum appears (as in online softmax, Milakov and Gimelshein 2018). Neither the head's weights nor the logits
are ever whole in memory: a slice's weights are read once per distinct head and meet all tokens of all levels
that have it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

F32 = NDArray[np.float32]

SLICE = 4096
_TOKENS = 512


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, float64: ``kl`` in nats, ``nll`` in nats; ``top1`` the most likely next token's
    id."""

    kl: NDArray[np.float64]
    nll: NDArray[np.float64]
    top1: NDArray[np.int64]


@dataclass(frozen=True)
class HeadInput:
    """One model at the head: its normed hidden states f32[tokens, n_embd] and how to read rows of its output
    matrix.

    Models with equal ``identity`` have the same output matrix.
    """

    states: torch.Tensor
    identity: Hashable
    rows: Callable[[slice], F32]


class _Sums:
    """What one model carries from slice to slice, per token."""

    def __init__(self, tokens: int) -> None:
        self.peak = torch.full((tokens,), -torch.inf)
        self.total = torch.zeros(tokens, dtype=torch.float64)
        self.cross = torch.zeros(tokens, dtype=torch.float64)  # sum of exp(ref - peak of ref) * (ref - own)
        self.target = torch.zeros(tokens, dtype=torch.float64)
        self.best = torch.zeros(tokens, dtype=torch.int64)

    def raise_peak(self, at: slice, logits: torch.Tensor, first: int) -> torch.Tensor:
        """Take a slice's maximum into account; returns the factor that earlier sums must be multiplied by."""
        highest, where = logits.max(dim=1)
        old = self.peak[at]
        higher = highest > old
        self.best[at] = torch.where(higher, where + first, self.best[at])
        new = torch.where(higher, highest, old)
        factor = torch.exp((old - new).double())
        self.peak[at] = new
        self.total[at] *= factor
        return factor


def _logits(states: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = states @ weight.T
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def _take_target(sums: _Sums, at: slice, logits: torch.Tensor, targets: torch.Tensor, first: int) -> None:
    local = targets[at] - first
    inside = (local >= 0) & (local < logits.shape[1])
    picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    sums.target[at] = torch.where(inside, picked.double(), sums.target[at])


def _one_block(
    sums: Sequence[_Sums],
    models: Sequence[HeadInput],
    heads: dict[Hashable, torch.Tensor],
    at: slice,
    targets: torch.Tensor,
    first: int,
    softcap: float | None,
) -> None:
    """Some tokens against one slice of the vocabulary, for every model; the reference is ``models[0]``."""
    reference = _logits(models[0].states[at], heads[models[0].identity], softcap)
    factor = sums[0].raise_peak(at, reference, first)
    _take_target(sums[0], at, reference, targets, first)
    weight = torch.exp(reference - sums[0].peak[at, None])
    sums[0].total[at] += weight.sum(dim=1, dtype=torch.float64)
    for own, model in zip(sums[1:], models[1:], strict=True):
        logits = _logits(model.states[at], heads[model.identity], softcap)
        own.raise_peak(at, logits, first)
        _take_target(own, at, logits, targets, first)
        own.cross[at] *= factor
        own.cross[at] += torch.linalg.vecdot(weight, reference - logits).double()
        own.total[at] += logits.sub_(own.peak[at, None]).exp_().sum(dim=1, dtype=torch.float64)


def compare(
    models: Sequence[HeadInput],
    targets: NDArray[np.int64],
    n_vocab: int,
    *,
    softcap: float | None = None,
    slice_rows: int = SLICE,
) -> list[TokenScores]:
    """Scores of every model against ``models[0]`` on the same tokens.

    Args:
        models: the reference first, then the levels; states f32[tokens, n_embd].
        targets: int64[tokens], the token that really came next.
        n_vocab: rows of the output matrix.
        softcap: the cap on final logits, if the family has one.
        slice_rows: rows of the output matrix in memory at once.
    """
    goal = torch.from_numpy(targets).to(models[0].states.device)
    sums = [_Sums(len(targets)) for _ in models]
    with torch.inference_mode():
        for first in range(0, n_vocab, slice_rows):
            rows = slice(first, min(first + slice_rows, n_vocab))
            heads: dict[Hashable, torch.Tensor] = {}
            for model in models:
                if model.identity not in heads:
                    heads[model.identity] = torch.from_numpy(model.rows(rows)).to(model.states.device)
            for start in range(0, len(targets), _TOKENS):
                _one_block(sums, models, heads, slice(start, start + _TOKENS), goal, first, softcap)
    return [_scores(own, sums[0]) for own in sums]


def _scores(own: _Sums, reference: _Sums) -> TokenScores:
    log_z = own.peak.double() + own.total.log()
    reference_log_z = reference.peak.double() + reference.total.log()
    if own is reference:
        kl = torch.zeros_like(log_z)
    else:
        # Rounding can leave a divergence of zero a hair below it.
        kl = (own.cross / reference.total - reference_log_z + log_z).clamp_min(0)
    return TokenScores(kl.numpy(), (log_z - own.target).numpy(), own.best.numpy())
