"""Claim: an embedding fitted to its errors where it is looked up loses less than one fitted to the head alone.

    .venv/bin/python benchmarks/embedding_feedback.py --model model-f16.gguf --calibrate wikitext2-valid.txt
        --text wikitext2-test.txt [--qtype Q3_K] [--fit-tokens 12288] [--documents 12] [--other texts.txt]

Only the embedding is quantized. Where it is the output matrix, too, codes are fitted to the source's own inputs of the
head, with and without the gradients at the embedding; where it is looked up only, they are rounded to nearest, and
fitted to the gradients. Prints mean KL on held-out text and shares with paired 95% intervals over documents.
"""

import sys
from collections.abc import Hashable
from pathlib import Path

import numpy as np
from level_texts import Side, compare, fitting_windows, measuring_texts, parsed, parser_of
from numpy.typing import NDArray

from bitladder.describe.windows import WINDOW, weighing_part
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile
from bitladder.files.texts import read_texts
from bitladder.formats.roles import EMBEDDING
from bitladder.kernels import dequantize, quantize
from bitladder.progress import silent
from bitladder.stages.fidelity import Candidate
from bitladder.units import GiB
from bitladder.walk.driver import Member, Stream, forward
from bitladder.walk.ends import head_inputs
from bitladder.walk.feedback import FeedbackSettings, factor_of, fit_matrix
from bitladder.walk.inputs import statistics_of
from bitladder.walk.layers import LayeredModel
from bitladder.walk.opened import layered
from bitladder.walk.products import wants_half_products
from bitladder.walk.sensitivity import curvatures_of
from bitladder.walk.states import Batch, batches_of
from bitladder.walk.weights import FileWeights, Rows

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


class OtherEmbedding(FileWeights):
    """The source with another embedding."""

    def __init__(self, source: GgufFile, values: F32) -> None:
        super().__init__(source)
        self._values = values

    def __call__(self, name: str, rows: Rows = None) -> F32:
        """As ``LevelWeights``."""
        if name != EMBEDDING:
            return super().__call__(name, rows)
        return self._values if rows is None else self._values[rows]

    def identity(self, name: str) -> Hashable:
        """As ``LevelWeights``."""
        return super().identity(name) if name != EMBEDDING else (name, id(self))


def at_the_head(model: LayeredModel, weights: FileWeights, batches: list[Batch], *, half: bool) -> F64:
    """The sum of ``x x^T`` at the source's head."""
    stream = Stream(model, [Member(weights)], batches, state_bytes=GiB, half=half)
    forward([stream], silent)
    return head_inputs(model, weights, stream.states_of(0), batches).gram.astype(np.float64)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--qtype", default="Q3_K")
    parser.add_argument("--fit-tokens", type=int, default=12288)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--keep", type=Path, default=Path("embedding-feedback"), help="a folder")
    options = parsed(parser)
    with GgufFile.open(options.model) as source:
        other = read_texts([options.other]) if options.other else ()
        with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=1)) as server:
            fitting = fitting_windows(server, source, options.calibrate, options.fit_tokens)
            texts = measuring_texts(server, source, options, other)
        weights, half = FileWeights(source, threads=options.threads), wants_half_products(None, "cpu")
        model, tokens = layered(source, weights), sum(len(window.tokens) for window in fitting)
        original, settings = weights(EMBEDDING), FeedbackSettings(threads=options.threads)
        cost = (
            tokens
            * curvatures_of(
                model, weights, weighing_part(fitting), state_bytes=GiB, spill=Path(), half=half, progress=silent
            ).embedding
        )

        def fitted(gram: F64) -> F32:
            seen = statistics_of(gram, tokens)
            factored = factor_of(EMBEDDING, seen, settings)
            return dequantize(fit_matrix(options.qtype, original, seen, factored, settings).data, options.qtype)

        if model.output == EMBEDDING:
            read = at_the_head(model, weights, batches_of(fitting), half=half)
            made = {"the head": fitted(read), "head and embedding": fitted(read + cost)}
        else:
            nearest = dequantize(quantize(original, options.qtype, threads=options.threads), options.qtype)
            made = {"nearest": nearest, "embedding": fitted(cost)}
        sides = [
            Side({"fitted to": name}, Candidate(name, OtherEmbedding(source, values)), 0)
            for name, values in made.items()
        ]
        for name, windows in texts.items():
            compare(
                source, sides, windows, name, (18,), of=next(iter(made)), threads=options.threads,
                keep=options.keep / "walks",
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
