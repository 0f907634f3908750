"""The child process that computes in llama.cpp's library, and may die of it.

Run as ``python -m bitladder.engines.library_child FD`` with one line of JSON on stdin, which then stays open: the
child ends when it closes. Results go to the file descriptor FD as messages (``engines.messages``), which nothing that
the engine prints can reach; what it prints goes to stdout and stderr as it likes.

    request                                       messages
    {"kind": "score", "files": [reference,        "opened"; for each window from "done" on "window" with
     levels...], "n_vocab", "windows": [[id]],    f64[files, 3, scored]: KL to the reference in nats, negative
     "first": [position], "done", "threads",      log-likelihood in nats, likeliest token. "caches": for each file the
     "caches": [[type, type]]}                    types of keys and values as ggml numbers them; null for 32 bits
    {"kind": "sums", "file", "n_vocab",           "opened"; after each shard of windows from "done" on "shard" with
     "windows", "shard", "done", "threads",       for each tensor in order f64[matrices, columns] sums of squares and
     "tensors": {name: [matrices, columns]}}      f64[matrices] counts
    {"kind": "states", "file", "n_vocab",         "opened"; for each window "layer" once per layer with f64[tokens,
     "windows", "n_layer", "n_embd", "last",      n_embd] hidden states after it, none where the graph does not name
     "threads"}                                   them, then "logits" f64[last, n_vocab] of its last tokens
    all                                           at last "end"; or "refused", or "unfit" of a model that predicts
                                                  no next token, with "what"
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitladder.describe.windows import tokens_in_common
from bitladder.engines.activation_sums import ActivationSums
from bitladder.engines.layer_outputs import LayerOutputs
from bitladder.engines.llama_library import Library, LibraryError, OpenModel, UnfitModel, Watch
from bitladder.engines.logit_scores import distribution, divergence
from bitladder.engines.messages import Sender
from bitladder.engines.parent_watch import die_with_starting_thread, follow_parent


def _score(library: Library, request: Mapping[str, Any], sender: Sender) -> None:
    """Every model computes a piece of a window, then the pieces' logits meet; no more of them is ever there."""
    caches = request["caches"] or [None] * len(request["files"])
    models = [
        _open(library, path, request, cache=cache and (cache[0], cache[1]))
        for path, cache in zip(request["files"], caches, strict=True)
    ]
    sender.send("opened")
    before: list[int] = []
    for at in range(request["done"], len(request["windows"])):
        tokens, first = request["windows"][at], request["first"][at]
        kept = tokens_in_common(before, tokens, first)
        before = tokens
        sender.send("window", _scores(models, np.asarray(tokens, np.int64), first, kept))


def _scores(models: Sequence[OpenModel], tokens: NDArray[np.int64], first: int, kept: int) -> NDArray[np.float64]:
    """f64[models, 3, scored] of one window, whose positions from ``first`` to the last but one are scored. The models
    know its first ``kept`` tokens from the window before."""
    start = min([model.clear(kept) for model in models])
    if start < kept:  # one of them cannot go back
        for model in models:
            model.clear()
    parts = []
    for piece, wanted in _pieces(first, len(tokens) - 1, models[0].piece, start):
        logits = [model.decode(tokens[piece].tolist(), piece.start, wanted) for model in models]
        if not any(wanted):
            continue
        targets = tokens[piece.start + 1 : piece.stop + 1][wanted[: len(tokens) - 1 - piece.start]]
        found = [distribution(one, targets) for one in logits]
        kl = [divergence(logits[0], one, found[0], own) for one, own in zip(logits, found, strict=True)]
        kl[0][:] = 0.0
        parts.append(np.array([[k, one.nll, one.top1] for k, one in zip(kl, found, strict=True)], np.float64))
    return np.concatenate(parts, axis=2)


def _pieces(first: int, last: int, length: int, begin: int = 0) -> Iterator[tuple[slice, list[bool]]]:
    """A window from ``begin`` on in pieces, with which of their positions lie from ``first`` up to before ``last``.
    What is never wanted behind ``last`` is not computed."""
    for start in range(begin, last, length):
        stop = min(start + length, last)
        yield slice(start, stop), [first <= at < last for at in range(start, stop)]


def _sum(library: Library, request: Mapping[str, Any], sender: Sender) -> None:
    """Logits are wanted at every position, else the last layer would drop the others before its feed-forward part."""
    sums = ActivationSums(library, {name: tuple(sizes) for name, sizes in request["tensors"].items()})
    model = _open(library, request["file"], request, sums)
    sender.send("opened")
    shard = request["shard"]
    for start in range(request["done"] * shard, len(request["windows"]), shard):
        sums.clear()
        for tokens in request["windows"][start : start + shard]:
            model.clear()
            for at in range(0, len(tokens), model.piece):
                piece = tokens[at : at + model.piece]
                try:
                    model.decode(piece, at, [True] * len(piece))
                finally:  # a callback that gave up ends the computation
                    if sums.fault:
                        raise LibraryError(f"The activations could not be read: {sums.fault}")
        parts = [part.ravel() for name in request["tensors"] for part in (sums.squares[name], sums.counts[name])]
        sender.send("shard", np.concatenate(parts))


def _states(library: Library, request: Mapping[str, Any], sender: Sender) -> None:
    """Logits are wanted at every position, else the last layer would drop the others."""
    outputs = LayerOutputs(library, request["n_layer"], request["n_embd"])
    model, last = _open(library, request["file"], request, outputs), request["last"]
    sender.send("opened")
    for tokens in request["windows"]:
        model.clear()
        outputs.clear()
        logits = np.empty((0, model.n_vocab), np.float32)
        for at in range(0, len(tokens), model.piece):
            piece = tokens[at : at + model.piece]
            found = model.decode(piece, at, [True] * len(piece))
            logits = np.concatenate([logits, found[-last:]])[-last:]
            if outputs.fault:
                raise LibraryError(f"the layers' outputs could not be read: {outputs.fault}")
        for layer in range(request["n_layer"]):
            states = outputs.layer(layer, len(tokens))
            sender.send("layer", None if states is None else states.ravel().astype(np.float64))
        sender.send("logits", logits.ravel().astype(np.float64))


def _open(
    library: Library,
    path: str,
    request: Mapping[str, Any],
    watch: Watch | None = None,
    cache: tuple[int, int] | None = None,
) -> OpenModel:
    longest = max(map(len, request["windows"]))
    return OpenModel(
        library, Path(path), n_ctx=longest, n_vocab=request["n_vocab"], threads=request["threads"], watch=watch,
        cache=cache,
    )  # fmt: skip


def _request() -> dict[str, Any]:
    """The first line of stdin, unbuffered: what follows it is the watch's to see."""
    read = bytearray()
    while not read.endswith(b"\n"):
        more = os.read(0, 1 << 16)
        if not more:
            sys.exit(1)
        read += more
    found: dict[str, Any] = json.loads(read)
    return found


def main() -> None:
    """Answer one request."""
    with Sender(int(sys.argv[1])) as sender:
        die_with_starting_thread(True)  # the parent's thread waits for us to the end
        request = _request()
        follow_parent()
        try:
            {"score": _score, "sums": _sum, "states": _states}[request["kind"]](Library(), request, sender)
        except UnfitModel as error:
            sender.send("unfit", what=str(error))
        except LibraryError as error:
            sender.send("refused", what=str(error))
        except MemoryError:
            sender.send("refused", what="There was not enough memory")
        else:
            sender.send("end")
    os._exit(0)  # the process's end frees all; destructors of the library's threads may not


if __name__ == "__main__":
    main()
