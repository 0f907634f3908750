"""All that is made from a calibration text, as streams of one walk: which there are, and where each is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.describe.windows import Window
from bitladder.files.layer_store import LayerStore
from bitladder.files.safetensors_writer import PiecewiseTensor
from bitladder.formats import disk_names
from bitladder.levels import CheckpointLevel, FoldedLevel
from bitladder.levels.methods import Statistics
from bitladder.levels.products import ImportanceVectors, Product, statistics_of
from bitladder.progress import Part, Progress
from bitladder.units import GiB
from bitladder.walk.driver import Member, Spread, Stream, forward
from bitladder.walk.ends import ends_of, quantize_ends
from bitladder.walk.folding import FoldingScales
from bitladder.walk.gptq import GptqLevel
from bitladder.walk.keep import Keep
from bitladder.walk.layers import LayeredModel
from bitladder.walk.made import Made, MadeImportance, cast
from bitladder.walk.products import wants_half_products
from bitladder.walk.rounded import RoundedLevel
from bitladder.walk.states import CALIBRATION_TOKENS, Batch, batches_of, shard_count
from bitladder.walk.weights import FileWeights

F64 = NDArray[np.float64]

_ROWS_AT_ONCE = 4096
FLOAT_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Float types of a checkpoint, by what safetensors calls them."""
_TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}


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


class CalibrationWalk:
    """One walk over the layers for all levels: a stream for each GPTQ level, whose errors are its own, with the source
    before it, and one of the source for everything else."""

    def __init__(
        self,
        model: LayeredModel,
        weights: FileWeights,
        stores: Mapping[Product, LayerStore],
        dtype: torch.dtype,
        settings: Settings,
        *,
        curvature: Callable[[Progress], F64],
    ) -> None:
        """
        Args:
            model: its layers.
            weights: its weights.
            stores: where each thing asked for is kept.
            dtype: of everything that stays float.
            settings: how to calibrate.
            curvature: finds what codes of the embedding are fitted under (``walk.sensitivity.embedding_curvature``);
                asked once, where a level quantizes that.
        """
        self._curvature = curvature
        self._spread: Spread | None = None
        self.model, self.weights, self.stores = model, weights, stores
        self.dtype, self.settings = dtype, settings

    def run(self, windows: Sequence[Window], progress: Progress, spread: Spread | None = None) -> None:
        """Do the layers that are not done yet; ``spread`` computes units elsewhere.

        Raises:
            BadWeights: weights or activations are not finite.
            OutputError: no room for states or finished layers.
        """
        self._spread = spread
        for store in self.stores.values():
            store.begin()
        sequential = [level for level in self.stores if statistics_of(level) is Statistics.FEEDBACK]
        plain = [level for level in self.stores if level not in sequential]
        streams = [self._of_the_source(plain, windows)] if plain else []
        streams += [self._of_a_level(level, windows) for level in sequential if isinstance(level, CheckpointLevel)]
        forward(streams, progress)
        both = zip(self._everywhere(sequential), streams[bool(plain) :], strict=True)
        whole = [(level, stream) for level, stream in both if level is not None]
        n_layer = self.model.n_layer
        if whole:
            curvature = self._curvature(Part(progress, n_layer, n_layer, n_layer))
        for level, stream in whole:
            progress(f"{level.name}: embedding and head", n_layer, n_layer)
            quantize_ends(
                stream, self.model, level, self.stores[level], self.dtype, damp=self.settings.damp,
                act_order=self.settings.act_order, curvature=curvature,
            )  # fmt: skip
        progress("all layers quantized", 1, 1)

    def _everywhere(self, levels: Sequence[Product]) -> list[CheckpointLevel | None]:
        """Levels whose embedding and head are quantized; None in the place of others."""
        return [level if isinstance(level, CheckpointLevel) and level.format.everywhere else None for level in levels]

    def _of_the_source(self, levels: Sequence[Product], windows: Sequence[Window]) -> Stream:
        needs_text = any(statistics_of(level).needs_text for level in levels)
        read = _share(windows, self.settings.reference_tokens) if needs_text else []
        observers = [self._observer(level, read) for level in levels]
        return self._stream([Member(self.weights, observers)], levels[0], self._batches(read))

    def _observer(self, level: Product, read: Sequence[Window]) -> Made:
        store = self.stores[level]
        if isinstance(level, ImportanceVectors):
            return MadeImportance(self.model, level.name, store, self.dtype)
        if isinstance(level, FoldedLevel):
            apart, threads = held_out(read), self.settings.threads
            return FoldingScales(self.model, level, store, self.dtype, held_out=apart, threads=threads)
        return RoundedLevel(self.model, level, store, self.dtype)

    def _of_a_level(self, level: CheckpointLevel, windows: Sequence[Window]) -> Stream:
        batches = self._batches(windows)
        made = GptqLevel(
            self.model, self.weights, level, self.stores[level], self.dtype, batches, damp=self.settings.damp,
            act_order=self.settings.act_order, budget_bytes=self.settings.state_bytes // 2,
        )  # fmt: skip
        return self._stream([Member(self.weights, [made.source_inputs]), made], level, batches)

    def _batches(self, windows: Sequence[Window]) -> list[Batch]:
        return batches_of(windows, batch_tokens=CALIBRATION_TOKENS)

    def _stream(self, members: Sequence[Member], level: Product, batches: Sequence[Batch]) -> Stream:
        """A stream of its own, kept where its (first) level is."""
        store, half = self.stores[level], self.settings.half_products
        return Stream(
            self.model,
            members,
            batches,
            state_bytes=self.settings.state_bytes,
            spill=store.partial,
            keep=Keep(store.partial / "states", f"{store.fingerprint} {half}"),
            half=half,
            shards=shard_count(batches),
            spread=self._spread if batches else None,
        )

    def top(self, *, quantized: bool = False) -> list[PiecewiseTensor]:
        """What lies outside the layers, to be written: embedding, last norm, head where it has weights of its own.
        ``quantized``: embedding and head were stored already (``walk/ends.py``)."""
        names = self.model.family.disk
        tensors = [] if quantized else [self._rows_of(disk, own) for own, disk in ends_of(self.model).items()]
        norm = self.model.norm(self.weights).named_parameters()
        small = {f"{names.norm.removesuffix('weight')}{leaf}": value for leaf, value in norm}
        for name, value in (small | self.model.beside).items():
            held = value.detach().cpu().to(self.dtype)
            tensors.append(_small(name, held, _TYPE_NAMES[self.dtype]))
        return tensors + self.model.copied()

    def counts(self) -> dict[str, int]:
        """How many matrices of each of ``shapes`` a layer has, where there are several: experts, or gate and up of
        each."""
        experts = self.model.model.dims.n_expert
        stacks = self.model.family.experts.items()
        return {path.removesuffix(".weight"): experts * len(names) for path, names in stacks}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(outputs, inputs)`` of every matrix that will be quantized, by its place in the layer: of the first
        layer of each kind."""
        found: dict[str, tuple[int, int]] = {}
        for layer, kind in self.model.first_of_each_kind():
            for shared in kind.inputs:
                for parameter in disk_names.quantized_parameters(self.model.family, shared):
                    *_, rows, columns = (int(size) for size in self.model.shape(parameter.path, layer))
                    outputs, inputs = (columns, rows) if parameter.turned else (rows, columns)
                    sizes = outputs // len(self.model.family.experts.get(parameter.path, (1,))), inputs
                    found.setdefault(parameter.path.removesuffix(".weight"), sizes)
        return found

    def ends(self) -> dict[str, tuple[int, int]]:
        """``(outputs, inputs)`` of embedding and head, by name on disk."""
        shapes = {disk: self.weights.file.info(own).shape for own, disk in ends_of(self.model).items()}
        return {disk.removesuffix(".weight"): (int(rows), int(columns)) for disk, (rows, columns) in shapes.items()}

    def _rows_of(self, name: str, source: str) -> PiecewiseTensor:
        """A large matrix in the float type of the checkpoint, some rows at a time."""
        shape = self.weights.file.info(source).shape

        def pieces() -> Iterator[memoryview]:
            for start in range(0, shape[0], _ROWS_AT_ONCE):
                rows = slice(start, min(start + _ROWS_AT_ONCE, shape[0]))
                yield _bytes(cast(self.weights(source, rows), self.dtype))
                self.weights.forget(source)

        return PiecewiseTensor(name, _TYPE_NAMES[self.dtype], shape, pieces)


def _small(name: str, held: torch.Tensor, dtype: str) -> PiecewiseTensor:
    return PiecewiseTensor(name, dtype, tuple(held.shape), lambda: [_bytes(held)])


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data


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
