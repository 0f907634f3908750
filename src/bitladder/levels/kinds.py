"""The kinds of levels: what one model can be stored as, and what follows from the kind.

    kind             names                      stored as   made of
    RecipeLevel      Q4_K_M, Q8_0, F16          GGUF file   llama.cpp's mix of types, each tensor rounded by itself
    FeedbackLevel    GPTQ-Q4_K_M, bpw4.25       GGUF file   a mix of types, codes chosen with error feedback
    FoldedLevel      AWQ-Q3_K_M                 GGUF file   llama.cpp's mix of types after AWQ's scaling
    CheckpointLevel  GPTQ-4bit-g64, INT8-W8A8   folder      codes in one of the formats of ``checkpoints/``

``Level`` is their union, and it is closed: a match over the four kinds is complete. Text becomes a level in
``names.parse_level`` and nowhere else, and a level prints its own name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar, cast

from bitladder.errors import UsageError
from bitladder.formats.recipes import RECIPES
from bitladder.levels.methods import AWQ, Method
from bitladder.records.plan import Container

if TYPE_CHECKING:
    from bitladder.levels.checkpoints.base import FolderFormat

FILE_ENGINES = ("llama-server", "ollama", "lmstudio")
"""Engines that run GGUF files."""
CHECKPOINT_ENGINES = ("vllm", "sglang", "tgi", "transformers")
"""Engines that run checkpoint folders, and GGUF files slowly if at all."""
MLX_ENGINES = ("mlx-lm", "lmstudio")
"""Engines that run MLX's folders."""
WHOLE_ROW = 0
"""Group size of one scale per output channel; files write it as -1 (GPTQ) or as ``strategy: channel``."""

_L = TypeVar("_L", bound="Level")
_WHOLE_TYPES = frozenset({"F32", "F16", "BF16"})
_EXACT_TYPES = _WHOLE_TYPES | {"Q8_0"}
"""Types with nothing to search for: an importance matrix changes none of their bytes."""


class Needs(StrEnum):
    """What has to be known of the model's activations before a level can be made."""

    NOTHING = "nothing"
    IMPORTANCE = "importance"
    """Mean squared inputs weigh its errors; it can be made without them, and loses more."""
    CALIBRATION = "calibration"
    """A walk over calibration text is part of making it."""


class _Named:
    """Levels print their names."""

    name: str

    def __str__(self) -> str:
        return self.name


class _File(_Named):
    """What all levels stored as a GGUF file have in common."""

    container = Container.FILE
    engines = FILE_ENGINES
    """Engines that serve it."""
    recipe: str | None

    def slow_paths(self, engine: str, *, has_gpu: bool, cpu_features: Collection[str]) -> list[str]:
        """Warnings where an engine would run it, but slowly.

        Args:
            engine: one of ``FILE_ENGINES`` or ``CHECKPOINT_ENGINES``; empty where none is chosen yet.
            has_gpu: whether the machine has one.
            cpu_features: names of the processor's instruction sets, as Linux spells them.
        """
        who, qtype = engine or "the engine", RECIPES[self.recipe].qtype if self.recipe else ""
        found = []
        if engine in CHECKPOINT_ENGINES and qtype not in _WHOLE_TYPES:
            plugin = ", and since 0.24 only with vllm-gguf-plugin beside it" if engine == "vllm" else ""
            found.append(f"{who} reads GGUF slowly if at all{plugin}: use FP8, AWQ, GPTQ or INT8 there")
        if qtype.startswith("IQ") and not has_gpu:
            found.append(f"{who} looks values up in tables on a CPU, often slower than the K-quant of like size")
        if qtype == "BF16" and not has_gpu and "avx512_bf16" not in cpu_features:
            found.append(f"{who} has no vector instructions for BF16 on this CPU: F16 or Q8_0 decode faster")
        return found


@dataclass(frozen=True)
class RecipeLevel(_File):
    """llama.cpp's mix of types of that name (a key of ``formats.recipes.RECIPES``)."""

    recipe: str

    @property
    def name(self) -> str:  # type: ignore[override]
        """What users call it."""
        return self.recipe

    @property
    def needs(self) -> Needs:
        """An importance matrix where block scales are searched for."""
        return Needs.NOTHING if RECIPES[self.recipe].qtype in _EXACT_TYPES else Needs.IMPORTANCE


@dataclass(frozen=True)
class FeedbackLevel(_File):
    """Codes chosen with GPTQ's error feedback, in the types of a named recipe, or in those that lose least at so many
    bits per weight. One of the two is given."""

    recipe: str | None = None
    bpw: float | None = None

    needs = Needs.CALIBRATION

    @property
    def name(self) -> str:  # type: ignore[override]
        """``GPTQ-Q4_K_M``, ``bpw4.50``; more than two digits only if there are more."""
        if self.bpw is None:
            return f"GPTQ-{self.recipe}"
        return f"bpw{self.bpw:.2f}" if self.bpw == round(self.bpw, 2) else f"bpw{self.bpw:g}"


@dataclass(frozen=True)
class FoldedLevel(_File):
    """A K-quant level after AWQ's folding: input channels that matter are multiplied by scales, and the norm or linear
    layer before takes up their inverse (``kernels/awq.py``). The file is an ordinary GGUF."""

    recipe: str

    method = AWQ
    needs = Needs.CALIBRATION

    @property
    def name(self) -> str:  # type: ignore[override]
        """What users call it."""
        return f"AWQ-{self.recipe}"


@dataclass(frozen=True)
class CheckpointLevel(_Named):
    """A level that is stored as a checkpoint folder: in which format, and how its codes are chosen."""

    name: str
    format: FolderFormat
    method: Method

    container = Container.FOLDER
    __str__ = _Named.__str__

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines that serve it."""
        return self.format.engines

    @property
    def needs(self) -> Needs:
        """A walk over text, where the method reads anything off one."""
        return Needs.CALIBRATION if self.method.statistics.needs_text else Needs.NOTHING

    @property
    def bpw(self) -> float:
        """Bits per weight of a quantized Linear with long rows, 16-bit scales (and packed zero points) included."""
        return self.format.bpw

    def slow_paths(self, engine: str, *, has_gpu: bool, cpu_features: Collection[str]) -> list[str]:  # noqa: ARG002
        """As of levels in files."""
        return self.format.slow_paths(engine)


KINDS = {
    RecipeLevel: "a mix of types, like Q4_K_M",
    FeedbackLevel: "a file with error feedback, like GPTQ-Q4_K_M and bpw4.25",
    FoldedLevel: "a file after AWQ's scaling, like AWQ-Q4_K_M",
    CheckpointLevel: "a checkpoint folder, like GPTQ-4bit-g64",
}
"""What each kind is called in messages."""

FileLevel = RecipeLevel | FeedbackLevel | FoldedLevel
"""Levels that are stored as a GGUF file."""
Level = FileLevel | CheckpointLevel


def of_kinds(levels: Iterable[Level], kinds: Sequence[type[_L]], *, what: str, why: str, do: str) -> tuple[_L, ...]:
    """``levels`` if all are of these kinds.

    Raises:
        UsageError: one is not; ``what`` does not take it, the message says ``why`` and what to ``do``.
    """
    given = tuple(levels)
    for level in given:
        if not isinstance(level, tuple(kinds)):
            raise UsageError(f"{what} does not take {level}: it is {KINDS[type(level)]}.", means=why, do=do)
    return cast("tuple[_L, ...]", given)
