"""An importance matrix from one walk: the mean square of every linear layer's input channels over a
calibration text.

The numbers of llama.cpp's llama-imatrix on the same tokens, from the source's own hidden states: for each
tensor sum x^2 per column and how many tokens were summed, for stacked experts one row and one count each,
over the tokens that were routed to them. Only squares are needed, so no Gram matrices are formed and a pass
costs about the bare forward pass, in bfloat16 where the processor can (``walk/products.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bitladder import __version__
from bitladder.describe.windows import Window, tokens_hash
from bitladder.errors import BadInput
from bitladder.executors import Executor
from bitladder.files.folders import cache_key
from bitladder.files.gguf import GgufFile
from bitladder.files.imatrix import ImportanceMatrix
from bitladder.files.vector_file import importance_of_vectors
from bitladder.plan.calibration_text import LEAST_TOKENS
from bitladder.progress import Progress, silent
from bitladder.units import GiB
from bitladder.walk.driver import Member, Stream, forward
from bitladder.walk.importance import Importance
from bitladder.walk.keep import Keep
from bitladder.walk.opened import layered
from bitladder.walk.products import half_for, wants_half_products
from bitladder.walk.spread import spread_over
from bitladder.walk.states import CALIBRATION_TOKENS, batches_of, shard_count
from bitladder.walk.weights import FileWeights

"""Below this many tokens an importance matrix is little better than none."""


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
    keep: Path | None = None,
    half: bool | None = None,
    executor: Executor | None = None,
    warn: Callable[[str], None] = lambda _: None,
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
        keep: a folder in which a killed walk leaves its states and what it has gathered; one over the same model and
            text goes on from there, and removes them at its end. None keeps nothing.
        half: whether to multiply in bfloat16; None: where the processor can.
        executor: computes units of the walk; they are computed here by default. Numbers do not depend on it.
        warn: told where workers cannot read the source.

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
            do=f"Give a text of several thousand tokens; under {LEAST_TOKENS} an importance matrix says little.",
        )
    half = wants_half_products(half_for(executor) if half is None else half, device)
    batches = batches_of(windows, batch_tokens=CALIBRATION_TOKENS)
    weights = FileWeights(source, threads=threads)
    model = layered(source, weights, device=device)
    gathered = Importance(model)
    key = cache_key("importance", type(model).__name__, __version__, source.sha256, tokens_hash(windows), str(half))
    with spread_over(executor, source, warn=warn) as spread:
        stream = Stream(
            model,
            [Member(weights, [gathered])],
            batches,
            state_bytes=state_bytes,
            spill=spill,
            keep=Keep(keep, key) if keep else None,
            half=half,
            shards=shard_count(batches),
            spread=spread,
        )
        forward([stream], progress, "importance: ")
    stream.finished()
    progress("importance", model.n_layer, model.n_layer)
    found = importance_of_vectors(gathered.vectors, dataset=dataset)
    return replace(found, chunks=len(windows), chunk_size=max(len(one.tokens) for one in windows))
