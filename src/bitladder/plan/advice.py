"""Which format for which engine, hardware and use: rules in order, each with its reason, and warnings of
slow paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitladder.describe.machine import Machine
from bitladder.plan.placement import Placement

GGUF_ENGINES = frozenset({"llama-server", "ollama", "lmstudio"})
GPU_ENGINES = frozenset({"vllm", "tgi", "transformers"})
ENGINES = (*sorted(GGUF_ENGINES), *sorted(GPU_ENGINES))


@dataclass(frozen=True)
class Situation:
    """What the advice depends on."""

    machine: Machine
    placement: Placement
    engine: str = ""
    """One of ``ENGINES`` if the user has chosen; empty to be advised."""
    concurrent: int = 1
    """Requests at once."""

    @property
    def nvidia(self) -> bool:
        """There is a GPU, and not one that shares the CPU's memory."""
        return bool(self.machine.gpus) and not self.machine.unified

    @property
    def all_on_gpu(self) -> bool:
        """The whole model is on the GPU."""
        return self.placement.kind == "gpu"


@dataclass(frozen=True)
class Advice:
    """A format, what runs it, and why."""

    format: str
    engines: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class _Rule:
    when: Callable[[Situation], bool]
    advice: Advice


_FILE_ENGINES = ("llama-server", "ollama", "lmstudio")


def _always(situation: Situation) -> bool:  # noqa: ARG001
    return True


RULES: tuple[_Rule, ...] = (
    _Rule(
        lambda s: s.engine in GGUF_ENGINES,
        Advice("GGUF", _FILE_ENGINES, "the engine you use runs GGUF files and nothing else"),
    ),
    _Rule(
        lambda s: s.engine in GPU_ENGINES and s.concurrent > 16,
        Advice(
            "INT8",
            ("vllm",),
            "with many requests at once arithmetic binds, and 8-bit activations halve it; 4-bit weights must be "
            "widened again for every product",
        ),
    ),
    _Rule(
        lambda s: s.engine in GPU_ENGINES,
        Advice(
            "AWQ or GPTQ, 4 bits",
            ("vllm", "tgi", "transformers"),
            "the engine reads checkpoints; its 4-bit kernels decode at the speed of memory",
        ),
    ),
    _Rule(
        lambda s: not s.nvidia,
        Advice("GGUF", _FILE_ENGINES, "without a CUDA GPU llama.cpp is what runs quantized weights fast"),
    ),
    _Rule(
        lambda s: not s.all_on_gpu,
        Advice(
            "GGUF",
            _FILE_ENGINES,
            "the model does not fit the GPU alone, and llama.cpp is what splits one between GPU and RAM",
        ),
    ),
    _Rule(
        lambda s: s.concurrent > 16,
        Advice("INT8", ("vllm",), "with many requests at once arithmetic binds, and 8-bit activations halve it"),
    ),
    _Rule(
        lambda s: s.concurrent > 4,
        Advice(
            "AWQ or GPTQ, 4 bits", ("vllm", "tgi"), "several requests at once: these engines batch them continuously"
        ),
    ),
    _Rule(
        _always,
        Advice("GGUF", _FILE_ENGINES, "one user at a time: as fast as any, with the finest choice of sizes"),
    ),
)


def advise(situation: Situation) -> Advice:
    """The first rule that holds."""
    return next(rule.advice for rule in RULES if rule.when(situation))


def slow_paths(level: str, engine: str, machine: Machine) -> list[str]:
    """Warnings where a level would run, but slowly."""
    cpu_only = not machine.gpus
    who = engine or "the engine"
    found = []
    if engine in GPU_ENGINES and level.startswith(("Q", "IQ", "TQ")):
        found.append(f"{who} reads GGUF only in an experimental, slow way: use AWQ, GPTQ or INT8 there")
    if level.startswith(("GPTQ-3bit", "GPTQ-2bit")):
        found.append(f"{who} has no fast kernel for 2- and 3-bit GPTQ: a GGUF level of that size runs at full speed")
    if level.startswith("IQ") and cpu_only:
        found.append(f"{who} looks values up in tables on a CPU, often slower than the K-quant of like size")
    if level == "BF16" and cpu_only and "avx512_bf16" not in machine.features:
        found.append(f"{who} has no vector instructions for BF16 on this CPU: F16 or Q8_0 decode faster")
    return found
