"""Which format for which engine, hardware and use: rules in order, each with its reason, and warnings of
slow paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitladder.describe.machine import Machine
from bitladder.levels import CHECKPOINT_ENGINES, FILE_ENGINES, MLX_ENGINES
from bitladder.plan.kernels import devices_of, is_nvidia
from bitladder.plan.placement import Placement
from bitladder.records.plan import Place

FP8_FROM = 8.9
"""The compute capability from which GPUs multiply in FP8 (``data/kernels.yaml``)."""
_MLX = tuple(engine for engine in MLX_ENGINES if engine not in FILE_ENGINES)
ENGINES = (*sorted(FILE_ENGINES), *sorted(CHECKPOINT_ENGINES), *_MLX)


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
        """There is a GPU of NVIDIA's, and none that shares the CPU's memory."""
        return any(is_nvidia(gpu.name) for gpu in self.machine.gpus) and not self.machine.unified

    @property
    def fast_fp8(self) -> bool:
        """The GPUs multiply in FP8, as far as they are known."""
        known = [device.capability for device in devices_of(self.machine) if device.capability]
        return bool(known) and min(known) >= FP8_FROM

    @property
    def all_on_gpu(self) -> bool:
        """The whole model is on the GPU."""
        return self.placement.kind == Place.GPU


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


def _always(situation: Situation) -> bool:  # noqa: ARG001
    return True


RULES: tuple[_Rule, ...] = (
    _Rule(
        lambda s: s.engine in _MLX,
        Advice("MLX, 4 to 8 bits", MLX_ENGINES, "the engine you use runs MLX's folders"),
    ),
    _Rule(
        lambda s: s.engine in FILE_ENGINES,
        Advice("GGUF", FILE_ENGINES, "the engine you use runs GGUF files and nothing else"),
    ),
    _Rule(
        lambda s: s.engine in CHECKPOINT_ENGINES and s.concurrent > 16 and s.fast_fp8,
        Advice(
            "FP8",
            ("vllm", "sglang"),
            "with many requests at once arithmetic binds, and this GPU multiplies in FP8 at twice the rate; 4-bit "
            "weights must be widened again for every product",
        ),
    ),
    _Rule(
        lambda s: s.engine in CHECKPOINT_ENGINES and s.concurrent > 16,
        Advice(
            "INT8",
            ("vllm", "sglang"),
            "with many requests at once arithmetic binds, and 8-bit activations halve it; 4-bit weights must be "
            "widened again for every product",
        ),
    ),
    _Rule(
        lambda s: s.engine == "tgi",
        Advice(
            "AWQ or GPTQ, 4 bits",
            ("vllm", "sglang", "tgi"),
            "the engine reads checkpoints; TGI was archived on 21 March 2026, and names vLLM and SGLang instead",
        ),
    ),
    _Rule(
        lambda s: s.engine in CHECKPOINT_ENGINES,
        Advice(
            "AWQ or GPTQ, 4 bits",
            ("vllm", "sglang", "transformers"),
            "the engine reads checkpoints; its 4-bit kernels decode at the speed of memory",
        ),
    ),
    _Rule(
        lambda s: not s.nvidia,
        Advice("GGUF", FILE_ENGINES, "without a CUDA GPU llama.cpp is what runs quantized weights fast"),
    ),
    _Rule(
        lambda s: not s.all_on_gpu,
        Advice(
            "GGUF",
            FILE_ENGINES,
            "the model does not fit the GPU alone, and llama.cpp is what splits one between GPU and RAM",
        ),
    ),
    _Rule(
        lambda s: s.concurrent > 16 and s.fast_fp8,
        Advice(
            "FP8",
            ("vllm", "sglang"),
            "with many requests at once arithmetic binds, and this GPU multiplies in FP8 at twice the rate",
        ),
    ),
    _Rule(
        lambda s: s.concurrent > 16,
        Advice(
            "INT8", ("vllm", "sglang"), "with many requests at once arithmetic binds, and 8-bit activations halve it"
        ),
    ),
    _Rule(
        lambda s: s.concurrent > 4,
        Advice(
            "AWQ or GPTQ, 4 bits", ("vllm", "sglang"), "several requests at once: these engines batch them continuously"
        ),
    ),
    _Rule(
        _always,
        Advice("GGUF", FILE_ENGINES, "one user at a time: as fast as any, with the finest choice of sizes"),
    ),
)


def advise(situation: Situation) -> Advice:
    """The first rule that holds."""
    return next(rule.advice for rule in RULES if rule.when(situation))
