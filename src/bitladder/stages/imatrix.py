"""An importance matrix from one walk: the mean square of every linear layer's input channels over a
calibration text.

The numbers of llama.cpp's llama-imatrix on the same tokens, from the source's own hidden states: for each
tensor sum x^2 per column and how many tokens were summed, for stacked experts one row and one count each,
over the tokens that were routed to them. Only squares are needed, so no Gram matrices are formed and a pass
costs about the bare forward pass, in bfloat16 where the processor can (``walk/products.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitladder.describe.windows import Window
from bitladder.errors import BadInput, BadWeights
from bitladder.files.gguf import GgufFile
from bitladder.files.imatrix import ImportanceMatrix
from bitladder.formats.roles import SharedInput, layer_tensor
from bitladder.progress import Progress, silent
from bitladder.units import GiB
from bitladder.walk.calibration import vectors
from bitladder.walk.layers import LayeredModel, inference
from bitladder.walk.products import products, wants_half_products
from bitladder.walk.states import CALIBRATION_TOKENS, Batch, Shelf, batches_of
from bitladder.walk.weights import FileWeights

FEW_TOKENS = 1024
"""Below this many tokens an importance matrix is little better than none."""


class _Squares:
    """Sums of squares f64[matrices, columns] and token counts of one shared input."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []
        self.counts: list[int] = []

    def add(self, matrix: int, x: torch.Tensor) -> None:
        if matrix == len(self.sums):
            self.sums.append(torch.zeros(x.shape[1], dtype=torch.float64, device=x.device))
            self.counts.append(0)
        self.sums[matrix] += torch.linalg.vecdot(x, x, dim=0)
        self.counts[matrix] += len(x)


def importance_matrix(
    source: GgufFile,
    windows: Sequence[Window],
    *,
    dataset: str = "",
    progress: Progress = silent,
    device: str = "cpu",
    threads: int = 1,
    state_bytes: int = GiB,
    spill: Path | None = None,
    half: bool | None = None,
) -> ImportanceMatrix:
    """Gather an importance matrix.

    Args:
        source: the model.
        windows: token windows of the calibration text.
        dataset: what the file says it was made from.
        progress: told after each layer.
        device: where arithmetic happens, as torch names it.
        threads: for dequantizing.
        state_bytes: hidden states beyond this go to a file in ``spill``.
        spill: a folder; the system's for temporary files by default.
        half: whether to multiply in bfloat16; None: where the processor can.

    Raises:
        BadInput: no windows.
        BadFile, BadWeights, UnknownArchitecture: the model cannot be walked, or its activations are not
            finite.
        OutputError: no room for hidden states.
    """
    if not windows:
        raise BadInput(
            "There are no token windows to calibrate on.",
            means="The calibration text is empty or too short.",
            do=f"Give a text of several thousand tokens; under {FEW_TOKENS} an importance matrix says little.",
        )
    weights = FileWeights(source, threads=threads)
    model = LayeredModel(source.model, weights, device=device)
    batches = batches_of(windows, batch_tokens=CALIBRATION_TOKENS)
    states = Shelf(batches, source.model.dims.n_embd, budget_bytes=state_bytes, folder=spill).take()
    for batch in batches:
        states.put(batch, model.embed(batch.tokens, weights))
    found = ImportanceMatrix(
        {}, {}, len(windows), max(len(one.tokens) for one in windows), (dataset,) if dataset else ()
    )
    half = wants_half_products(half, device)
    for layer in range(model.n_layer):
        progress(f"importance: layer {layer + 1} of {model.n_layer}", layer, model.n_layer)
        block = model.layer(layer, weights)
        seen = {shared: _Squares() for shared in model.kind(layer).inputs if _has(block, shared.module)}
        for batch in batches:
            with inference(), products(half=half), ExitStack() as watching:
                for shared, squares in seen.items():
                    watching.callback(_watch(block, shared, batch, squares).remove)
                states.put(batch, model.run(block, layer, states.get(batch).to(model.device)))
        for shared, squares in seen.items():
            _keep(found, source, layer, shared, squares)
        for name in model.layer_names(layer):
            weights.forget(name)
    progress("importance", model.n_layer, model.n_layer)
    return found


def _has(block: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in block.named_modules())


def _watch(block: nn.Module, shared: SharedInput, batch: Batch, squares: _Squares) -> Any:
    """A hook that adds up what the input's module reads."""
    valid = torch.from_numpy(batch.valid.reshape(-1))

    def seen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        for matrix, x in enumerate(vectors(shared.kind, module, arguments, valid.to(arguments[0].device))):
            squares.add(matrix, x)

    return block.get_submodule(shared.module).register_forward_pre_hook(seen)


def _keep(found: ImportanceMatrix, source: GgufFile, layer: int, shared: SharedInput, squares: _Squares) -> None:
    """Means of squares under the names of the tensors that read this input; 1 for experts that no token
    reached."""
    sums, counts = torch.stack(squares.sums).cpu().numpy(), np.array(squares.counts, np.float32)
    if not np.isfinite(sums).all():
        raise BadWeights(
            f"The inputs of {shared.module} in layer {layer} are not finite.",
            means="Weights of this or an earlier layer overflow on the calibration text; the model is damaged.",
            do="Check the source's own answers first; a file in another precision may be sound.",
        )
    means = np.ones(sums.shape, np.float32)
    means[counts > 0] = sums[counts > 0] / counts[counts > 0, None]
    held = {tensor.name for tensor in source.model.tensors}
    for role in shared.roles:
        name = layer_tensor(layer, role)
        if name in held:
            found.mean_squares[name], found.counts[name] = means, counts
