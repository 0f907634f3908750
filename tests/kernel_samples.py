"""Weights to quantize that come out the same everywhere: uniform random numbers, added, multiplied and divided only."""

from __future__ import annotations

import hashlib

import numpy as np

from bitladder.kernels import quantize

ROWS, COLUMNS = 48, 512
KINDS = ("even", "heavy", "tiny")


def sample(kind: str) -> np.ndarray:
    """f32[48, 512] of bell-shaped weights; some huge ones among them (heavy); or of tiny, uneven rows (tiny)."""
    rng = np.random.default_rng(20)
    bell = rng.random((12, ROWS, COLUMNS)).sum(0) - 6
    if kind == "heavy":
        bell = bell / (0.05 + rng.random((ROWS, COLUMNS))) ** 2
    if kind == "tiny":
        return (bell * 1e-5 * (1 + 20 * rng.random((ROWS, 1)))).astype(np.float32)
    return (bell * 0.02).astype(np.float32)


def sample_importance() -> np.ndarray:
    """f32[512], a few columns a thousand times as important as most."""
    u = np.random.default_rng(21).random(COLUMNS)
    return (0.1 / (0.01 + u) ** 1.5).astype(np.float32)


def squared_error(weights: np.ndarray, restored: np.ndarray, importance: np.ndarray | None) -> float:
    """Sum of squared differences, each times its column's importance."""
    w = 1.0 if importance is None else importance.astype(np.float64)
    return float((w * (weights.astype(np.float64) - restored) ** 2).sum())


def bytes_digest(qtype: str, effort: str) -> str:
    """A digest of the bytes of every sample, without an importance and with one."""
    digest = hashlib.sha256()
    for kind in KINDS:
        for importance in (None, sample_importance()):
            digest.update(quantize(sample(kind), qtype, importance=importance, effort=effort).tobytes())
    return digest.hexdigest()[:16]
