"""Claim: 95% intervals of token figures cover the truth in 93 to 98 of 100 texts, from four to thirty documents,
heavy tails among them.

    scripts/bench interval_coverage [--texts 2000]

Draws texts whose true figure is known: documents with a level of their own and tokens that scatter around it,
of about equal or of very different length; skewed KL, nll differences of either sign, top-1 agreement. Counts
how often the interval of ``bitladder.stats.bootstrap`` holds the truth, and for comparison two simpler ones
on the same texts: the percentile bootstrap over documents, and tokens taken as independent (what llama.cpp's
and most other tools' plus-minus means). Three shapes have heavy tails over documents: one in seven is three
times worse than the rest, or one in ten loses 0.3 nats more, or documents differ by a standard deviation of 0.9
on a logarithmic scale.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Literal

import numpy as np

from bitladder.stats.bootstrap import ratio_interval, resampled_counts

Rng = np.random.Generator
DOCUMENTS = (4, 6, 8, 12, 16, 30)


def kl(rng: Rng, tokens: int) -> np.ndarray:
    return np.exp(rng.normal(rng.normal(-3, 0.5), 1.5, tokens))


def kl_with_outliers(rng: Rng, tokens: int) -> np.ndarray:
    return np.exp(rng.normal(rng.normal(-3, 0.4) + 1.1 * (rng.random() < 1 / 7), 1.2, tokens))


def nll_difference(rng: Rng, tokens: int) -> np.ndarray:
    return rng.normal(0.05, 0.04) + 0.5 * rng.standard_t(4, tokens)


def top1(rng: Rng, tokens: int) -> np.ndarray:
    return (rng.random(tokens) < rng.beta(18, 3)).astype(float)


def kl_of_every_kind(rng: Rng, tokens: int) -> np.ndarray:
    return np.exp(rng.normal(rng.normal(-3, 0.9), 1.5, tokens))


def nll_with_outliers(rng: Rng, tokens: int) -> np.ndarray:
    return nll_difference(rng, tokens) + 0.3 * (rng.random() < 1 / 10)


Shape = tuple[Callable[[Rng, int], np.ndarray], float, Literal["plain", "log"], Literal["more", "less"]]
"""Draws a document of so many tokens; the true figure; the interval's scale, and which way is worse."""
SHAPES: dict[str, Shape] = {
    "KL": (kl, np.exp(-3 + 0.5**2 / 2 + 1.5**2 / 2), "log", "more"),
    "nll difference": (nll_difference, 0.05, "plain", "more"),
    "top-1": (top1, 18 / 21, "plain", "less"),
    "KL, outliers": (kl_with_outliers, np.exp(-3 + 0.08 + 0.72) * (6 + np.exp(1.1)) / 7, "log", "more"),
    "KL, wide": (kl_of_every_kind, np.exp(-3 + 0.9**2 / 2 + 1.5**2 / 2), "log", "more"),
    "nll, outliers": (nll_with_outliers, 0.08, "plain", "more"),
}


def lengths(rng: Rng, documents: int, *, even: bool) -> np.ndarray:
    if even:
        return rng.integers(100, 350, documents)
    return np.maximum(30, rng.lognormal(5.5, 0.8, documents)).astype(int)


def coverage(shape: str, documents: int, texts: int, *, even: bool) -> tuple[float, float, float]:
    """Shares of texts whose interval holds the truth: ours, percentile bootstrap, independent tokens."""
    draw, truth, scale, worse = SHAPES[shape]
    rng = np.random.default_rng([documents, even])
    held = np.zeros(3)
    for _ in range(texts):
        parts = [draw(rng, int(count)) for count in lengths(rng, documents, even=even)]
        x, w = np.array([part.sum() for part in parts]), np.array([float(len(part)) for part in parts])
        ours = ratio_interval(x, w, rng, scale=scale, worse=worse, draws=1000)
        counts = resampled_counts(rng, documents, 1000)
        low, high = np.quantile((counts @ x) / (counts @ w), [0.025, 0.975])
        tokens = np.concatenate(parts)
        error = 1.96 * tokens.std(ddof=1) / np.sqrt(len(tokens))
        held += (ours.low <= truth <= ours.high, low <= truth <= high, abs(tokens.mean() - truth) <= error)
    return tuple(held / texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="only this one; repeatable")
    options = parser.parse_args()
    texts = options.texts
    print(f"{texts} texts each; standard error of a share {100 * np.sqrt(0.95 * 0.05 / texts):.1f} points")
    print(f"{'figure':15} {'lengths':8} {'documents':>9} {'ours':>7} {'percentile':>11} {'tokens':>7}")
    outside = 0
    for shape in options.shape or SHAPES:
        for even in (True, False):
            for documents in DOCUMENTS:
                ours, percentile, tokens = coverage(shape, documents, texts, even=even)
                outside += not 0.925 <= ours <= 0.985
                print(
                    f"{shape:15} {'even' if even else 'uneven':8} {documents:9} "
                    f"{100 * ours:6.1f}% {100 * percentile:10.1f}% {100 * tokens:6.1f}%",
                    flush=True,
                )
    print(f"{outside} rows outside 93 to 98 after rounding")
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
