"""An importance matrix from one walk: the mean square of every linear layer's input channels over a
calibration text.

The numbers of llama.cpp's llama-imatrix on the same tokens, from the source's own hidden states: for each
tensor sum x^2 per column and how many tokens were summed, for stacked experts one row and one count each,
over the tokens that were routed to them. Only squares are needed, so no Gram matrices are formed and a pass
costs about the bare forward pass, in bfloat16 where the processor can (``walk/products.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bitladder import __version__
from bitladder.describe.windows import Window, tokens_hash
from bitladder.errors import BadInput
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
from bitladder.walk.products import wants_half_products
from bitladder.walk.states import CALIBRATION_TOKENS, batches_of
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
    half = wants_half_products(half, device)
    weights = FileWeights(source, threads=threads)
    model = layered(source, weights, device=device)
    gathered = Importance(model)
    key = cache_key("importance", type(model).__name__, __version__, source.sha256, tokens_hash(windows), str(half))
    stream = Stream(
        model,
        [Member(weights, [gathered])],
        batches_of(windows, batch_tokens=CALIBRATION_TOKENS),
        state_bytes=state_bytes,
        spill=spill,
        keep=Keep(keep, key) if keep else None,
        half=half,
    )
    forward([stream], progress, "importance: ")
    stream.finished()
    progress("importance", model.n_layer, model.n_layer)
    found = importance_of_vectors(gathered.vectors, dataset=dataset)
    return replace(found, chunks=len(windows), chunk_size=max(len(one.tokens) for one in windows))
