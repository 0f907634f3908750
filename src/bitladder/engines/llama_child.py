"""The child process: llama.cpp's server, and a watch on whoever started it.

Run as ``python -m bitladder.engines.llama_child SETTINGS`` with the settings as JSON. When the model is
loaded it prints one line of JSON with the address it listens on and its version; everything else the engine says
goes to stderr. It ends when its stdin closes or its parent changes, so that no server outlives the program that
wanted it, however that program ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import xllamacpp

from bitladder.engines.parent_watch import die_with_starting_thread, follow_parent


def _params(settings: dict[str, Any]) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    if settings["projector"]:
        params.mmproj.path = settings["projector"]
    params.model_alias = [settings["alias"]]
    params.hostnames = [settings["host"]]
    params.port = settings["port"]
    # llama.cpp divides its n_ctx among the slots; ours is what one request may use.
    params.n_ctx = settings["n_ctx"] * settings["n_parallel"]
    params.n_parallel = settings["n_parallel"]
    params.n_batch = max(settings["n_batch"], settings["n_parallel"])
    params.n_ubatch = settings["n_batch"]
    if settings["task"] != "text":
        params.embedding = True
        params.n_batch = params.n_ubatch = settings["n_ctx"]  # an input is computed in one go, or not at all
        pooling = xllamacpp.llama_pooling_type
        if settings["task"] == "rerank":
            params.pooling_type = pooling.LLAMA_POOLING_TYPE_RANK
        elif settings["pools_by_mean"]:
            params.pooling_type = pooling.LLAMA_POOLING_TYPE_MEAN
    params.n_gpu_layers = settings["n_gpu_layers"]
    for pool in (params.cpuparams, params.cpuparams_batch):
        pool.n_threads = settings["threads"]
    types = {kind.name.removeprefix("GGML_TYPE_").lower(): kind for kind in xllamacpp.ggml_type}
    params.cache_type_k = types[settings["cache_type_k"]]
    params.cache_type_v = types[settings["cache_type_v"]]
    if not settings["chats"]:
        params.chat_template = "chatml"  # any that it has: the model's own is not read then
    if settings["speculate"]:
        _speculate(params.speculative, settings)
    # The plan has decided what fits; the engine must not quietly shrink the context to make it so.
    params.fit_params = False
    params.cache_ram_mib = settings["prompt_cache_mib"]
    params.cache_idle_slots = settings["prompt_cache_mib"] > 0
    params.ui = False
    params.endpoint_metrics = True
    if key := os.environ.get("LLAMA_API_KEY"):
        params.api_keys = [key]
    return params


def _speculate(speculative: Any, settings: dict[str, Any]) -> None:
    kinds = xllamacpp.common_speculative_type
    if settings["speculate"] == "ngram":
        speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_NGRAM_CACHE]
        return
    if settings["speculate"] == "mtp":
        speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
    else:
        speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        speculative.draft.mparams.path = settings["draft"]
    speculative.draft.n_gpu_layers = settings["n_gpu_layers"]
    for pool in (speculative.draft.cpuparams, speculative.draft.cpuparams_batch):
        pool.n_threads = settings["threads"]


def main() -> None:
    """Load, say where, and stay until the parent lets go."""
    follow_parent()
    settings = json.loads(sys.argv[1])
    # While loading, llama.cpp holds the interpreter. Not longer: gateways start engines from worker threads, which end.
    die_with_starting_thread(True)
    try:
        server = xllamacpp.Server(_params(settings))
    except (RuntimeError, ValueError, MemoryError) as error:
        print(f"llama.cpp could not start: {error}", file=sys.stderr, flush=True)
        sys.exit(1)  # not at once: llama.cpp writes its log in a thread of its own, and what it says last is the reason
    die_with_starting_thread(False)
    print(
        json.dumps({"address": server.listening_address, "version": xllamacpp.__version__}),
        flush=True,
    )
    threading.Event().wait()


if __name__ == "__main__":
    main()
