"""What kind of work a text is: the most similar input of the workload, by character n-grams.

Each text becomes a vector of its byte 4-grams, hashed into 2^14 buckets, weighted by tf-idf (1 + ln count,
times ln((1 + N) / (1 + n)) + 1) and scaled to length 1; similarity is the cosine. Bytes instead of words,
so that any language works and nothing has to be downloaded; about 0.1 ms for a short prompt.

What it gives up: it sees wording, not meaning. A question put in other words than the workload's looks
unknown, and so do most texts when the workload is small. That is why unknown work goes to the quality tier,
and why the floor below which a text counts as unknown comes from the workload itself: its own inputs'
similarities to their nearest others, of which the lowest tenth is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitladder.serve.router import Guess

BUCKETS = 1 << 14
_GRAM = 4
_LIMIT = 4096  # bytes of a text looked at, half from each end: instructions stand at the start or the end

Vector = NDArray[np.float32]


def _buckets(text: str) -> NDArray[np.int64]:
    """The bucket of every 4-gram of a text, letter case folded."""
    data = text.casefold().encode("utf-8", "surrogatepass")
    if len(data) > _LIMIT:
        data = data[: _LIMIT // 2] + data[-_LIMIT // 2 :]
    codes = np.frombuffer(b" " + data.ljust(_GRAM) + b" ", dtype=np.uint8).astype(np.uint32)
    grams = codes[:-3] | codes[1:-2] << 8 | codes[2:-1] << 16 | codes[3:] << 24
    # Fibonacci hashing: the multiplier is 2^32 divided by the golden ratio; the top bits are the best mixed.
    return ((grams * np.uint32(2654435769)) >> np.uint32(32 - 14)).astype(np.int64)


class Similarity:
    """The inputs of a workload, ready to be compared with.

    ``inputs`` are (id, tag, text); an input with several tags comes several times.
    """

    def __init__(self, inputs: Sequence[tuple[str, str, str]]) -> None:
        self._ids = [input_id for input_id, _, _ in inputs]
        self._tags = [tag for _, tag, _ in inputs]
        counts = np.stack([np.bincount(_buckets(text), minlength=BUCKETS) for _, _, text in inputs])
        present = (counts > 0).sum(axis=0)
        self._idf: Vector = (np.log((1 + len(inputs)) / (1 + present)) + 1).astype(np.float32)
        self._vectors = np.stack([self._vector(row) for row in counts])
        self.floor = self._own_floor()

    def _vector(self, counts: NDArray[np.int64]) -> Vector:
        weights = np.zeros(BUCKETS, np.float32)
        at = np.flatnonzero(counts)
        weights[at] = (1 + np.log(counts[at])) * self._idf[at]
        return weights / np.linalg.norm(weights)

    def _own_floor(self) -> float:
        """Lowest tenth of the inputs' similarities to their nearest other input; above 1 when there is no
        other.
        """
        among = self._vectors @ self._vectors.T
        different = np.array([[a != b for b in self._ids] for a in self._ids])
        nearest = [float(row[other].max()) for row, other in zip(among, different, strict=True) if other.any()]
        return float(np.quantile(nearest, 0.1)) if nearest else 2.0

    def guess(self, text: str) -> Guess | None:
        """The nearest input, or None when nothing is near enough."""
        scores = self._vectors @ self._vector(np.bincount(_buckets(text), minlength=BUCKETS))
        best = int(scores.argmax())
        if scores[best] < self.floor:
            return None
        return Guess(self._tags[best], self._ids[best], float(scores[best]))
