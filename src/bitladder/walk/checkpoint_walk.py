"""All layers of all that is made from a calibration text: which streams there are, where each stands, what goes
to disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.describe.windows import Window
from bitladder.files.layer_store import LayerStore
from bitladder.files.safetensors_writer import PiecewiseTensor
from bitladder.formats import disk_names, roles
from bitladder.levels import CheckpointLevel, FoldedLevel
from bitladder.levels.methods import Statistics
from bitladder.levels.products import Product, statistics_of
from bitladder.progress import Progress
from bitladder.units import GiB
from bitladder.walk.allocator import keep_freed_memory
from bitladder.walk.layers import LayeredModel
from bitladder.walk.products import wants_half_products
from bitladder.walk.states import CALIBRATION_TOKENS, Batch, Shelf, States, batches_of
from bitladder.walk.streams import LayerOutput, ReferenceStream, SequentialStream
from bitladder.walk.weights import FileWeights

_ROWS_AT_ONCE = 4096
_TOLD = 8
"""Losses that fit a line of progress; experts of a mixture do not, and are in the log."""
FLOAT_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Float types of a checkpoint, by what safetensors calls them."""
_TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}
_SCALE_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}
_Stream = SequentialStream | ReferenceStream


@dataclass(frozen=True)
class Settings:
    """How to calibrate. ``state_bytes``: hidden states beyond this go to disk."""

    damp: float = 0.05
    act_order: bool = True
    reference_tokens: int = 16384
    """Tokens that AWQ, INT8 and importance matrices look at; their few parameters per layer hardly change with more."""
    state_bytes: int = GiB // 4
    device: str = "cpu"
    threads: int = 1
    half: bool | None = None
    """Whether passes multiply in bfloat16 (``walk/products.py``); None: where the processor can."""

    @property
    def half_products(self) -> bool:
        """``half``, decided."""
        return wants_half_products(self.half, self.device)


class CheckpointWalk:
    """One pass over the layers for all levels. A layer's weights are read from the source once per stream and
    dropped."""

    def __init__(
        self,
        model: LayeredModel,
        weights: FileWeights,
        stores: Mapping[Product, LayerStore],
        dtype: torch.dtype,
        settings: Settings,
    ) -> None:
        """``stores``: where each thing asked for is kept. ``dtype``: of everything that stays float."""
        self.model, self.weights, self.stores = model, weights, stores
        self.dtype, self.settings = dtype, settings

    def run(self, windows: Sequence[Window], progress: Progress) -> None:
        """Do the layers that are not done yet.

        Raises:
            BadWeights: weights or activations are not finite.
            OutputError: no room for states or finished layers.
        """
        keep_freed_memory()
        streams = self._streams(windows)
        total = float(self.model.n_layer)
        losses: dict[str, str] = {}
        for layer in range(min((done for _, done in streams), default=0), self.model.n_layer):
            for stream, done in streams:
                names = ", ".join(level.name + losses.get(level.name, "") for level in stream.levels)
                progress(f"layer {layer + 1} of {self.model.n_layer}: {names}", layer, total)
                if done <= layer:
                    losses |= self._one(stream, layer)
            for tensor in self.model.layer_names(layer):
                self.weights.forget(tensor)
        progress("all layers quantized", total, total)

    def top(self) -> list[PiecewiseTensor]:
        """What lies outside the layers, to be written: embedding, last norm, head where it has weights of its own."""
        tensors = [self._rows_of(disk_names.EMBEDDING, roles.EMBEDDING)]
        norm = dict(self.model.norm(self.weights).named_parameters())
        if "weight" in norm:
            held = norm["weight"].detach().cpu().to(self.dtype)
            tensors.append(
                PiecewiseTensor(disk_names.NORM, _TYPE_NAMES[self.dtype], tuple(held.shape), lambda: [_bytes(held)])
            )
        if self.model.output != self.model.embedding:
            tensors.append(self._rows_of(disk_names.HEAD, roles.OUTPUT))
        return tensors

    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(outputs, inputs)`` of every matrix of the first layer that will be quantized, by its place in
        the layer."""
        found = {}
        for shared in self.model.family.inputs:
            for parameter in disk_names.quantized_parameters(self.model.family, shared):
                rows, columns = self.model.shape(parameter.path)[-2:]
                found[parameter.path.removesuffix(".weight")] = (int(rows), int(columns))
        return found

    def _rows_of(self, name: str, source: str) -> PiecewiseTensor:
        """A large matrix in the float type of the checkpoint, some rows at a time."""
        shape = self.weights.file.info(source).shape

        def pieces() -> Iterator[memoryview]:
            for start in range(0, shape[0], _ROWS_AT_ONCE):
                rows = slice(start, min(start + _ROWS_AT_ONCE, shape[0]))
                yield _bytes(cast(self.weights(source, rows), self.dtype))
                self.weights.forget(source)

        return PiecewiseTensor(name, _TYPE_NAMES[self.dtype], shape, pieces)

    def _one(self, stream: _Stream, layer: int) -> dict[str, str]:
        """Do one layer of a stream; returns each level's losses in words."""
        started = monotonic()
        outputs = stream.layer(layer)
        seconds = monotonic() - started
        states = None if stream.states is None else stream.states.everything.numpy()
        # The first level keeps the states, and is written last: it never is ahead of the others.
        for number, level in reversed(list(enumerate(stream.levels))):
            output = outputs[level.name]
            kept = states if number == 0 else None
            notes = _notes(layer, output)
            self.stores[level].put_layer(layer, self._tensors(layer, output), notes, kept, seconds=seconds)
        return {name: said(output) for name, output in outputs.items()}

    def _tensors(self, layer: int, output: LayerOutput) -> dict[str, torch.Tensor]:
        prefix = f"{disk_names.LAYERS}{layer}."
        tensors = {f"{prefix}{name}": cast(value, self.dtype) for name, value in output.floats.items()}
        for linear, arrays in output.linears.items():
            for suffix, array in arrays.items():
                value = torch.from_numpy(np.ascontiguousarray(array))
                own = value.to(self.dtype) if suffix in output.model_dtype else value
                tensors[f"{prefix}{linear}.{suffix}"] = own
        return tensors | {name: torch.from_numpy(vector.copy()) for name, vector in output.vectors.items()}

    def _streams(self, windows: Sequence[Window]) -> list[tuple[_Stream, int]]:
        """Each stream with the number of layers that it has behind it."""
        made: list[tuple[_Stream, int]] = []
        scale_dtype = _SCALE_DTYPES[self.dtype]
        sequential = [level for level in self.stores if statistics_of(level) is Statistics.FEEDBACK]
        plain = [level for level in self.stores if level not in sequential]
        if plain:
            needs_text = any(statistics_of(level).needs_text for level in plain)
            read = _share(windows, self.settings.reference_tokens) if needs_text else []
            batches = batches_of(read, batch_tokens=CALIBRATION_TOKENS)
            states, done = self._resumed(plain, batches)
            reference = ReferenceStream(
                self.model, self.weights, plain, states, batches,
                scale_dtype=scale_dtype, threads=self.settings.threads,
                held_out=held_out(read) if any(isinstance(level, FoldedLevel) for level in plain) else frozenset(),
                half=self.settings.half_products,
            )  # fmt: skip
            made.append((reference, done))
        for level in (level for level in sequential if isinstance(level, CheckpointLevel)):
            batches = batches_of(windows, batch_tokens=CALIBRATION_TOKENS)
            states, done = self._resumed([level], batches)
            if states is None:
                raise ValueError(f"{level} needs calibration windows")
            own = SequentialStream(
                self.model, self.weights, level, states, batches,
                damp=self.settings.damp, act_order=self.settings.act_order, scale_dtype=scale_dtype,
                spill=self._spill(batches), half=self.settings.half_products,
            )  # fmt: skip
            made.append((own, done))
        return made

    def _resumed(self, levels: Sequence[Product], batches: Sequence[Batch]) -> tuple[States | None, int]:
        """States to start from (an earlier run's, or the embeddings) and how many layers are behind them."""
        done = min(len(self.stores[level].finished()) for level in levels)
        kept = self.stores[levels[0]].states_file(done - 1)
        rows = sum(batch.tokens.size for batch in batches)
        if batches and not (kept.is_file() and np.load(kept, mmap_mode="r").shape[0] == rows):
            done = 0
        for level in levels:
            self.stores[level].truncate(done)
        if not batches:
            return None, done
        states = Shelf(
            batches,
            self.model.model.dims.n_embd,
            budget_bytes=self.settings.state_bytes,
            folder=self.stores[levels[0]].partial,
        ).take()
        if done:
            states.everything.copy_(torch.from_numpy(np.load(kept, mmap_mode="c")))
            return states, done
        for batch in batches:
            states.put(batch, self.model.embed(batch.tokens, self.weights))
        return states, 0

    def _spill(self, batches: Sequence[Batch]) -> Path | None:
        """Where a layer keeps the inputs of its output and down projections: on disk when they outgrow the
        budget."""
        dims = self.model.model.dims
        tokens = sum(batch.tokens.size for batch in batches)
        widths = dims.n_head * dims.head_dim_v + dims.n_ff
        large = tokens * widths * 4 > self.settings.state_bytes
        return next(iter(self.stores.values())).partial if large else None


def cast(value: NDArray[np.float32], dtype: torch.dtype) -> torch.Tensor:
    """f32 weights in a checkpoint's float type."""
    return torch.from_numpy(np.ascontiguousarray(value)).to(dtype)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data


def _notes(layer: int, output: LayerOutput) -> list[dict[str, Any]]:
    """The log's lines of a layer's tensors."""
    return [
        {
            "tensor": loss.name if loss.name.startswith("blk.") else f"{disk_names.LAYERS}{layer}.{loss.name}",
            "loss": None if loss.loss != loss.loss else loss.loss,  # JSON has no NaN
            "tokens": loss.tokens,
            "damp": loss.damp,
            "note": loss.note,
            "digest": output.digests.get(loss.name, ""),
        }
        for loss in output.losses
    ]


def said(output: LayerOutput) -> str:
    """The losses of a layer's tensors in a few words: each where there are few, else the largest."""
    known = [(loss.loss, _short(loss.name)) for loss in output.losses if loss.loss == loss.loss]
    if not known:
        return ""
    if len(output.losses) > _TOLD:
        worst, name = max(known)
        return f" (error up to {worst:.2%}, {name})"
    told = ", ".join(f"{name} {loss:.2%}" for loss, name in known)
    return f" (error: {told})"


def _short(name: str) -> str:
    """``self_attn.q_proj`` as ``q``, ``blk.0.attn_q.weight`` as ``attn_q``."""
    return name.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj")


def held_out(windows: Sequence[Window]) -> frozenset[int]:
    """About half of the windows, by their places: whole documents, or every other window of a single one."""
    documents = [window.document for window in windows]
    if len(set(documents)) == 1:
        return frozenset(range(1, len(windows), 2))
    halves: tuple[set[int], set[int]] = set(), set()
    for name in dict.fromkeys(documents):
        smaller = min(halves, key=len)
        smaller |= {at for at, document in enumerate(documents) if document == name}
    return frozenset(halves[1])


def _share(windows: Sequence[Window], tokens: int) -> list[Window]:
    """Windows evenly spread over the text that hold about ``tokens`` tokens."""
    total = sum(len(window.tokens) for window in windows)
    stride = max(1, round(total / tokens))
    return list(windows[::stride])
