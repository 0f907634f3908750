"""Next-token distributions of two models compared from their logits, as the walk's head does without logits
(``walk/head.py``): KL(reference || level), negative log-likelihood of the token that came next, the likeliest token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROWS = 16
"""Rows of logits at once, so that what is computed between stays small beside the logits themselves."""


@dataclass(frozen=True)
class Distribution:
    """What is needed of a model's logits f32[tokens, n_vocab]: ``log_z`` f64[tokens], the logarithm of the sum of
    their exponentials; ``nll`` f64[tokens] in nats; ``top1`` int64[tokens].
    """

    log_z: NDArray[np.float64]
    nll: NDArray[np.float64]
    top1: NDArray[np.int64]


def distribution(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> Distribution:
    """Of logits f32[tokens, n_vocab] beside the tokens that came next, int64[tokens]."""
    top1 = logits.argmax(axis=1)
    peak = np.take_along_axis(logits, top1[:, None], axis=1)
    total = np.empty(len(logits))
    for at in range(0, len(logits), _ROWS):
        rows = slice(at, at + _ROWS)
        total[rows] = np.exp(logits[rows] - peak[rows]).sum(axis=1, dtype=np.float64)
    log_z = peak[:, 0].astype(np.float64) + np.log(total)
    return Distribution(log_z, log_z - logits[np.arange(len(targets)), targets], top1.astype(np.int64))


def divergence(
    reference: NDArray[np.float32], own: NDArray[np.float32], of_reference: Distribution, of_own: Distribution
) -> NDArray[np.float64]:
    """KL(reference || own) in nats, f64[tokens], of logits f32[tokens, n_vocab]:
    sum_v p_v (r_v - o_v) - log Z_ref + log Z_own with p the reference's distribution."""
    shift = np.empty(len(reference))
    for at in range(0, len(reference), _ROWS):
        rows = slice(at, at + _ROWS)
        weight = np.exp(reference[rows] - of_reference.log_z[rows, None].astype(np.float32))
        shift[rows] = (weight * (reference[rows] - own[rows])).sum(axis=1, dtype=np.float64)
        shift[rows] /= weight.sum(axis=1, dtype=np.float64)  # log_z was rounded: the weights' sum is not quite 1
    # Rounding can leave a divergence of zero a hair below it.
    return np.maximum(shift - of_reference.log_z + of_own.log_z, 0.0)
