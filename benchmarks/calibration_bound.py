"""Claim: a GPTQ layer is bound by matrix products, and bfloat16 takes a third off it or more.

    scripts/bench calibration_bound --model MODEL.gguf [--level GPTQ-4bit-g64] [--windows 64] [--threads 1]

Quantizes layer 1 twice in f32 and twice in bfloat16, in turns, over the same random tokens (cost does not depend on
them), layer 0 first so that kernels are compiled. Prints processor seconds of a layer, the share spent in products of
matrices (linear layers, Gram matrices, attention), their rate, and this machine's rate in one large product of each
type, measured between them. The level goes alone: the pass of the source that a walk has beside it is not counted. The
model is not shipped.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bitladder.describe.windows import WINDOW, Window
from bitladder.files.gguf import GgufFile
from bitladder.files.layer_store import LayerStore
from bitladder.formats.disk_names import quantized_parameters
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.walk.driver import Stream
from bitladder.walk.gptq import GptqLevel
from bitladder.walk.keep import Arrays
from bitladder.walk.layers import LayeredModel
from bitladder.walk.made import LayerOutput
from bitladder.walk.products import half_products_pay
from bitladder.walk.states import batches_of
from bitladder.walk.weights import FileWeights

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
BATCH_TOKENS = 1024


class Nowhere(LayerStore):
    """Nothing is ever written there."""

    def is_complete(self) -> bool:
        """As ``LayerStore``."""
        return False


class Dropped(GptqLevel):
    """Finished layers go nowhere."""

    def put(self, layer: int, output: LayerOutput, seconds: float) -> None:
        """Drop one."""

    def resume(self, layers: int, arrays: Arrays) -> None:
        """There is nothing to go on with."""


def product_rate(dtype: torch.dtype, n: int = 1024) -> float:
    """Operations per processor second of one large product."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    a @ b
    started, count = time.process_time(), 0
    while time.process_time() - started < 0.3:
        a @ b
        count += 1
    return count * 2 * n**3 / (time.process_time() - started)


def layer_flops(model: LayeredModel, block: torch.nn.Module, tokens: int) -> float:
    """Of linear layers and Gram matrices; attention's are not counted."""
    total = 0.0
    for shared in model.family.inputs:
        shapes = [block.get_parameter(p.path).shape for p in quantized_parameters(model.family, shared)]
        total += sum(2 * tokens * rows * columns for rows, columns in shapes)
        total += tokens * shapes[0][1] * (shapes[0][1] + 128) if shapes else 0
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--level", default="GPTQ-4bit-g64")
    for name, default in (("--windows", 64), ("--threads", 1)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    with GgufFile.open(options.model) as source:
        weights = FileWeights(source, threads=options.threads)
        model = LayeredModel(source.model, weights)
        n_vocab = source.model.dims.n_vocab
        windows = [Window(f"{at}", rng.integers(0, n_vocab, WINDOW)) for at in range(options.windows)]
        batches = batches_of(windows, batch_tokens=BATCH_TOKENS)
        flops = layer_flops(model, model.layer(1, weights), len(windows) * WINDOW)
        print(f"{flops / 1e9:.0f} GFLOP a layer; bfloat16 instructions: {half_products_pay()}")
        for half in (False, True, False, True):
            level = Dropped(
                model, weights, parse_checkpoint(options.level), Nowhere(Path("nowhere"), ""), torch.float16, batches,
                budget_bytes=0,
            )  # fmt: skip
            stream = Stream(model, [level], batches, state_bytes=1 << 40, half=half)
            stream.enter()
            stream.through(0)
            peak = product_rate(torch.bfloat16 if half else torch.float32)
            started = time.process_time()
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                stream.through(1)
            seconds = time.process_time() - started
            spent = {event.key: event.self_cpu_time_total / 1e6 for event in seen.key_averages()}
            products = sum(spent.get(name, 0.0) for name in PRODUCTS)
            attention = spent.get(ATTENTION, 0.0)
            kind, share = "bfloat16" if half else "float32", (products + attention) / seconds
            print(
                f"{kind:8}: {seconds:.2f} CPU s a layer, {share:.0%} products ({attention / seconds:.0%} attention), "
                f"{flops / products / 1e9:.0f} GFLOP/s of {peak / 1e9:.0f} in one large product",
                flush=True,
            )


if __name__ == "__main__":
    main()
