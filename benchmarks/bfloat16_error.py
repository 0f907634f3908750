"""Claim: what is calibrated by passes in bfloat16 errs no more on other text than by passes in f32.

    scripts/bench bfloat16_error --model MODEL.gguf --calibrate wikitext2-valid.txt --text wikitext2-test.txt
        [--levels GPTQ-4bit-g64,AWQ-4bit-g64,Q4_0] [--windows 8] [--documents 12] [--every 4] [--threads 1]

KL of a whole level cannot tell: two roundings that are equally good differ by some percent of it, by chance. So the
states of the source pass through all layers, once in f32 and once in bfloat16 (``walk/products.py``), and every
fourth layer's matrices are quantized from either's Gram matrices, or, block types, under either's importances. Prints
the error of their outputs on the first windows of articles of another text, in f32, as a ratio: geometric mean over
matrices with its standard error, and the largest; and how far the importances themselves are apart.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from checkpoint_levels import Texts
from numpy.typing import NDArray
from torch import nn

from bitladder.describe.windows import WINDOW, Window
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile
from bitladder.formats.blocks import QTYPES
from bitladder.formats.disk_names import quantized_parameters
from bitladder.formats.roles import SharedInput
from bitladder.kernels import dequantize, quantize
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.levels.methods import Statistics
from bitladder.walk.driver import Member, Observer, Seen, Stream
from bitladder.walk.inputs import InputStatistics, Wants
from bitladder.walk.layers import LayeredModel
from bitladder.walk.matrices import matrix
from bitladder.walk.states import batches_of
from bitladder.walk.weights import FileWeights

F32 = NDArray[np.float32]


class Everything(Observer):
    """Statistics of all inputs of the layer that went by last."""

    wants = Wants(gram=True, largest=True)

    def __init__(self) -> None:
        self.seen: Seen = {}

    def reads(self, shared: SharedInput) -> bool:  # noqa: ARG002
        """All."""
        return True

    def take(self, layer: int, block: nn.Module, seen: Seen) -> None:  # noqa: ARG002
        """Keep them."""
        self.seen = seen


class Source:
    """The source over some windows, in one arithmetic."""

    def __init__(self, model: LayeredModel, weights: FileWeights, windows: Sequence[Window], *, half: bool) -> None:
        self._everything = Everything()
        batches = batches_of(windows, batch_tokens=1024)
        self._stream = Stream(model, [Member(weights, [self._everything])], batches, state_bytes=1 << 40, half=half)
        self._stream.enter()

    def inputs(self, layer: int) -> list[InputStatistics]:
        """Statistics of the layer's inputs, in the order of the family's rows."""
        self._stream.through(layer)
        return [found[0] for found in self._everything.seen.values()]


def decoded(level: str, weights: F32, seen: InputStatistics) -> F32:
    """The matrix as a level of that name would hold it."""
    if level in QTYPES:
        data = quantize(weights, level, importance=seen.squares.astype(np.float32), threads=1)
        return np.asarray(dequantize(data, level, threads=1), np.float32)
    named = parse_checkpoint(level)
    (form,), method = named.format.forms, named.method
    if method.statistics is Statistics.FEEDBACK:
        return method.apply(form, method.prepare(seen.gram), weights).decoded
    scales = method.factors(form, seen.gram, seen.largest, [weights])
    return method.apply(form, method.prepare(seen.gram / np.outer(scales, scales)), weights * scales).decoded / scales


def output_error(level: str, weights: F32, seen: InputStatistics, other: InputStatistics) -> float:
    difference = decoded(level, weights, seen) - weights
    return float(np.einsum("rk,rk->", difference @ other.gram, difference, dtype=np.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--calibrate", "--text"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--levels", default="GPTQ-4bit-g64,AWQ-4bit-g64,Q4_0")
    for name, default in (("--windows", 8), ("--documents", 12), ("--every", 4), ("--threads", 1)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with GgufFile.open(options.model) as source:
        with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=1)) as server:
            texts = Texts(source, server)
            fitting = texts.beginning(options.calibrate, options.windows)
            other_windows = texts.articles(options.text, options.documents)
        weights = FileWeights(source, threads=options.threads)
        model = LayeredModel(source.model, weights)
        exact, half, judge = (
            Source(model, weights, windows, half=bfloat16)
            for windows, bfloat16 in ((fitting, False), (fitting, True), (other_windows, False))
        )
        logs: dict[str, list[float]] = {level: [] for level in options.levels.split(",")}
        apart: list[float] = []
        for layer in range(model.n_layer):
            block = model.layer(layer, weights)
            found = zip(exact.inputs(layer), half.inputs(layer), judge.inputs(layer), strict=True)
            for shared, (own, moved, other) in zip(model.family.inputs, found, strict=True):
                live = own.squares > 0
                apart += list(np.abs(moved.squares[live] / own.squares[live] - 1))
                for parameter in quantized_parameters(model.family, shared) if layer % options.every == 0 else ():
                    matrix_of = matrix(model.family, block, parameter)
                    for level, ratios in logs.items():
                        if level in QTYPES and matrix_of.shape[1] % QTYPES[level].block_size:
                            continue
                        pair = [output_error(level, matrix_of, seen, other) for seen in (moved, own)]
                        ratios.append(float(np.log(pair[0] / pair[1])))
            print(f"layer {layer + 1} of {model.n_layer}", flush=True)
    print(f"{len(fitting)} windows; in bfloat16, of f32, on {len(other_windows)} windows of other text:")
    for level, ratios in logs.items():
        ratio, error = np.exp(np.mean(ratios)), np.std(ratios, ddof=1) / np.sqrt(len(ratios))
        print(f"{level}: {ratio:.4f} +- {error:.4f}, largest {np.exp(max(ratios)):.3f}, {len(ratios)} matrices")
    print(f"importances: median {np.median(apart):.4f} apart, 99 of 100 at most {np.quantile(apart, 0.99):.4f}")


if __name__ == "__main__":
    main()
