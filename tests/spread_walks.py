"""Walks of tiny models in many shards, on an executor or here, and what they write."""

import math
from pathlib import Path

import numpy as np
import pytest

import tiny_checkpoints
from bitladder.files.gguf import GgufFile
from bitladder.formats.recipes import is_quantizable
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.records.recipe import Recipe
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.stages.feedback import write_with_feedback
from bitladder.stages.imatrix import importance_matrix
from bitladder.walk import states
from bitladder.walk.feedback import FeedbackSettings

LEVELS = ["GPTQ-4bit-g32", "GPTQ-3bit-g32-asym", "AWQ-4bit-g32", "INT8-W8A8-smooth"]


def short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,560 tokens in five shards of four batches."""
    monkeypatch.setattr(states, "SHARD_TOKENS", 512)
    monkeypatch.setattr("bitladder.walk.checkpoint_walk.CALIBRATION_TOKENS", 128)
    monkeypatch.setattr("bitladder.stages.imatrix.CALIBRATION_TOKENS", 128)
    batches = states.batches_of
    monkeypatch.setattr("bitladder.stages.feedback.batches_of", lambda windows: batches(windows, batch_tokens=128))


def files_of(folder: Path) -> dict[str, bytes]:
    """Weights that were written."""
    kinds = (".safetensors", ".gguf")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.suffix in kinds}


def checkpoints(source: Path, folder: Path, out: Path, executor=None, levels=LEVELS, **options) -> dict[str, bytes]:
    with GgufFile.open(source) as file:
        wanted = [parse_checkpoint(level) for level in levels]
        text = Reading(tiny_checkpoints.windows_of(1))
        Calibration(file, wanted, text, out_dir=out, name="tiny", checkpoint=folder, executor=executor, **options).run()
    return files_of(out)


def fitted(source: Path, out: Path, executor=None, **options) -> dict[str, bytes]:
    with GgufFile.open(source) as file:
        whole = {one.name for one in file.model.tensors if is_quantizable(one) and one.shape[-1] % 32 == 0}
        qtypes = {one.name: "Q4_0" if one.name in whole else one.qtype for one in file.model.tensors}
        recipe = Recipe("test", "llama", qtypes, 0, math.nan, 0.25)
        settings = FeedbackSettings(effort="fast")
        windows = tiny_checkpoints.windows_of(2)
        write_with_feedback(file, recipe, out, windows, settings=settings, executor=executor, **options)
    return files_of(out)


def squares(source: Path, executor=None, **options) -> dict[str, np.ndarray]:
    with GgufFile.open(source) as file:
        return importance_matrix(file, tiny_checkpoints.windows_of(3), executor=executor, **options).vectors()
