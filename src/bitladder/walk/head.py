"""The head without logits: next-token distributions of a reference and of several levels compared in slices of the
vocabulary.

A token's logits are needed only in sums over the vocabulary:

    log Z        = log sum_v exp(l_v)                      of each model
    KL(ref||q)   = sum_v p_v (l_v - m_v) - log Z_ref + log Z_q
                   with p = exp(l) / Z_ref, m the level's logits
    nll          = log Z - l_target
    top-1        = the v of the largest l_v

so the vocabulary is taken a slice at a time and the sums are carried in float64, rescaled when a larger maximum appears
(as in online softmax, Milakov and Gimelshein 2018). Neither the head's weights nor the logits are ever whole in memory:
a slice's weights are read once per distinct head and meet all tokens of all levels that have it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.walk.products import linear
from bitladder.walk.side_by_side import side_by_side

F32 = NDArray[np.float32]

SLICE = 2048
_TOKENS = 128
"""At a time: few enough that several threads end together."""


def softcapped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits bent into (-cap, cap) by a tanh, as Gemma 2 does; as they are without one."""
    return torch.tanh(logits / cap) * cap if cap else logits


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, float64: ``kl`` and ``nll`` in nats; ``top1`` the most likely next token's id."""

    kl: NDArray[np.float64]
    nll: NDArray[np.float64]
    top1: NDArray[np.int64]

    def split(self, ends: NDArray[np.int64]) -> list[TokenScores]:
        """Consecutive parts that end before ``ends``."""
        starts = np.concatenate([[0], ends[:-1]])
        return [TokenScores(self.kl[a:b], self.nll[a:b], self.top1[a:b]) for a, b in zip(starts, ends, strict=True)]

    @staticmethod
    def joined(parts: Sequence[TokenScores]) -> TokenScores:
        """Parts one after another."""
        return TokenScores(
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.nll for part in parts]),
            np.concatenate([part.top1 for part in parts]),
        )


@dataclass(frozen=True)
class HeadInput:
    """One model at the head: normed hidden states f32[tokens, n_embd], and how to read rows of its output
    matrix.

    Models with equal ``identity`` have the same output matrix.
    """

    states: torch.Tensor
    identity: Hashable
    rows: Callable[[slice], F32]


class _Sums:
    """What one model carries from slice to slice, per token."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(tokens, dtype=dtype, device=device)

        self.peak = torch.full((tokens,), -torch.inf, device=device)
        self.total = zeros(torch.float64)  # sum of exp(own - peak)
        self.cross = zeros(torch.float64)  # sum of exp(ref - peak of ref) * (ref - own)
        self.target = zeros(torch.float64)
        self.best = zeros(torch.int64)

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

    def take_target(self, at: slice, logits: torch.Tensor, local: torch.Tensor) -> None:
        """Keep the logit of the token that came next where it lies in this slice (``local`` counts from its
        start)."""
        inside = (local >= 0) & (local < logits.shape[1])
        picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target[at] = torch.where(inside, picked.double(), self.target[at])

    @property
    def log_z(self) -> torch.Tensor:
        """The logarithm of the partition sum."""
        return self.peak.double() + self.total.log()


class _Comparison:
    """All models on one set of tokens; ``models[0]`` is the reference."""

    def __init__(
        self, models: Sequence[HeadInput], targets: NDArray[np.int64], softcap: float | None, bias: F32 | None
    ) -> None:
        device = models[0].states.device
        self.models, self.softcap, self._bias = models, softcap, bias
        self._added: torch.Tensor | None = None
        self.targets = torch.from_numpy(targets).to(device)
        self.sums = [_Sums(len(targets), device) for _ in models]

    def take_slice(self, rows: slice) -> None:
        """Account for a slice of the vocabulary: all tokens of all models, a block of tokens at a time."""
        heads: dict[Hashable, torch.Tensor] = {}
        if self._bias is not None:
            self._added = torch.from_numpy(self._bias[rows]).to(self.targets.device)
        for model in self.models:
            if model.identity not in heads:
                heads[model.identity] = torch.from_numpy(model.rows(rows)).to(model.states.device)
        blocks = [slice(start, start + _TOKENS) for start in range(0, len(self.targets), _TOKENS)]
        if self.targets.device.type == "cpu":
            side_by_side(lambda at: self._take_block(heads, at, rows.start), blocks)
        else:
            for at in blocks:
                self._take_block(heads, at, rows.start)

    @torch.inference_mode()
    def _take_block(self, heads: dict[Hashable, torch.Tensor], at: slice, first: int) -> None:
        local = self.targets[at] - first
        sums, model = self.sums[0], self.models[0]
        reference = self._logits(model.states[at], heads[model.identity])
        factor = sums.raise_peak(at, reference, first)
        sums.take_target(at, reference, local)
        weight = torch.exp(reference - sums.peak[at, None])
        sums.total[at] += weight.sum(dim=1, dtype=torch.float64)
        for own, model in zip(self.sums[1:], self.models[1:], strict=True):
            logits = self._logits(model.states[at], heads[model.identity])
            own.raise_peak(at, logits, first)
            own.take_target(at, logits, local)
            own.cross[at] *= factor
            own.cross[at] += torch.linalg.vecdot(weight, reference - logits).double()
            own.total[at] += logits.sub_(own.peak[at, None]).exp_().sum(dim=1, dtype=torch.float64)

    def _logits(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return softcapped(linear(states, weight, self._added), self.softcap)

    def scores(self, number: int) -> TokenScores:
        """What came of one model."""
        own, reference = self.sums[number], self.sums[0]
        log_z = own.log_z
        kl = torch.zeros_like(log_z)
        if number:
            # Rounding can leave a divergence of zero a hair below it.
            kl = (own.cross / reference.total - reference.log_z + log_z).clamp_min(0)
        return TokenScores(kl.cpu().numpy(), (log_z - own.target).cpu().numpy(), own.best.cpu().numpy())


def compare(
    models: Sequence[HeadInput],
    targets: NDArray[np.int64],
    n_vocab: int,
    *,
    softcap: float | None = None,
    bias: F32 | None = None,
    slice_rows: int = SLICE,
) -> list[TokenScores]:
    """Scores of every model against ``models[0]`` on the same tokens.

    Args:
        models: the reference first, then the levels; states f32[tokens, n_embd].
        targets: int64[tokens], the token that really came next.
        n_vocab: rows of the output matrix.
        softcap: the cap on final logits, if the family has one.
        bias: f32[n_vocab], what is added to the outputs of every model's head.
        slice_rows: rows of the output matrix in memory at once.
    """
    comparison = _Comparison(models, targets, softcap, bias)
    with torch.inference_mode():
        for first in range(0, n_vocab, slice_rows):
            comparison.take_slice(slice(first, min(first + slice_rows, n_vocab)))
    return [comparison.scores(number) for number in range(len(models))]
