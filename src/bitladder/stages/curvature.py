"""What errors cost together, beyond a number for each row: of the embedding where it is looked up, and of the rows of
each head of queries and keys. Codes are fitted under it.

It takes gradients of a few thousand tokens. Weighing a model for recipes has them at hand and keeps what they say; who
fits a level without that finds it here, by the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from bitladder import __version__
from bitladder.describe.windows import Window, tokens_hash, weighing_part
from bitladder.errors import OutputError
from bitladder.files.atomic import write_whole
from bitladder.files.folders import cache_folder, cache_key
from bitladder.files.gguf import GgufFile
from bitladder.formats.roles import EMBEDDING
from bitladder.kernels.feedback import REVISION
from bitladder.plan.preflight import WALK_START_S
from bitladder.progress import Progress
from bitladder.stages.forecast import PASSES, walking_need
from bitladder.walk.layers import LayeredModel
from bitladder.walk.sensitivity import Curvatures, curvatures_of
from bitladder.walk.weights import FileWeights


def kept_curvatures(
    source: GgufFile,
    model: LayeredModel,
    weights: FileWeights,
    windows: Sequence[Window],
    *,
    half: bool,
    state_bytes: int,
    spill: Path,
    progress: Progress,
) -> Curvatures:
    """``walk.sensitivity.curvatures_of``, from a part of the windows; kept between runs.

    Args:
        source: the model.
        model: its layers.
        weights: its weights.
        windows: calibration text.
        half: multiply in bfloat16.
        state_bytes: hidden states beyond this go to files in ``spill``.
        spill: a folder.
        progress: told after each layer.

    Raises:
        BadFile, BadWeights, OutputError: as ``walk.sensitivity.SensitivityPass.run``.
    """
    some = weighing_part(windows)
    if (known := _read(_kept(source, some, half), source)) is not None:
        return known
    own = curvatures_of(model, weights, some, half=half, state_bytes=state_bytes, spill=spill, progress=progress)
    keep_curvatures(source, some, half, own)
    return own


def curvature_seconds(source: GgufFile, windows: Sequence[Window], *, half: bool) -> float:
    """How long ``kept_curvatures`` will take, by formula; 0 where they are kept."""
    some = weighing_part(windows)
    if not some or _kept(source, some, half).exists():
        return 0.0
    return walking_need(source, some, PASSES).seconds - WALK_START_S  # within a job that counts its start itself


def keep_curvatures(source: GgufFile, windows: Sequence[Window], half: bool, curvatures: Curvatures) -> None:
    """Keep what gradients on these windows said; where that cannot be, it is found again."""
    with suppress(OutputError):
        write_whole(_kept(source, windows, half), save({EMBEDDING: curvatures.embedding, **curvatures.heads}))


def _read(kept: Path, source: GgufFile) -> Curvatures | None:
    """What is kept there, where it is what belongs there."""
    try:
        arrays = load_file(kept)
    except (OSError, SafetensorError, ValueError, MemoryError):  # none, cut short, or not one of ours
        return None
    rows = {info.name: info.shape[-2] for info in source.model.tensors if len(info.shape) > 1}
    width = source.model.dims.n_embd
    embedding = arrays.pop(EMBEDDING, np.empty(0))
    whole = embedding.shape == (width, width) and embedding.dtype == np.float64
    for name, blocks in arrays.items():
        heads, size = blocks.shape[:2] if blocks.ndim == 3 else (0, 0)
        whole &= blocks.shape == (heads, size, size) and heads * size == rows.get(name) and blocks.dtype == np.float32
    whole &= all(np.isfinite(one).all() for one in (embedding, *arrays.values()))
    return Curvatures(embedding, arrays) if whole else None


def _kept(source: GgufFile, windows: Sequence[Window], half: bool) -> Path:
    key = cache_key("curvatures", __version__, REVISION, source.sha256, tokens_hash(windows), str(half))
    return cache_folder("sensitivity", f"{key[:32]}.safetensors")
