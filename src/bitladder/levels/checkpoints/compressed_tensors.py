"""compressed-tensors, as llm-compressor writes it. For N outputs, K inputs, G groups and b bits:

    pack-quantized
    weight_packed       int32 [N, K*b/32]    codes, packed along the inputs
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
from bitladder.levels.checkpoints.grouped import parse_grouped
from bitladder.levels.checkpoints.integers import IntegerFormat, group_size_in, words
from bitladder.levels.kinds import WHOLE_ROW, CheckpointLevel
from bitladder.levels.methods import ROUNDING, SMOOTHING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from bitladder.kernels.grid import F32
    from bitladder.kernels.groups import Affine


def int8_tokens(x: torch.Tensor) -> torch.Tensor:
    """Inputs ``f32[..., columns]`` rounded to int8 with a scale for each token: largest magnitude / 127, codes to
    nearest (vLLM's dynamic symmetric int8)."""
    import torch

    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(x / torch.where(scale == 0, 1, scale)) * scale


@dataclass(frozen=True)
class PackQuantized(IntegerFormat):
    """Packed codes of any method; engines take the inputs as they are."""

    prefixes: ClassVar[tuple[str, ...]] = ("GPTQ", "AWQ", "INT8")
    grammar: ClassVar[str] = "INT8-W8A16"
    suffixes: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    model_dtype: ClassVar[frozenset[str]] = frozenset({"weight_scale"})
    layout: ClassVar[str] = "pack-quantized"

    @classmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """``INT8-W8A16``, or a method's name with ``-ct``."""
        if name.upper() == "INT8-W8A16":
            return CheckpointLevel("INT8-W8A16", cls(8), ROUNDING)
        found = parse_grouped(name)
        if found is None or found.layout != "ct":
            return None
        return CheckpointLevel(found.name, cls(found.bits, found.group_size, found.sym), found.method)

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> PackQuantized | None:
        """As ``CheckpointFormat``: one scheme for all layers, inputs as they are."""
        weights, inputs = _scheme(configuration, cls.layout)
        sym, bits, strategy = weights.get("symmetric", True), weights.get("num_bits"), weights.get("strategy")
        size = group_size_in(weights) if strategy == "group" else WHOLE_ROW if strategy == "channel" else None
        if inputs or size is None or type(sym) is not bool or type(bits) is not int or bits not in (2, 3, 4, 8):
            return None
        return None if weights.get("actorder") in ("group", True) else cls(bits, size, sym)

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
        weights = _arguments(self.bits, strategy, group_size=self.group_size or None, symmetric=self.sym)
        return _configuration(self.layout, ignored, weights, None)

    def notes(self) -> tuple[str, ...]:
        """As vLLM 0.32 and transformers 5 behave."""
        notes = []
        if self.bits != 4:
            notes.append(
                f"vLLM on CPUs has no {self.bits}-bit weight-only kernel; "
                "transformers with compressed-tensors decodes it."
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
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    model_dtype: ClassVar[frozenset[str]] = frozenset({"weight_scale"})
    layout: ClassVar[str] = "int-quantized"
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
        weights, inputs = _scheme(configuration, cls.layout)
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
        weights = _arguments(self.bits, "channel", symmetric=self.sym)
        return _configuration(self.layout, ignored, weights, _arguments(self.bits, "token", dynamic=True))


def _scheme(configuration: Mapping[str, Any], layout: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """How weights and inputs are quantized in a configuration from outside; empty where it is of another layout, or
    layers differ."""
    groups = configuration.get("config_groups")
    of_layout = configuration.get("quant_method") == "compressed-tensors" and configuration.get("format") == layout
    if not of_layout or not isinstance(groups, Mapping) or len(groups) != 1:
        return {}, {}
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    inputs = group.get("input_activations") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping | None) or weights.get("type") != "int":
        return {}, {}
    return weights, inputs or {}


def _arguments(
    bits: int, strategy: str, *, group_size: int | None = None, dynamic: bool = False, symmetric: bool = True
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "block_structure": None,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }


def _configuration(
    layout: str, ignored: tuple[str, ...], weights: dict[str, Any], inputs: dict[str, Any] | None
) -> dict[str, Any]:
    """``ignored`` holds whole paths, or patterns where a name is the end of one."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": [f"re:.*{re.escape(name)}$" if "." in name else name for name in ignored],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
                "format": layout,
            }
        },
    }
