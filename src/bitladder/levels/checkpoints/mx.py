"""Microscaling formats (OCP MX) as compressed-tensors lays them out: groups of 32 with a power of two as scale. For N
outputs and K inputs:

    MXFP4             layout mxfp4-pack-quantized
    weight_packed     u8 [N, K/2]     E2M1 codes, two to a byte, the first in the low half
    weight_scale      u8 [N, K/32]    exponents (E8M0)

    MXFP8             layout mxfp8-quantized
    weight            f8 [N, K]       E4M3
    weight_scale      u8 [N, K/32]    exponents (E8M0)

Inputs are rounded to the same type at run time, with scales of 32 found then; with ``A16`` after its name a level takes
them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.levels.checkpoints.base import Arrays, CheckpointFormat, Stored, matrix_of
from bitladder.levels.checkpoints.ct_config import agrees, arguments, check_groups, configuration_of, scheme_in
from bitladder.levels.kinds import CheckpointLevel
from bitladder.levels.methods import GPTQ, ROUNDING, Method

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from bitladder.kernels.grid import F32
    from bitladder.kernels.minifloat_scales import FloatScales, Minifloat

GROUP = 32


def e2m1_nearest(x: torch.Tensor) -> torch.Tensor:
    """Each value's nearest step of E2M1, ties to the even code, beyond 6 to 6."""
    import torch

    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=x.device)
    middles = (steps[1:] + steps[:-1]) / 2
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros((), device=x.device))  # up, where the code above is even
    return steps[torch.bucketize(x.abs(), middles)].copysign(x)


def mx_groups(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Inputs ``f32[..., columns]`` rounded to MXFP4 or MXFP8: the plain power of two for each 32 of them."""
    import torch

    groups = x.reshape(-1, GROUP)
    peak = groups.abs().amax(dim=1, keepdim=True)
    exponent = torch.frexp(peak / 1.75).exponent - (2 if bits == 4 else 8)
    scale = torch.ldexp(torch.ones_like(peak), exponent.clamp(-126, 127))
    steps = groups / scale
    rounded = e2m1_nearest(steps) if bits == 4 else steps.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return (rounded * scale).reshape(x.shape)


@dataclass(frozen=True)
class Microscaled(CheckpointFormat):
    """Floats of four or eight bits in groups of 32; ``inputs``: whether these are rounded."""

    inputs: bool = True

    bits: ClassVar[int]
    method: ClassVar[Method]
    """How codes are chosen."""
    engines: ClassVar[tuple[str, ...]] = ("vllm", "transformers")
    group_size = GROUP

    @classmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """``MXFP4``, ``MXFP8A16``."""
        forms = {f"MXFP{cls.bits}": cls(), f"MXFP{cls.bits}A16": cls(inputs=False)}
        spelled = name.upper()
        return CheckpointLevel(spelled, forms[spelled], cls.method) if spelled in forms else None

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> Microscaled | None:
        """As ``CheckpointFormat``: one of the two schemes, as they are written here."""
        for form in (cls(), cls(inputs=False)):
            weights, inputs = scheme_in(configuration, form.layout, "float")
            if agrees(weights, form._weights) and agrees(inputs, form._inputs):
                return form
        return None

    @property
    def _weights(self) -> dict[str, Any]:
        return arguments(self.bits, "group", kind="float", group_size=GROUP, scale_dtype="torch.uint8")

    @property
    def _inputs(self) -> dict[str, Any] | None:
        return self._weights | {"dynamic": True, "observer": None} if self.inputs else None

    @property
    def kernels(self) -> tuple[str, ...]:
        """Its own."""
        return (self.scheme,)

    @property
    def scheme(self) -> str:
        """``MXFP4``, ``MXFP8A16``."""
        return f"MXFP{self.bits}" + ("" if self.inputs else "A16")

    @property
    def rounds_inputs(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """``mx_groups``."""
        return partial(mx_groups, bits=self.bits) if self.inputs else None

    @property
    def bpw(self) -> float:
        """As ``CheckpointFormat``."""
        return self.bits + 8 / GROUP

    @property
    def _kind(self) -> Minifloat:
        from bitladder.kernels import minifloat_scales

        return minifloat_scales.E2M1 if self.bits == 4 else minifloat_scales.E4M3

    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """As ``CheckpointFormat``."""
        return outputs * inputs * self.bits // 8 + outputs * inputs // GROUP

    def check_shapes(self, level: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """As ``CheckpointFormat``: groups divide every row."""
        check_groups(level, shapes, GROUP)

    def search(
        self,
        weights: F32,
        importance: F32 | None,
        *,
        scale_dtype: str = "float16",  # noqa: ARG002
        quick: bool = False,  # noqa: ARG002 - three candidates
    ) -> FloatScales:
        """As ``CheckpointFormat``: the plain power of two or a neighbour (``kernels/minifloat_scales.py``)."""
        from bitladder.kernels import minifloat_scales

        return minifloat_scales.powers_of_two(weights, self._kind, GROUP, importance)

    def encode(self, codes: npt.NDArray[np.integer], parameters: FloatScales) -> Arrays:
        """As ``CheckpointFormat``."""
        from bitladder.kernels import minifloats

        assert parameters.codes is not None
        stored, (weight, scale) = parameters.stored(codes), self.suffixes
        return {weight: minifloats.pair(stored) if self.bits == 4 else stored, scale: parameters.codes}

    def shape(self, arrays: Stored) -> tuple[int, int]:
        """As ``CheckpointFormat``."""
        outputs, across = matrix_of(arrays, self.suffixes[0]).shape
        return outputs, across * 8 // self.bits

    def decode(self, arrays: Stored) -> F32:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels import minifloats

        shape, codes, scales = self.shape(arrays), arrays[self.suffixes[0]], matrix_of(arrays, self.suffixes[1])
        if codes.dtype != np.uint8 or scales.dtype != np.uint8:
            raise ValueError(f"codes of type {codes.dtype} and scales of type {scales.dtype}, expected bytes")
        values = minifloats.e2m1_pairs(codes) if self.bits == 4 else minifloats.e4m3(codes)
        return np.asarray(values * minifloats.spread(minifloats.e8m0(scales), shape, (1, GROUP)), np.float32)

    def configuration(self, *, ignored: tuple[str, ...]) -> dict[str, Any]:
        """As ``CheckpointFormat``."""
        return configuration_of(self.layout, ignored, self._weights, self._inputs)

    def notes(self) -> tuple[str, ...]:
        """What is to be known of powers of two, and of vLLM 0.33."""
        notes = []
        if self.bits == 4:
            notes.append(
                "Scales that are powers of two fit weights less closely than those of NVFP4A16 or W4A16-g32 do."
            )
        if self.inputs:
            notes.append(
                f"vLLM multiplies in MXFP{self.bits} on GPUs of compute capability 10.0 and above (Blackwell); what it "
                "does on older ones differs by version."
            )
        elif self.bits == 4:
            notes.append("vLLM runs it on GPUs of compute capability 7.5 and above, decoding the weights.")
        return tuple(notes)


@dataclass(frozen=True)
class Mxfp4(Microscaled):
    """E2M1; codes are chosen with error feedback."""

    prefixes: ClassVar[tuple[str, ...]] = ("MXFP4", "MXFP4A16")
    grammar: ClassVar[str] = "MXFP4[A16]"
    about: ClassVar[str] = (
        "Floating point of 4 bits in groups of 32 that share a power of two as their scale. For models that "
        "were trained so, and for GPUs that multiply it."
    )
    suffixes: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    layout: ClassVar[str] = "mxfp4-pack-quantized"
    stand_in: ClassVar[str] = "Q4_0"
    bits: ClassVar[int] = 4
    method: ClassVar[Method] = GPTQ


@dataclass(frozen=True)
class Mxfp8(Microscaled):
    """E4M3; codes are the nearest, which no text changes."""

    prefixes: ClassVar[tuple[str, ...]] = ("MXFP8", "MXFP8A16")
    grammar: ClassVar[str] = "MXFP8[A16]"
    about: ClassVar[str] = (
        "Floating point of 8 bits in groups of 32 that share a power of two as their scale. For GPUs that "
        "multiply it; elsewhere FP8 is as good."
    )
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    byte_types: ClassVar[Mapping[str, str]] = {"weight": "float8_e4m3fn"}
    layout: ClassVar[str] = "mxfp8-quantized"
    stand_in: ClassVar[str] = "Q8_0"
    outputs_together: ClassVar[int] = 1
    bits: ClassVar[int] = 8
    method: ClassVar[Method] = ROUNDING
