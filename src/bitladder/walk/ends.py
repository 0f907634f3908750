"""Embedding and head of a level that quantizes them, too: after its layers, from the states that leave them.

A head reads what the last norm gives, so its codes are chosen with error feedback like any matrix's; the level's own
states show what that is. An embedding reads nothing; its codes are chosen with feedback under what gradients say of its
errors (``walk.sensitivity.embedding_curvature``), the matrix of a model whose head is its embedding under both. Rows
are taken some at a time: a vocabulary is large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.files.layer_store import LayerStore
from bitladder.levels import CheckpointLevel
from bitladder.levels.checkpoints import Arrays, CheckpointFormat, digest_of_rows
from bitladder.levels.methods import Prepared
from bitladder.walk.driver import Stream
from bitladder.walk.inputs import InputStatistics, Sums
from bitladder.walk.layers import LayeredModel, inference
from bitladder.walk.made import SCALE_DTYPES, naming, stored_array
from bitladder.walk.states import Batch, States
from bitladder.walk.weights import LevelWeights

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

REVISION = "2"
"""Raised whenever the bytes of embeddings and heads change for another reason than the method's own revision."""
_ROWS_AT_ONCE = 8192


def ends_of(model: LayeredModel) -> dict[str, str]:
    """Embedding, and head where it has weights of its own: the name on disk of each GGUF tensor."""
    names = model.family.disk
    ends = {model.embedding: names.embedding}
    return ends if model.output == model.embedding else ends | {model.output: names.head}


def quantize_ends(
    stream: Stream,
    model: LayeredModel,
    level: CheckpointLevel,
    store: LayerStore,
    dtype: torch.dtype,
    *,
    damp: float,
    act_order: bool,
    curvature: F64,
) -> None:
    """Make embedding and head of a level whose layers are made, and keep them as one layer more.

    Args:
        stream: The level's, which is its last member, after the last layer.
        model: Its layers.
        level: What it is.
        store: Where its layers are.
        dtype: Of what stays float.
        damp: As ``levels.methods.Method.prepare``.
        act_order: The same.
        curvature: Of the embedding, f64[n_embd, n_embd]; zeros where nothing is known of it.

    Raises:
        BadWeights: a weight is too large for the format, or states are not finite.
        OutputError: no room.
    """
    started = monotonic()
    weights = stream.members[0].weights
    at_the_head = head_inputs(model, weights, stream.states_of(len(stream.members) - 1), stream.batches)
    tokens = at_the_head.tokens
    tensors: dict[str, torch.Tensor] = {}
    notes = []
    for own, disk in ends_of(model).items():
        is_head, linear = own == model.output, disk.removesuffix(".weight")
        with naming(None, linear):
            read = np.asarray(
                (at_the_head.gram if is_head else 0) + (tokens * curvature if own == model.embedding else 0), np.float32
            )
            seen = level.method.prepare(read if read.any() else None, tokens=tokens, damp=damp, act_order=act_order)
            form = level.format.of(linear)
            assert form is not None
            made = _Made(level, form, SCALE_DTYPES[dtype], str(model.device))
            shape = next(one.shape for one in model.model.tensors if one.name == own)
            hashed = digest_of_rows(shape, made.parts(weights, own, shape[0], seen))
        for suffix, array in made.arrays().items():
            tensors[f"{linear}.{suffix}"] = stored_array(form, suffix, array, dtype)
        note = {"loss": made.loss, "tokens": tokens, "damp": seen.damp, "note": seen.note}
        notes.append({"tensor": linear, **note, "digest": hashed})
    store.put_layer(model.n_layer, tensors, notes, seconds=monotonic() - started)


def head_inputs(
    model: LayeredModel, weights: LevelWeights, states: States, batches: Sequence[Batch]
) -> InputStatistics:
    """What the head reads where these states leave the last layer, with ``X^T X`` f32[n_embd, n_embd]; ``weights`` have
    the last norm."""
    norm, sums = model.norm(weights), Sums(model.model.dims.n_embd, model.device, gram=True, largest=False)
    with inference():
        for batch in batches:
            valid = torch.from_numpy(batch.valid).to(model.device)
            sums.add(norm(states.get(batch).to(model.device))[valid])
    return sums.result()


@dataclass
class _Made:
    """A matrix that is quantized some rows at a time."""

    level: CheckpointLevel
    form: CheckpointFormat
    scale_dtype: str
    device: str
    _arrays: list[Arrays] = field(default_factory=list)
    _losses: list[tuple[float, int]] = field(default_factory=list)

    def parts(self, weights: LevelWeights, name: str, count: int, seen: Prepared) -> Iterator[F32]:
        """Quantize all rows of a tensor; gives what they decode to, run by run."""
        for start in range(0, count, _ROWS_AT_ONCE):
            own = weights(name, slice(start, min(start + _ROWS_AT_ONCE, count)))
            weights.forget(name)
            found = self.level.method.apply(self.form, seen, own, scale_dtype=self.scale_dtype, device=self.device)
            self._arrays.append(self.form.encode(found.codes, found.parameters))
            self._losses.append((found.loss, len(own)))
            yield found.decoded

    def arrays(self) -> Arrays:
        """Those of the whole matrix."""
        return {suffix: np.concatenate([one[suffix] for one in self._arrays]) for suffix in self._arrays[0]}

    @property
    def loss(self) -> float | None:
        """Mean over the rows; None where it is not known."""
        rows = sum(count for _, count in self._losses)
        mean = sum(loss * count for loss, count in self._losses) / max(1, rows)
        return None if math.isnan(mean) else mean
