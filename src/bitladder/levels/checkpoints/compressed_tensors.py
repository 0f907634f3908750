"""compressed-tensors, as llm-compressor writes it. For N outputs, K inputs, G groups and b bits:

    pack-quantized
    weight_packed       int32 [N, K*b/32]    codes of 2 to 8 bits, packed along the inputs
    weight_scale              [N, G]         in the float type of the model
    weight_zero_point   int32 [N*b/32, G]    packed along the outputs; only where zero is not in the middle
    weight_shape        int64 [2]            N, K
    weight_g_idx        int32 [K]            the group of every input, where others order them; never written here

    int-quantized
    weight              int8  [N, K]         codes less 128
    weight_scale              [N, 1]         in the float type of the model

Engines round the inputs of int-quantized layers to int8, with a scale for each token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.levels.checkpoints.base import Arrays, Stored, matrix_of
from bitladder.levels.checkpoints.ct_config import arguments, configuration_of, scheme_in
from bitladder.levels.checkpoints.grouped import parse_grouped
from bitladder.levels.checkpoints.integers import IntegerFormat, group_size_in, words
from bitladder.levels.kinds import CHECKPOINT_ENGINES, WHOLE_ROW, CheckpointLevel
from bitladder.levels.methods import GPTQ, ROUNDING, SMOOTHING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from bitladder.kernels.grid import F32
    from bitladder.kernels.groups import Affine

_WEIGHTS_ONLY = re.compile(r"W([2-8])A16(?:-(?:g(32|64|128)|(channel)))?", re.IGNORECASE | re.ASCII)


def int8_tokens(x: torch.Tensor) -> torch.Tensor:
    """Inputs ``f32[..., columns]`` rounded to int8 with a scale for each token: largest magnitude / 127, codes to
    nearest (vLLM's dynamic symmetric int8)."""
    import torch

    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(x / torch.where(scale == 0, 1, scale)) * scale


@dataclass(frozen=True)
class PackQuantized(IntegerFormat):
    """Packed codes of any method; engines take the inputs as they are."""

    prefixes: ClassVar[tuple[str, ...]] = ("GPTQ", "AWQ", "INT8", *(f"W{bits}A16" for bits in range(2, 9)))
    grammar: ClassVar[str] = "INT8-W8A16, W{2,...,8}A16-{g32,g64,g128,channel}"
    about: ClassVar[str] = (
        "Whole numbers of so many bits (W4: 4) with a scale for each group or output; activations stay at 16 "
        "bits (A16). For vLLM, where a width other than GPTQ's or AWQ's is wanted."
    )
    suffixes: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    tunable: ClassVar[tuple[str, ...]] = ("weight_scale",)
    model_dtype: ClassVar[frozenset[str]] = frozenset({"weight_scale"})
    layout: ClassVar[str] = "pack-quantized"

    @classmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """``INT8-W8A16``, ``W3A16-g64``, or a method's name with ``-ct``; ``W4A16`` has groups of 128, as the scheme of
        that name."""
        if name.upper() == "INT8-W8A16":
            return CheckpointLevel("INT8-W8A16", cls(8), ROUNDING)
        if (match := _WEIGHTS_ONLY.fullmatch(name)) is not None:
            size = WHOLE_ROW if match[3] else int(match[2] or 128)
            rest = f"g{size}" if size else "channel"
            return CheckpointLevel(f"W{match[1]}A16-{rest}", cls(int(match[1]), size), GPTQ)
        found = parse_grouped(name)
        if found is None or found.layout != "ct":
            return None
        return CheckpointLevel(found.name, cls(found.bits, found.group_size, found.sym), found.method)

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> PackQuantized | None:
        """As ``CheckpointFormat``: one scheme for all layers, inputs as they are."""
        weights, inputs = scheme_in(configuration, cls.layout, "int")
        sym, bits, strategy = weights.get("symmetric", True), weights.get("num_bits"), weights.get("strategy")
        size = group_size_in(weights) if strategy == "group" else WHOLE_ROW if strategy == "channel" else None
        if inputs or size is None or type(sym) is not bool or type(bits) is not int or not 2 <= bits <= 8:
            return None
        return None if weights.get("actorder") in ("group", True) else cls(bits, size, sym)

    @property
    def engines(self) -> tuple[str, ...]:
        """Other numbers of bits than 4 and 8 run in vLLM alone, and wherever weights are decoded."""
        return CHECKPOINT_ENGINES if self.bits in (4, 8) else ("vllm", "transformers")

    @property
    def kernels(self) -> tuple[str, ...]:
        """4 and 8 bits have kernels of their own."""
        return (f"W{self.bits}A16",) if self.bits in (4, 8) else ("WNA16",)

    @property
    def scheme(self) -> str:
        """``W4A16-g128``."""
        size = f"g{self.group_size}" if self.group_size else "channel"
        return f"W{self.bits}A16-{size}" + ("" if self.sym else "-asym")

    @property
    def stores_zeros(self) -> bool:
        """Only where zero is not in the middle of the codes."""
        return not self.sym

    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """As ``CheckpointFormat``."""
        groups = self.groups_of(inputs)
        zeros = words(outputs, self.bits) * groups if self.stores_zeros else 0
        return 4 * words(inputs, self.bits) * outputs + 2 * groups * outputs + 4 * zeros + 16

    def encode(self, codes: npt.NDArray[np.integer], parameters: Affine) -> Arrays:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels.packing import pack

        arrays: Arrays = {
            "weight_packed": pack(codes, self.bits),
            "weight_scale": parameters.scales,
            "weight_shape": np.array(codes.shape, np.int64),
        }
        if self.stores_zeros:
            arrays["weight_zero_point"] = np.ascontiguousarray(pack(parameters.zeros.T, self.bits).T)
        return arrays

    def shape(self, arrays: Stored) -> tuple[int, int]:
        """As ``CheckpointFormat``; what ``weight_shape`` claims must be what the codes fill."""
        claimed, packed = arrays["weight_shape"], matrix_of(arrays, "weight_packed").shape
        if claimed.shape != (2,):
            raise ValueError(f"weight_shape has the shape {claimed.shape}, expected (2,)")
        outputs, inputs = (int(size) for size in claimed)
        if packed != (outputs, words(inputs, self.bits)):
            raise ValueError(f"weight_packed has the shape {packed}, and weight_shape says {(outputs, inputs)}")
        return outputs, inputs

    def decode(self, arrays: Stored) -> F32:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels.packing import unpack

        outputs, inputs = self.shape(arrays)
        codes = unpack(arrays["weight_packed"], self.bits, inputs)
        scales = matrix_of(arrays, "weight_scale").astype(np.float32)
        zeros = np.full(scales.shape, 2 ** (self.bits - 1), np.int32)
        if "weight_zero_point" in arrays:
            packed = np.ascontiguousarray(matrix_of(arrays, "weight_zero_point").T)
            zeros = unpack(packed, self.bits, outputs).T.astype(np.int32)
        return self.weights_of(codes, zeros, scales, arrays.get("weight_g_idx"))

    def configuration(self, *, ignored: tuple[str, ...]) -> dict[str, Any]:
        """As ``CheckpointFormat``."""
        strategy = "group" if self.group_size else "channel"
        weights = arguments(self.bits, strategy, group_size=self.group_size or None, symmetric=self.sym)
        return configuration_of(self.layout, ignored, weights, None)

    def slow_paths(self, engine: str) -> list[str]:
        """As ``CheckpointFormat``."""
        if self.bits in (4, 8):
            return []
        who = engine or "the engine"
        return [
            f"{who} may have no fast kernel for {self.bits}-bit weights: a GGUF level of that size runs at full speed"
        ]

    def notes(self) -> tuple[str, ...]:
        """As vLLM 0.32 and transformers 5 behave."""
        notes = []
        if self.bits != 4:
            notes.append(
                f"vLLM on CPUs has no {self.bits}-bit weight-only kernel; "
                "transformers with compressed-tensors decodes it."
            )
        if self.bits not in (4, 8):
            notes.append(
                f"On GPUs vLLM runs {self.bits} bits since 0.33, with Humming's kernels (compute capability 7.5)."
            )
        if not self.sym:
            notes.append(
                "transformers with compressed-tensors 0.20 expects zero points unpacked and refuses to load them; "
                "CompressedTensorsConfig(dequantize=True) or version 0.17 reads them, and so does vLLM."
            )
        return tuple(notes)


@dataclass(frozen=True)
class IntQuantized(IntegerFormat):
    """8-bit codes, a scale per output channel, products in int8."""

    bits: int = 8

    prefixes: ClassVar[tuple[str, ...]] = ("INT8",)
    grammar: ClassVar[str] = "INT8-W8A8, INT8-W8A8-smooth"
    about: ClassVar[str] = (
        "Whole numbers of 8 bits with a scale for each output, and activations rounded to 8 bits as they "
        "come. Nearly nothing is lost, and GPUs multiply 8-bit numbers twice as fast: for many requests at "
        "once. Not llama.cpp's Q8_0, which rounds weights alone."
    )
    outputs_together: ClassVar[int] = 1
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    model_dtype: ClassVar[frozenset[str]] = frozenset({"weight_scale"})
    layout: ClassVar[str] = "int-quantized"
    scheme: ClassVar[str] = "INT8-W8A8"
    kernels: ClassVar[tuple[str, ...]] = ("INT8",)
    packed: ClassVar[bool] = False
    signed_scales: ClassVar[bool] = False
    stores_zeros: ClassVar[bool] = False

    @classmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """``INT8-W8A8[-smooth]``."""
        methods = {"INT8-W8A8": ROUNDING, "INT8-W8A8-smooth": SMOOTHING}
        spelled = next((own for own in methods if own.upper() == name.upper()), None)
        return None if spelled is None else CheckpointLevel(spelled, cls(), methods[spelled])

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> IntQuantized | None:
        """As ``CheckpointFormat``: a scale for each output channel, and one for each token of the inputs."""
        weights, inputs = scheme_in(configuration, cls.layout, "int")
        by_channel = weights.get("strategy") == "channel" and weights.get("symmetric", True) is True
        by_token = inputs.get("dynamic") is True and inputs.get("strategy", "token") == "token"
        eight = weights.get("num_bits") == inputs.get("num_bits") == 8
        return cls() if by_channel and by_token and eight and inputs.get("symmetric", True) is True else None

    @classmethod
    def offers(cls, rows: Collection[int]) -> tuple[str, ...]:  # noqa: ARG003
        """Plain rounding, whatever the rows."""
        return ("INT8-W8A8",)

    @property
    def rounds_inputs(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """``int8_tokens``."""
        return int8_tokens

    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """As ``CheckpointFormat``."""
        return outputs * inputs + 2 * outputs

    def encode(self, codes: npt.NDArray[np.integer], parameters: Affine) -> Arrays:
        """As ``CheckpointFormat``."""
        import numpy as np

        return {"weight": (codes.astype(np.int16) - 128).astype(np.int8), "weight_scale": parameters.scales}

    def shape(self, arrays: Stored) -> tuple[int, int]:
        """As ``CheckpointFormat``."""
        outputs, inputs = matrix_of(arrays, "weight").shape
        return outputs, inputs

    def decode(self, arrays: Stored) -> F32:
        """As ``CheckpointFormat``."""
        import numpy as np

        outputs, _ = self.shape(arrays)
        scales = arrays["weight_scale"]
        if scales.shape != (outputs, 1):
            raise ValueError(f"scales of shape {scales.shape}, expected {(outputs, 1)}")
        return np.asarray(arrays["weight"].astype(np.float32) * scales.astype(np.float32))

    def configuration(self, *, ignored: tuple[str, ...]) -> dict[str, Any]:
        """As ``CheckpointFormat``."""
        weights = arguments(self.bits, "channel", symmetric=self.sym)
        return configuration_of(self.layout, ignored, weights, arguments(self.bits, "token", dynamic=True))
