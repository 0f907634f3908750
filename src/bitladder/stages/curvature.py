"""What errors of the embedding cost where it is looked up: the Hessian that its codes are fitted under.

It takes gradients of a few thousand tokens. Weighing a model for recipes has them at hand and keeps what they say; who
fits a level without that finds it here, by the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitladder import __version__
from bitladder.describe.windows import Window, tokens_hash, weighing_part
from bitladder.errors import OutputError
from bitladder.files.folders import cache_folder
from bitladder.files.gguf import GgufFile
from bitladder.files.kept_array import KeptArray
from bitladder.plan.preflight import WALK_START_S
from bitladder.progress import Progress
from bitladder.stages.forecast import PASSES, walking_need
from bitladder.walk.layers import LayeredModel
from bitladder.walk.sensitivity import curvature_of
from bitladder.walk.weights import FileWeights

F64 = NDArray[np.float64]


def kept_curvature(
    source: GgufFile,
    model: LayeredModel,
    weights: FileWeights,
    windows: Sequence[Window],
    *,
    half: bool,
    state_bytes: int,
    spill: Path,
    progress: Progress,
) -> F64:
    """``walk.sensitivity.curvature_of`` f64[n_embd, n_embd], from a part of the windows; kept between runs.

    Args:
        source: the model.
        model: its layers.
        weights: its weights.
        windows: calibration text.
        half: multiply in bfloat16.
        state_bytes: hidden states beyond this go to files in ``spill``.
        spill: a folder.
        progress: told after each layer.
    """
    some = weighing_part(windows)
    known, width = _kept(source, some, half).load(), source.model.dims.n_embd
    if known is not None and known.shape == (width, width):
        return known
    own = curvature_of(model, weights, some, half=half, state_bytes=state_bytes, spill=spill, progress=progress)
    keep_curvature(source, some, half, own)
    return own


def curvature_seconds(source: GgufFile, windows: Sequence[Window], *, half: bool) -> float:
    """How long ``kept_curvature`` will take, by formula; 0 where it is kept."""
    some = weighing_part(windows)
    if not some or _kept(source, some, half).is_there():
        return 0.0
    return walking_need(source, some, PASSES).seconds - WALK_START_S  # within a job that counts its start itself


def keep_curvature(source: GgufFile, windows: Sequence[Window], half: bool, curvature: F64) -> None:
    """Keep what gradients on these windows said; where that cannot be, it is found again."""
    with suppress(OutputError):
        _kept(source, windows, half).save(curvature)


def _kept(source: GgufFile, windows: Sequence[Window], half: bool) -> KeptArray:
    key = ("embedding curvature", __version__, source.sha256, tokens_hash(windows), str(half))
    return KeptArray(cache_folder("sensitivity"), *key)
