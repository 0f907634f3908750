"""The exact command, or the file, that starts a planned level in each engine."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import PurePath

from bitladder.errors import UsageError
from bitladder.levels import FILE_ENGINES
from bitladder.plan.placement import Placement, Usage
from bitladder.records.plan import Place

LAUNCHED = ("vllm", "sglang", "tgi", "mlx-lm")
"""Engines for checkpoints that are started by a command."""


@dataclass(frozen=True)
class LaunchCommand:
    """How to start it: a command, and for some engines a file to write first."""

    engine: str
    command: str
    file_name: str = ""
    file_text: str = ""


def launch(
    engine: str,
    path: str,
    placement: Placement,
    wish: Usage,
    *,
    threads: int,
    name: str = "",
    gpus: int = 0,
    on_hub: bool = False,
) -> LaunchCommand:
    """The command for ``path`` placed as planned.

    ``path`` is a GGUF file, or for vLLM, SGLang, TGI and mlx-lm a checkpoint folder, or a repository's name when it is
    ``on_hub``.

    Raises:
        UsageError: an unknown engine, or one that cannot run this kind of model.
    """
    is_gguf = path.endswith(".gguf")
    name = name or PurePath(path).name.removesuffix(".gguf")
    if engine not in (*FILE_ENGINES, *LAUNCHED):
        raise UsageError(f"'{engine}' is no known engine.", do=f"Choose {', '.join((*FILE_ENGINES, *LAUNCHED))}.")
    if is_gguf != (engine in FILE_ENGINES):
        kind, other = ("a GGUF file", FILE_ENGINES) if is_gguf else ("a checkpoint folder", LAUNCHED)
        plugin = "Since 0.24 vLLM reads GGUF only with vllm-gguf-plugin beside it, slowly." if engine == "vllm" else ""
        raise UsageError(f"{engine} does not serve {kind}.", means=plugin, do=f"Choose {' or '.join(other)}.")
    if engine == "llama-server":
        return LaunchCommand(engine, _llama_server(path, placement, wish, threads))
    if engine == "ollama":
        text = f"FROM {path}\nPARAMETER num_ctx {wish.n_ctx}\nPARAMETER num_gpu {placement.n_gpu_layers}\n"
        text += f"PARAMETER num_thread {threads}\n"
        own = shlex.quote(name.lower())
        return LaunchCommand(engine, f"ollama create {own} -f Modelfile && ollama run {own}", "Modelfile", text)
    if engine == "lmstudio":
        offload = "max" if placement.kind == Place.GPU else "off" if not placement.n_gpu_layers else _ratio(placement)
        command = f"lms import {shlex.quote(path)} && lms load {shlex.quote(name)}"
        command += f" --context-length {wish.n_ctx} --gpu {offload}"
        return LaunchCommand(engine, command)
    length = wish.n_ctx
    if engine == "vllm":
        command = f"vllm serve {shlex.quote(path)} --served-model-name {shlex.quote(name)} --max-model-len {length}"
        command += f" --max-num-seqs {max(1, wish.n_seq)}"
        return LaunchCommand(engine, command + (f" --tensor-parallel-size {gpus}" if gpus > 1 else ""))
    if engine == "sglang":
        command = f"python -m sglang.launch_server --model-path {shlex.quote(path)} --served-model-name "
        command += f"{shlex.quote(name)} --context-length {length} --max-running-requests {max(1, wish.n_seq)}"
        return LaunchCommand(engine, command + (f" --tp {gpus}" if gpus > 1 else ""))
    if engine == "mlx-lm":
        command = f"mlx_lm.server --model {shlex.quote(path)} --port 8080 --decode-concurrency {max(1, wish.n_seq)}"
        return LaunchCommand(engine, command)
    # docker takes a path that is not absolute for the name of a volume
    folder = shlex.quote(path) if path.startswith("/") else f'"$PWD"/{shlex.quote(path)}'
    volume, model = ("", shlex.quote(path)) if on_hub else (f"-v {folder}:/model ", "/model")
    command = (
        f"docker run --gpus all -p 8080:80 {volume}ghcr.io/huggingface/text-generation-inference:latest "
        f"--model-id {model} --max-total-tokens {length} --max-input-tokens {max(1, length - 512)}"
    )
    return LaunchCommand(engine, command + (f" --num-shard {gpus}" if gpus > 1 else ""))


def _llama_server(path: str, placement: Placement, wish: Usage, threads: int) -> str:
    words = ["llama-server", "-m", path, "-c", str(wish.n_ctx * wish.n_seq), "-np", str(wish.n_seq), "-t", str(threads)]
    words += ["-ngl", str(placement.n_gpu_layers)]
    if placement.n_cpu_experts:
        words += ["--n-cpu-moe", str(placement.n_cpu_experts)]
    for flag, qtype in (("-ctk", wish.type_k), ("-ctv", wish.type_v)):
        if qtype != "F16":
            words += [flag, qtype.lower()]
    if wish.type_v != "F16":
        words += ["-fa", "on"]  # a quantized value cache needs flash attention
    return shlex.join([*words, "--jinja"])


def _ratio(placement: Placement) -> str:
    """LM Studio wants the part of the model on the GPU."""
    return f"{placement.vram_bytes / max(1, placement.total_bytes):.2f}"
