"""FP8 weights (E4M3) in compressed-tensors' layout "float-quantized", inputs rounded to FP8 at run time. For N outputs
and K inputs:

    FP8-DYNAMIC      a scale for each output; inputs rounded with one for each token
    weight           f8 [N, K]
    weight_scale     [N, 1]              in the float type of the model

    FP8-BLOCK        a scale for each block of 128 x 128; inputs rounded in groups of 128
    weight           f8 [N, K]
    weight_scale     [N/128, K/128]      in the float type of the model
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.errors import UsageError
from bitladder.levels.checkpoints.base import Arrays, CheckpointFormat, Stored, matrix_of
from bitladder.levels.checkpoints.ct_config import agrees, arguments, configuration_of, scheme_in
from bitladder.levels.kinds import WHOLE_ROW, CheckpointLevel
from bitladder.levels.methods import ROUNDING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from bitladder.kernels.grid import F32
    from bitladder.kernels.minifloat_scales import FloatScales

BLOCK = 128
_SHARES = (1.0, 1.09, 1.19, 1.3, 1.41, 1.54, 1.68, 1.83)
"""Candidate scales over one power of two, after which steps repeat; smaller ones would cut the largest weight off."""


def fp8_groups(x: torch.Tensor, size: int = WHOLE_ROW) -> torch.Tensor:
    """Inputs ``f32[..., columns]`` rounded to E4M3 with a scale for each token, or for each ``size`` of its values:
    largest magnitude / 448 (vLLM's dynamic FP8)."""
    import torch

    grouped = x.reshape(-1, size or x.shape[-1])
    scale = grouped.abs().amax(dim=-1, keepdim=True) / 448
    steps = grouped / torch.where(scale == 0, 1, scale)
    return (steps.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).reshape(x.shape)


@dataclass(frozen=True)
class Fp8(CheckpointFormat):
    """E4M3, with a scale for each output channel or, with ``group_size`` 128, for each square block."""

    group_size: int = WHOLE_ROW

    prefixes: ClassVar[tuple[str, ...]] = ("FP8",)
    grammar: ClassVar[str] = "FP8-DYNAMIC, FP8-BLOCK"
    about: ClassVar[str] = (
        "Floating point of 8 bits (4 of exponent, 3 of fraction), weights and activations. Nearly nothing is "
        "lost and no calibration is needed: for GPUs that multiply FP8, where INT8 would be taken on older "
        "ones."
    )
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    model_dtype: ClassVar[frozenset[str]] = frozenset({"weight_scale"})
    byte_types: ClassVar[Mapping[str, str]] = {"weight": "float8_e4m3fn"}
    layout: ClassVar[str] = "float-quantized"
    kernels: ClassVar[tuple[str, ...]] = ("FP8",)
    outputs_together: ClassVar[int] = BLOCK
    bpw: ClassVar[float] = 8.0
    stand_in: ClassVar[str] = "Q8_0"

    @classmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """``FP8-DYNAMIC`` or ``FP8-BLOCK``."""
        spelled = name.upper()
        forms = {"FP8-DYNAMIC": cls(), "FP8-BLOCK": cls(BLOCK)}
        return CheckpointLevel(spelled, forms[spelled], ROUNDING) if spelled in forms else None

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> Fp8 | None:
        """As ``CheckpointFormat``: one of the two schemes, as they are written here."""
        weights, inputs = scheme_in(configuration, cls.layout, "float")
        for form in (cls(), cls(BLOCK)):
            if agrees(weights, form._weights) and agrees(inputs, form._inputs):
                return form
        return None

    @classmethod
    def offers(cls, rows: Collection[int]) -> tuple[str, ...]:  # noqa: ARG003
        """A scale for each channel, whatever the rows."""
        return ("FP8-DYNAMIC",)

    @property
    def _weights(self) -> dict[str, Any]:
        if self.group_size:
            return arguments(8, "block", kind="float", block=(BLOCK, BLOCK))
        return arguments(8, "channel", kind="float")

    @property
    def _inputs(self) -> dict[str, Any]:
        strategy = "group" if self.group_size else "token"
        return arguments(8, strategy, kind="float", group_size=self.group_size or None, dynamic=True)

    @property
    def scheme(self) -> str:
        """``FP8-DYNAMIC`` or ``FP8-BLOCK``."""
        return "FP8-BLOCK" if self.group_size else "FP8-DYNAMIC"

    @property
    def rounds_inputs(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """``fp8_groups``."""
        return partial(fp8_groups, size=self.group_size) if self.group_size else fp8_groups

    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """As ``CheckpointFormat``."""
        scales = (outputs // BLOCK) * (inputs // BLOCK) if self.group_size else outputs
        return outputs * inputs + 2 * scales

    def check_shapes(self, level: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """As ``CheckpointFormat``: blocks are whole."""
        for name, (outputs, inputs) in shapes.items():
            if self.group_size and (outputs % BLOCK or inputs % BLOCK):
                raise UsageError(
                    f"{level}: {name} is {outputs} x {inputs}, which blocks of {BLOCK} x {BLOCK} do not fill.",
                    means="Engines multiply q, k and v, and gate and up, as one matrix, whose blocks must not straddle "
                    "two of them.",
                    do="Ask for FP8-DYNAMIC, which takes every shape.",
                )

    def search(
        self, weights: F32, importance: F32 | None, *, scale_dtype: str = "float16", quick: bool = False
    ) -> FloatScales:
        """As ``CheckpointFormat``, over scales of one power of two (``kernels/minifloat_scales.py``)."""
        import numpy as np

        from bitladder.kernels import minifloat_scales
        from bitladder.kernels.groups import store_scale

        shares = np.array(_SHARES[:1] if quick else _SHARES, np.float32)
        store = partial(store_scale, dtype=scale_dtype)
        if self.group_size:
            return minifloat_scales.in_blocks(weights, BLOCK, importance, store, shares)
        return minifloat_scales.free(weights, WHOLE_ROW, importance, store, shares)

    def encode(self, codes: npt.NDArray[np.integer], parameters: FloatScales) -> Arrays:
        """As ``CheckpointFormat``."""
        scales = parameters.scales[::BLOCK] if self.group_size else parameters.scales
        return {"weight": parameters.stored(codes), "weight_scale": scales}

    def shape(self, arrays: Stored) -> tuple[int, int]:
        """As ``CheckpointFormat``."""
        outputs, inputs = matrix_of(arrays, "weight").shape
        return outputs, inputs

    def decode(self, arrays: Stored) -> F32:
        """As ``CheckpointFormat``; blocks of others may be part empty at the edges."""
        import numpy as np

        from bitladder.kernels import minifloats

        shape = self.shape(arrays)
        block = (BLOCK, BLOCK) if self.group_size else (1, shape[1])
        if arrays["weight"].dtype != np.uint8:
            raise ValueError(f"weights of type {arrays['weight'].dtype}, expected E4M3")
        scales = matrix_of(arrays, "weight_scale").astype(np.float32)
        return np.asarray(minifloats.e4m3(arrays["weight"]) * minifloats.spread(scales, shape, block), np.float32)

    def configuration(self, *, ignored: tuple[str, ...]) -> dict[str, Any]:
        """As ``CheckpointFormat``."""
        return configuration_of(self.layout, ignored, self._weights, self._inputs)

    def notes(self) -> tuple[str, ...]:
        """As vLLM 0.33 behaves."""
        note = (
            "vLLM multiplies in FP8 on GPUs of compute capability 8.9 and above; from 7.5 on it decodes the weights "
            "and leaves inputs as they are. Its CPU build serves it, too."
        )
        return (note,)
