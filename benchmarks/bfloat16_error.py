"""Claim: GPTQ from passes in bfloat16 errs no more on other text than from passes in f32.

    scripts/bench bfloat16_error --model MODEL.gguf --calibrate wikitext2-valid.txt --text wikitext2-test.txt
        [--level GPTQ-4bit-g64] [--windows 8] [--documents 12] [--every 4] [--threads 1]

KL of a whole level cannot tell: two roundings that are equally good differ by some percent of it, by chance. So the
states of the source pass through all layers, once in f32 and once in bfloat16 (``engines/products.py``), and every
fourth layer's matrices are quantized from either's Gram matrices. Prints the error of their outputs on the first
windows of articles of another text, in f32, as a ratio: geometric mean over matrices with its standard error, and the
largest.
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
from bitladder.engines.calibration import LayerPass
from bitladder.engines.folding import matrix
from bitladder.engines.layers import LayeredModel
from bitladder.engines.llama import LlamaServer
from bitladder.engines.states import States, batches_of
from bitladder.engines.weights import FileWeights
from bitladder.files.gguf import GgufFile
from bitladder.formats.checkpoint import CheckpointLevel, parse_level
from bitladder.formats.disk_names import quantized_parameters
from bitladder.kernels import gptq
from bitladder.kernels.methods import feedback

F32 = NDArray[np.float32]


class Stream:
    """The source's states over some windows, in one arithmetic."""

    def __init__(self, model: LayeredModel, weights: FileWeights, windows: Sequence[Window], *, half: bool) -> None:
        self._model, self._half = model, half
        self._batches = batches_of(windows, batch_tokens=1024)
        self._states = States(self._batches, model.model.dims.n_embd, spill=None)
        for batch in self._batches:
            self._states.put(batch, model.embed(batch.tokens, weights))

    def grams(self, layer: int, block: nn.Module) -> list[F32]:
        """Gram matrices of the layer's inputs, in the order of the family's rows."""
        through = LayerPass(self._model, layer, block, self._states, self._batches, half=self._half)
        return [found[0].gram for found in through.gather_all(self._model.family.inputs)]


def output_error(level: CheckpointLevel, weights: F32, gram: F32, other: F32) -> float:
    difference = feedback(level, gptq.prepare(gram), weights).decoded - weights
    return float(np.einsum("rk,rk->", difference @ other, difference, dtype=np.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--calibrate", "--text"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--level", default="GPTQ-4bit-g64")
    for name, default in (("--windows", 8), ("--documents", 12), ("--every", 4), ("--threads", 1)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    level = parse_level(options.level)
    with GgufFile.open(options.model) as source:
        with LlamaServer(options.model, n_ctx=WINDOW, threads=1) as server:
            texts = Texts(source, server)
            fitting = texts.beginning(options.calibrate, options.windows)
            other = texts.articles(options.text, options.documents)
        weights = FileWeights(source, threads=options.threads)
        model = LayeredModel(source.model, weights)
        exact, half, judge = (
            Stream(model, weights, windows, half=rounded)
            for windows, rounded in ((fitting, False), (fitting, True), (other, False))
        )
        logs: list[float] = []
        for layer in range(model.n_layer):
            block = model.layer(layer, weights)
            found = zip(exact.grams(layer, block), half.grams(layer, block), judge.grams(layer, block), strict=True)
            for shared, grams in zip(model.family.inputs, found, strict=True):
                for parameter in quantized_parameters(model.family, shared) if layer % options.every == 0 else ():
                    own, rounded = (output_error(level, matrix(block, parameter), gram, grams[2]) for gram in grams[:2])
                    logs.append(float(np.log(rounded / own)))
            print(f"layer {layer + 1}: {np.exp(np.mean(logs)):.4f} so far", flush=True)
    ratio, error = np.exp(np.mean(logs)), np.std(logs, ddof=1) / np.sqrt(len(logs))
    print(f"{level.name}, {len(fitting)} windows, {len(logs)} matrices: in bfloat16 {ratio:.4f} +- {error:.4f} of f32 "
          f"(largest {np.exp(max(logs)):.3f}) on {len(other)} windows of other text")  # fmt: skip


if __name__ == "__main__":
    main()
