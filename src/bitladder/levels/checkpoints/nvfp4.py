"""NVFP4 in compressed-tensors' layout "nvfp4-pack-quantized". For N outputs and K inputs:

    weight_packed         u8  [N, K/2]     E2M1 codes, two to a byte, the first in the low half
    weight_scale          f8  [N, K/16]    E4M3, of 16 inputs
    weight_global_scale   f32 [1]          divides all scales of the matrix
    input_global_scale    f32 [1]          divides those of the inputs; only where these are rounded, too

``NVFP4`` rounds inputs to the same type at run time, with scales of 16 found then; ``NVFP4A16`` takes them as they are.
Engines multiply matrices of one input (q, k and v; gate and up) as one, with one global scale: so they share it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.levels.checkpoints.base import Arrays, CheckpointFormat, Stored, matrix_of
from bitladder.levels.checkpoints.ct_config import agrees, arguments, check_groups, configuration_of, scheme_in
from bitladder.levels.kinds import CheckpointLevel
from bitladder.levels.methods import GPTQ

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from bitladder.kernels.grid import F32
    from bitladder.kernels.minifloat_scales import FloatScales

GROUP = 16
_LARGEST = 6.0 * 448.0
_MOST = 2.0**126
"""The largest number that divides scales: of matrices whose weights are all but zero."""
_HEADROOM = (1.0, 1.06, 1.5, 1.6)
"""By how much less the global scale may stretch the matrix. At 1 the group with the largest weight has the largest
scale there is; from 1.5 on its largest weight may be the 4 of E2M1, too. What lies between moves scales against E4M3's
steps."""
_AROUND = tuple(range(-4, 7))
"""Codes of scales to try: from two thirds to 1.7 times what just holds the largest weight of a group."""


def fp4_groups(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """Inputs ``f32[..., columns]`` rounded to E2M1 in groups of 16, whose scales are E4M3 after ``divisor`` multiplied
    them (vLLM's NVFP4 inputs)."""
    import torch

    from bitladder.levels.checkpoints.mx import e2m1_nearest

    groups = x.reshape(-1, GROUP)
    wanted = groups.abs().amax(dim=1, keepdim=True) * (divisor / 6)
    scale = wanted.clamp(max=448).to(torch.float8_e4m3fn).float() / divisor
    return (e2m1_nearest(groups / torch.where(scale == 0, 1, scale)) * scale).reshape(x.shape)


@dataclass(frozen=True)
class Nvfp4(CheckpointFormat):
    """E2M1 in groups of 16; ``inputs``: whether these are rounded."""

    inputs: bool = True
    divisor: float | None = field(default=None, compare=False)
    """What divides the scales, of matrices that share it; None: found for each."""
    input_divisor: float = field(default=1.0, compare=False)

    prefixes: ClassVar[tuple[str, ...]] = ("NVFP4", "NVFP4A16")
    grammar: ClassVar[str] = "NVFP4, NVFP4A16"
    about: ClassVar[str] = (
        "Floating point of 4 bits in groups of 16 with a scale in FP8 and one for the whole matrix. For "
        "NVIDIA GPUs from Blackwell on, which multiply it; A16 leaves activations as they are, and older GPUs "
        "decode it."
    )
    byte_types: ClassVar[Mapping[str, str]] = {"weight_scale": "float8_e4m3fn"}
    suffixes: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    input_arrays: ClassVar[tuple[str, ...]] = ("input_global_scale",)
    layout: ClassVar[str] = "nvfp4-pack-quantized"
    engines: ClassVar[tuple[str, ...]] = ("vllm", "sglang", "transformers")
    bpw: ClassVar[float] = 4 + 8 / GROUP
    stand_in: ClassVar[str] = "Q4_0"
    group_size = GROUP

    @classmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """``NVFP4`` or ``NVFP4A16``."""
        forms = {"NVFP4": cls(), "NVFP4A16": cls(inputs=False)}
        return CheckpointLevel(name.upper(), forms[name.upper()], GPTQ) if name.upper() in forms else None

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> Nvfp4 | None:
        """As ``CheckpointFormat``: one of the two schemes, as they are written here."""
        weights, inputs = scheme_in(configuration, cls.layout, "float")
        forms = (cls(), cls(inputs=False))
        return next((form for form in forms if agrees(weights, form._weights) and agrees(inputs, form._inputs)), None)

    @property
    def _weights(self) -> dict[str, Any]:
        return arguments(4, "tensor_group", kind="float", group_size=GROUP, scale_dtype="torch.float8_e4m3fn")

    @property
    def _inputs(self) -> dict[str, Any] | None:
        return self._weights | {"dynamic": "local", "observer": "static_minmax"} if self.inputs else None

    @property
    def kernels(self) -> tuple[str, ...]:
        """Its own."""
        return (self.scheme,)

    @property
    def scheme(self) -> str:
        """``NVFP4`` or ``NVFP4A16``."""
        return "NVFP4" if self.inputs else "NVFP4A16"

    @property
    def reads_peaks(self) -> bool:
        """Where inputs are rounded."""
        return self.inputs

    def input_rounding(self, arrays: Stored) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """``fp4_groups`` with the layer's own global scale."""
        return partial(fp4_groups, divisor=_one(arrays, "input_global_scale")) if self.inputs else None

    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """As ``CheckpointFormat``."""
        return outputs * inputs // 2 + outputs * inputs // GROUP + (8 if self.inputs else 4)

    def check_shapes(self, level: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """As ``CheckpointFormat``: groups divide every row."""
        check_groups(level, shapes, GROUP)

    def joined(self, matrices: Iterable[F32], importance: F32 | None, peak: float | None) -> Nvfp4:
        """As ``CheckpointFormat``: one global scale, which costs least of several over all of them."""
        import numpy as np

        from bitladder.kernels import minifloat_scales

        own = list(matrices)
        largest = max((float(np.abs(one).max(initial=0)) for one in own), default=0.0)
        trials = [_divisor(largest * headroom) for headroom in _HEADROOM]
        costs = [
            sum(minifloat_scales.two_levels(one, GROUP, importance, trial, around=_AROUND)[1] for one in own)
            for trial in trials
        ]
        return replace(self, divisor=trials[int(np.argmin(costs))], input_divisor=_divisor(peak or 0.0))

    def search(
        self, weights: F32, importance: F32 | None, *, scale_dtype: str = "float16", quick: bool = False
    ) -> FloatScales:
        """As ``CheckpointFormat``, over scales near the plain one (``kernels/minifloat_scales.py``)."""
        from bitladder.kernels import minifloat_scales

        if self.divisor is None:
            return self.joined([weights], importance, None).search(
                weights, importance, scale_dtype=scale_dtype, quick=quick
            )
        around = (0,) if quick else _AROUND
        found, _ = minifloat_scales.two_levels(weights, GROUP, importance, self.divisor, around=around)
        return replace(found, input_divisor=self.input_divisor)

    def encode(self, codes: npt.NDArray[np.integer], parameters: FloatScales) -> Arrays:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels import minifloats

        assert parameters.codes is not None
        arrays: Arrays = {
            "weight_packed": minifloats.pair(parameters.stored(codes)),
            "weight_scale": parameters.codes,
            "weight_global_scale": np.array([parameters.divisor], np.float32),
        }
        if self.inputs:
            arrays["input_global_scale"] = np.array([parameters.input_divisor], np.float32)
        return arrays

    def shape(self, arrays: Stored) -> tuple[int, int]:
        """As ``CheckpointFormat``."""
        outputs, half = matrix_of(arrays, "weight_packed").shape
        return outputs, 2 * half

    def decode(self, arrays: Stored) -> F32:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels import minifloats

        shape, packed, scales = self.shape(arrays), arrays["weight_packed"], matrix_of(arrays, "weight_scale")
        if packed.dtype != np.uint8 or scales.dtype != np.uint8:
            raise ValueError(f"codes of type {packed.dtype} and scales of type {scales.dtype}, expected u8 and E4M3")
        held = minifloats.e4m3(scales) / np.float32(_one(arrays, "weight_global_scale"))
        return np.asarray(minifloats.e2m1_pairs(packed) * minifloats.spread(held, shape, (1, GROUP)), np.float32)

    def configuration(self, *, ignored: tuple[str, ...]) -> dict[str, Any]:
        """As ``CheckpointFormat``."""
        return configuration_of(self.layout, ignored, self._weights, self._inputs)

    def notes(self) -> tuple[str, ...]:
        """As vLLM 0.33 behaves."""
        if self.inputs:
            return (
                "vLLM multiplies in FP4 on GPUs of compute capability 10.0 and above (Blackwell); on older ones it "
                "decodes the weights and leaves inputs as they are.",
            )
        return ("vLLM runs it on GPUs of compute capability 7.5 and above, decoding the weights.",)


def _divisor(largest: float) -> float:
    """What makes the scale of a group with this largest weight the largest scale, as float32 holds it."""
    import numpy as np

    return float(np.float32(min(_LARGEST / largest, _MOST))) if largest > 0 else 1.0


def _one(arrays: Stored, suffix: str) -> float:
    """A single positive number; raises KeyError or ValueError where it is none."""
    found = arrays[suffix]
    if found.size != 1 or not 0 < float(found.reshape(())) < float("inf"):
        raise ValueError(f"{suffix} has the shape {found.shape}, or is no positive number; one is expected")
    return float(found.reshape(()))
