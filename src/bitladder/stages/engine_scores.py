"""How close levels stay to their source, measured by the engine itself (``engines/library_child.py``): for every
architecture that llama.cpp runs, with its own arithmetic.

The same windows and the same scored positions as the walk's. Source and levels are open side by side, mapped from their
files, and their logits meet piece by piece, so that none are stored. What differs from the walk is what is measured: a
file as it runs, whose inputs are rounded beside quantized weights, against the source as it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitladder import __version__
from bitladder.describe.cache_types import CacheTypes
from bitladder.describe.windows import Window, check_tokens, tokens_hash
from bitladder.engines.library_process import answers, numbers_of
from bitladder.errors import BadWeights
from bitladder.files.engine_package import engine_version
from bitladder.files.gguf import GgufFile
from bitladder.files.kept_array import KeptArray
from bitladder.formats.blocks import QTYPES
from bitladder.progress import Progress, silent
from bitladder.walk.head import TokenScores

_ROWS = 5
"""Kept of a level: its KL, log-likelihood and likeliest token, then the last two of its reference."""

SoFar = Callable[[int, float], None]


def engine_scores(
    reference: GgufFile,
    levels: Sequence[GgufFile],
    windows: Sequence[Window],
    *,
    threads: int,
    caches: Sequence[CacheTypes] | None = None,
    keep: Path | None = None,
    progress: Progress = silent,
    so_far: SoFar = lambda _level, _mean: None,
) -> list[TokenScores]:
    """Scores of every scored token, windows in the caller's order, of the reference and then of each level.

    Args:
        reference: whose predictions the others are compared with; the first of its parts names them all.
        levels: files of the same model, at least one.
        windows: token windows of the text.
        threads: of the engine.
        caches: types of the KV cache of the reference and of each level; None for 32 bits, of which no level loses any.
        keep: a folder in which a killed call leaves the windows it has done, a file for each level; one over the same
            files and text goes on from there, and removes them at its end. None keeps nothing.
        progress: told after each window.
        so_far: told each level's number and its mean KL so far.

    Raises:
        BadInput: nothing to score, or a token that the model does not have.
        BadWeights: predictions are not finite.
        EngineError: the engine did not load a file, or died.
        OutputError: what is kept cannot be written.
    """
    check_tokens(windows, reference.model.dims.n_vocab)
    ends = np.cumsum([0, *(window.scored for window in windows)])
    text = tokens_hash(windows)
    each: Sequence[CacheTypes | None] = caches or [None] * (1 + len(levels))
    kept = [
        _Kept(keep, reference, level, text, ends, caches and (each[0], cache))
        for level, cache in zip(levels, each[1:], strict=True)
    ]
    done = min(one.windows for one in kept)
    rows = np.empty((len(levels), _ROWS, int(ends[-1])))
    for row, one in zip(rows, kept, strict=True):
        row[:, : ends[done]] = one.rows[:, : ends[done]]
    keys = [(file.path, cache) for file, cache in zip([reference, *levels], each, strict=True)]
    distinct = list(dict.fromkeys(keys))  # the same file with the same cache is computed once
    place = [distinct.index(key) for key in keys]
    files = [[reference, *levels][place.index(at)] for at in range(len(distinct))]
    request = {
        "kind": "score",
        "files": [str(file.path) for file in files],
        "n_vocab": reference.model.dims.n_vocab,
        "windows": [window.tokens.tolist() for window in windows],
        "first": [window.first for window in windows],
        "done": done,
        "threads": threads,
        "caches": [_numbers(cache) for _, cache in distinct if cache] or None,
    }
    most = 3 * len(files) * max(window.scored for window in windows)
    progress("engine: reading the models", done, len(windows))
    for message in answers(request, reference.path, most=most) if done < len(windows) else ():
        if message.kind != "window" or done == len(windows):
            continue
        shape = (len(files), 3, windows[done].scored)
        scores = _finite(numbers_of(message, math.prod(shape), reference.path).reshape(shape), files)
        at, done = slice(ends[done], ends[done + 1]), done + 1
        rows[:, :3, at], rows[:, 3:, at] = scores[place[1:]], scores[0, 1:]
        for number, row in enumerate(rows):
            so_far(number, float(row[0, : ends[done]].mean()))
        progress("engine: comparing predictions", done, len(windows))
        for row, one in zip(rows, kept, strict=True):
            if one.array.due():
                one.array.save(row[:, : ends[done]])
    for one in kept:
        one.array.remove()
    own = np.zeros_like(rows[0, :3])
    own[1:] = rows[0, 3:]
    return [_token_scores(one) for one in (own, *rows)]


def _numbers(cache: CacheTypes) -> tuple[int, int]:
    return QTYPES[cache.k.upper()].ggml_type, QTYPES[cache.v.upper()].ggml_type


def _token_scores(rows: NDArray[np.float64]) -> TokenScores:
    return TokenScores(rows[0], rows[1], rows[2].astype(np.int64))


def _finite(scores: NDArray[np.float64], files: Sequence[GgufFile]) -> NDArray[np.float64]:
    for own, file in zip(scores, files, strict=True):
        if not np.isfinite(own).all():
            raise BadWeights(
                f"The engine's predictions from {file.path} are not finite.",
                means="A tensor is damaged, or a sum overflows in the engine's arithmetic.",
                do="Look with `bitladder inspect` whether the file is sound, or choose another level.",
            )
    return scores


class _Kept:
    """What a killed call left of one level: ``rows`` f64[5, tokens] of its first ``windows``."""

    def __init__(
        self,
        folder: Path | None,
        reference: GgufFile,
        level: GgufFile,
        text: str,
        ends: NDArray[np.int64],
        caches: object = None,
    ) -> None:
        key = ["scores", __version__, engine_version(), reference.sha256, level.sha256, text] if folder else []
        key += [str(caches)] if folder and caches else []
        self.array = KeptArray(folder, *key)
        self.rows, self.windows = np.empty((_ROWS, 0)), 0
        found = self.array.load()
        if found is not None and found.ndim == 2 and len(found) == _ROWS:
            whole = np.flatnonzero(ends == found.shape[1])
            if len(whole):
                self.rows, self.windows = found, int(whole[-1])
