"""Claim: predicted losses rank recipes as measurement does (above 0.95), and a recipe is solved in seconds.

    scripts/bench recipe_prediction --model reference-f16.gguf --calibrate wikitext2-valid.txt --text wikitext2-test.txt
        [--recipes 30] [--windows 3] [--threads 2] [--json FILE]

Random recipes: every tensor a type drawn with a random leaning to small or large ones, so that whole recipes lie
between 2.7 and 8 bits. Each is made on the fly (importance-weighted search, no feedback) and its mean KL measured on
windows of the test text; printed is Spearman's rank correlation with the predicted sums, with a bootstrap interval over
recipes. Then the time to solve for a budget with 1,000 tensors of 12 types each.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
from level_texts import fitting_windows, parsed, parser_of
from scipy.stats import spearmanr

from bitladder.describe.windows import WINDOW
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile
from bitladder.plan.allocate import TensorGroup, TypeChoice, least_loss
from bitladder.plan.recipe import predicted, recipe_bytes
from bitladder.records.recipe import TensorLoss
from bitladder.stages.fidelity import Candidate, walk
from bitladder.stages.imatrix import importance_matrix
from bitladder.stages.sensitivity import sensitivity_table
from bitladder.walk.weights import FileWeights, MadeWeights, Quantizer


def random_recipe(
    source: GgufFile, losses: Mapping[str, Sequence[TensorLoss]], rng: np.random.Generator
) -> dict[str, str]:
    """Types drawn around a leaning of the recipe's own."""
    leaning = rng.uniform(-1, 1)
    qtypes = {tensor.name: tensor.qtype for tensor in source.model.tensors}
    for name, offered in losses.items():
        order = sorted(offered, key=lambda one: one.bytes)
        weights = np.exp(2.5 * leaning * np.linspace(-1, 1, len(order)))
        qtypes[name] = order[rng.choice(len(order), p=weights / weights.sum())].qtype
    return qtypes


def correlation(predictions: np.ndarray, measured: np.ndarray) -> tuple[float, float, float]:
    rng = np.random.default_rng(0)
    draws = [
        spearmanr(predictions[at], measured[at])[0] for at in rng.integers(0, len(measured), (1000, len(measured)))
    ]
    return float(spearmanr(predictions, measured)[0]), *np.nanquantile(draws, [0.025, 0.975])


def solving_seconds(tensors: int = 1000, types: int = 12) -> float:
    rng = np.random.default_rng(0)
    bits = np.linspace(2.6, 8.5, types)
    groups = []
    for number in range(tensors):
        size, weight = rng.choice([1e6, 4e6, 16e6, 48e6]), rng.lognormal(0, 2)
        offered = (
            TypeChoice(f"q{b:.1f}", weight * 4.0**-b * rng.lognormal(0, 0.1), {"bytes": size * b / 8}) for b in bits
        )
        groups.append(TensorGroup(str(number), tuple(offered)))
    whole = sum(max(choice.costs["bytes"] for choice in group.choices) for group in groups)
    started = time.perf_counter()
    least_loss(groups, {"bytes": 0.5 * whole})
    return time.perf_counter() - started


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--recipes", type=int, default=30)
    parser.add_argument("--windows", type=int, default=3)
    options = parsed(parser)
    with GgufFile.open(options.model) as source:
        with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=1)) as server:
            fitting = fitting_windows(server, source, options.calibrate, 4096)
            windows = fitting_windows(server, source, options.text, WINDOW * options.windows)
        importance = importance_matrix(source, fitting, threads=options.threads).vectors()
        table = sensitivity_table(source, fitting, threads=options.threads)
        rng = np.random.default_rng(1)
        recipes = [random_recipe(source, table.losses, rng) for _ in range(options.recipes)]
        quantizer = Quantizer(
            FileWeights(source, threads=options.threads), importance=importance, effort="fast", threads=options.threads
        )
        candidates = [Candidate(str(n), MadeWeights(quantizer, qtypes)) for n, qtypes in enumerate(recipes)]
        measured = np.array([one.kl_mean for one in walk(source, candidates, windows, threads=options.threads)])
        sums = np.array([predicted(table, qtypes, feedback=False) for qtypes in recipes])
        bits = [recipe_bytes(source.model, qtypes)[1] for qtypes in recipes]
    print(f"{'bits':>6} {'predicted':>10} {'measured':>9}")
    for at in np.argsort(measured):
        print(f"{bits[at]:6.2f} {sums[at]:10.4f} {measured[at]:9.4f}")
    rank, low, high = correlation(sums, measured)
    by_size = float(spearmanr([-b for b in bits], measured)[0])
    seconds = solving_seconds()
    print(
        f"rank correlation {rank:.3f} [{low:.3f}, {high:.3f}] over {len(measured)} recipes; of size alone {by_size:.3f}"
    )
    print(f"solving for 1,000 tensors of 12 types: {seconds:.1f} s")
    if options.json:
        found = {"rank": rank, "low": low, "high": high, "size_alone": by_size, "solving_s": seconds}
        options.json.write_text(json.dumps({"benchmark": "recipe_prediction", **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
