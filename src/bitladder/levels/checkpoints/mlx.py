"""MLX's folders, as mlx-lm reads them. For N outputs, K inputs, G groups and b bits:

    MLX-4bit-g64      mode affine, 2 to 8 bits, groups of 32, 64 or 128
    weight   u32 [N, K*b/32]    codes, a stream of bits along the inputs
    scales       [N, G]         in the float type of the model
    biases       [N, G]         in the float type of the model: weight = scale * code + bias

    MLX-mxfp4, MLX-mxfp8, MLX-nvfp4
    weight   u32 [N, K*b/32]    E2M1 codes, eight to a word, or E4M3 codes, four
    scales   u8  [N, K/32]      exponents (E8M0); of nvfp4 [N, K/16], E4M3

Embedding and head are quantized like all else, and config.json carries the same twice: as ``quantization``, which
mlx-lm reads, and as ``quantization_config``, which model pages do. Layers without ``scales`` are float ones. Experts
lie in one array each for all of a layer (``switch_mlp``), which mlx-lm would otherwise make itself, of floats alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.errors import UnknownLevel, UsageError
from bitladder.levels.checkpoints.base import Arrays, CheckpointFormat, Stored, matrix_of
from bitladder.levels.checkpoints.grouped import GROUP_SIZES
from bitladder.levels.kinds import MLX_ENGINES, CheckpointLevel
from bitladder.levels.methods import GPTQ

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bitladder.kernels.biased import Biased
    from bitladder.kernels.grid import F32
    from bitladder.kernels.minifloat_scales import FloatScales

BITS = (2, 3, 4, 5, 6, 8)
_NAME = re.compile(r"MLX-([0-9]{1,3})bit-g([0-9]{1,5})", re.IGNORECASE | re.ASCII)
_EXPERT = re.compile(r"(.+)\.experts\.([0-9]{1,6})\.(\w+)", re.ASCII)
_EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""mlx-lm's names of an expert's matrices, where checkpoints have others."""
_AFFINE = "affine"
_STAND_INS = {8: "Q8_0", 6: "Q6_K", 5: "Q5_1", 4: "Q4_1", 3: "Q3_K", 2: "Q2_K"}


@dataclass(frozen=True)
class MlxFormat(CheckpointFormat):
    """What its modes share."""

    prefixes: ClassVar[tuple[str, ...]] = ("MLX",)
    engines: ClassVar[tuple[str, ...]] = MLX_ENGINES
    everywhere: ClassVar[bool] = True
    mode: str
    bits: int

    @property
    def layout(self) -> str:
        """``mlx`` and the mode."""
        return f"mlx-{self.mode}"

    def check_shapes(self, level: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """As ``CheckpointFormat``: groups divide every row."""
        for name, (_, inputs) in shapes.items():
            if inputs % self.group_size:
                raise UsageError(
                    f"{level}: {name} has rows of {inputs} weights, which groups of {self.group_size} do not divide.",
                    means="MLX stores a matrix in whole groups or not at all.",
                    do=f"Levels whose groups divide every row of this model: {_fitting(shapes)}.",
                )

    def _scheme(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def configuration(self, *, ignored: tuple[str, ...]) -> dict[str, Any]:  # noqa: ARG002
        """As ``CheckpointFormat``; readers take layers without ``scales`` for float ones."""
        return self._scheme()

    def entries(self, configuration: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """As ``CheckpointFormat``: the scheme under both names, and positions in keys of their own."""
        own = {"quantization": dict(configuration), **super().entries(configuration, config)}
        return own | _positions(config)

    def stacked(self, linear: str) -> tuple[str, int] | None:
        """As ``CheckpointFormat``: experts of a layer lie together."""
        match = _EXPERT.fullmatch(linear)
        if match is None:
            return None
        return f"{match[1]}.switch_mlp.{_EXPERT_NAMES.get(match[3], match[3])}", int(match[2])

    def notes(self) -> tuple[str, ...]:
        """As mlx-lm 0.32 behaves."""
        return ("mlx-lm, LM Studio and other MLX programs run it, on Apple silicon above all; vLLM does not.",)


@dataclass(frozen=True)
class MlxAffine(MlxFormat):
    """Integer codes with a scale and a bias for each group; codes are chosen with error feedback."""

    mode: str = _AFFINE
    bits: int = 4
    group_size: int = 64

    grammar: ClassVar[str] = "MLX-{2,3,4,5,6,8}bit-{g32,g64,g128}"
    about: ClassVar[str] = (
        "Whole numbers of so many bits with a scale and an offset for each group of weights, embedding and "
        "head included. For mlx-lm on Apple silicon; 4 bits in groups of 64 are the usual choice there."
    )
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "scales", "biases")
    tunable: ClassVar[tuple[str, ...]] = ("scales", "biases")
    model_dtype: ClassVar[frozenset[str]] = frozenset({"scales", "biases"})

    @classmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """``MLX-4bit-g64``."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        bits, size = int(match[1]), int(match[2])
        if bits not in BITS or size not in GROUP_SIZES:
            raise UnknownLevel(
                f"'{name}' asks for {bits} bits in groups of {size}.",
                means="MLX has no such kernel: no program could run such a folder.",
                do=f"Levels look like {cls.grammar}.",
            )
        return CheckpointLevel(f"MLX-{bits}bit-g{size}", cls(bits=bits, group_size=size), GPTQ)

    @classmethod
    def offers(cls, rows: Collection[int]) -> tuple[str, ...]:
        """8, 6, 5 and 4 bits in mlx-lm's own groups of 64, or of 32 where rows need them."""
        size = next((size for size in (64, 32) if all(row % size == 0 for row in rows)), None)
        return () if size is None else tuple(f"MLX-{bits}bit-g{size}" for bits in (8, 6, 5, 4))

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> MlxAffine | None:
        """As ``CheckpointFormat``: one size of groups; bits may differ by layer, which their arrays show."""
        own = configuration.get("bits"), configuration.get("group_size")
        apart = [entry for entry in configuration.values() if isinstance(entry, Mapping)]
        if not _is_scheme(configuration, _AFFINE) or not all(type(number) is int for number in own):
            return None
        if own[0] not in BITS or own[1] not in GROUP_SIZES:
            return None
        if not all(_is_scheme(one, _AFFINE) and one.get("group_size", own[1]) == own[1] for one in apart):
            return None
        return cls(bits=configuration["bits"], group_size=configuration["group_size"])

    @property
    def bpw(self) -> float:
        """As ``CheckpointFormat``."""
        return self.bits + 32 / self.group_size

    @property
    def stand_in(self) -> str:
        """The block format with as many bits."""
        return _STAND_INS[self.bits]

    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """As ``CheckpointFormat``."""
        return outputs * (inputs * self.bits // 8 + 4 * (inputs // self.group_size))

    def search(
        self, weights: F32, importance: F32 | None, *, scale_dtype: str = "float16", quick: bool = False
    ) -> Biased:
        """As ``CheckpointFormat``, over pairs of scale and bias (``kernels/biased.py``)."""
        from bitladder.kernels import biased

        return biased.search(
            weights, self.bits, self.group_size, importance=importance, scale_dtype=scale_dtype, quick=quick
        )

    def encode(self, codes: npt.NDArray[np.integer], parameters: Biased) -> Arrays:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels.packing import pack

        weight = pack(codes, self.bits).view(np.uint32)
        return {"weight": weight, "scales": parameters.scales, "biases": parameters.biases}

    def shape(self, arrays: Stored) -> tuple[int, int]:
        """As ``CheckpointFormat``: what the scales say, which the codes must fill."""
        return self._measured(arrays)[0]

    def _measured(self, arrays: Stored) -> tuple[tuple[int, int], int]:
        """The shape, and the bits of its codes."""
        packed, scales, biases = (matrix_of(arrays, suffix) for suffix in self.suffixes)
        outputs, inputs = len(packed), scales.shape[1] * self.group_size
        bits = next((bits for bits in BITS if packed.shape[1] * 32 == inputs * bits), None)
        if bits is None or len(scales) != outputs or biases.shape != scales.shape:
            raise ValueError(
                f"weight of shape {packed.shape}, scales of {scales.shape} and biases of {biases.shape}, which no "
                f"number of bits in groups of {self.group_size} explains"
            )
        return (outputs, inputs), bits

    def decode(self, arrays: Stored) -> F32:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels import biased
        from bitladder.kernels.packing import unpack

        (_, inputs), bits = self._measured(arrays)
        if arrays["weight"].dtype != np.uint32:
            raise ValueError(f"codes of type {arrays['weight'].dtype}, expected u32")
        codes = unpack(np.ascontiguousarray(arrays["weight"]).view(np.int32), bits, inputs)
        scales, biases = arrays["scales"].astype(np.float32), arrays["biases"].astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # of a damaged file: whoever reads it looks for them
            return biased.decode(codes, scales, biases, self.group_size)


@dataclass(frozen=True)
class _Mode:
    bits: int
    group_size: int
    kind: str
    """Of codes: a name in ``kernels/minifloat_scales.py``."""


_MODES = {"mxfp4": _Mode(4, 32, "E2M1"), "mxfp8": _Mode(8, 32, "E4M3"), "nvfp4": _Mode(4, 16, "E2M1")}
_NVFP4_MOST = 6.0 * 448.0
"""Without a scale for the matrix: the largest step times the largest scale."""
_AROUND = tuple(range(-4, 7))
"""Codes of nvfp4's scales to try, from two thirds to 1.7 times what just holds the largest weight of a group."""


@dataclass(frozen=True)
class MlxFloat(MlxFormat):
    """Floats of four or eight bits, with a scale of eight for each group; codes are chosen with error feedback."""

    mode: str = "mxfp4"
    bits: int = 4
    group_size: int = 32

    grammar: ClassVar[str] = "MLX-{mxfp4,mxfp8,nvfp4}"
    about: ClassVar[str] = (
        "Floating point of 4 or 8 bits in groups of 16 or 32 that share a scale, embedding and head included. "
        "For mlx-lm on Apple silicon, and for models that were trained so."
    )
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "scales")

    @classmethod
    def in_mode(cls, mode: str) -> MlxFloat:
        """The format of a mode that is known."""
        return cls(mode=mode, bits=_MODES[mode].bits, group_size=_MODES[mode].group_size)

    @classmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """``MLX-mxfp4``."""
        prefix, _, mode = name.partition("-")
        if prefix.upper() != "MLX" or mode.lower() not in _MODES:
            return None
        return CheckpointLevel(f"MLX-{mode.lower()}", cls.in_mode(mode.lower()), GPTQ)

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> MlxFloat | None:
        """As ``CheckpointFormat``: one mode for all layers."""
        mode = configuration.get("mode")
        apart = [entry for entry in configuration.values() if isinstance(entry, Mapping)]
        if not isinstance(mode, str) or mode not in _MODES or not _is_scheme(configuration, mode):
            return None
        form = cls.in_mode(mode)
        same = [{**configuration, **one} for one in (configuration, *apart)]
        return form if all(form._scheme().items() <= _plain(one).items() for one in same) else None

    @property
    def bpw(self) -> float:
        """As ``CheckpointFormat``."""
        return self.bits + 8 / self.group_size

    @property
    def stand_in(self) -> str:
        """The block format with as many bits."""
        return "Q4_0" if self.bits == 4 else "Q8_0"

    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """As ``CheckpointFormat``."""
        return outputs * (inputs * self.bits // 8 + inputs // self.group_size)

    def search(
        self,
        weights: F32,
        importance: F32 | None,
        *,
        scale_dtype: str = "float16",  # noqa: ARG002
        quick: bool = False,
    ) -> FloatScales:
        """As ``CheckpointFormat``: the plain power of two or a neighbour, or of nvfp4 any scale near the plain one
        (``kernels/minifloat_scales.py``)."""
        from bitladder.kernels import minifloat_scales as scales

        if self.mode == "nvfp4":
            largest = max(float(weights.max(initial=0)), -float(weights.min(initial=0)))
            if largest > _NVFP4_MOST:
                raise ValueError(f"a weight of {largest:g}; nvfp4 ends at {_NVFP4_MOST:g}")
            found, _ = scales.two_levels(weights, self.group_size, importance, 1.0, around=(0,) if quick else _AROUND)
            return found
        kind = scales.E2M1 if _MODES[self.mode].kind == "E2M1" else scales.E4M3
        return scales.powers_of_two(weights, kind, self.group_size, importance)

    def encode(self, codes: npt.NDArray[np.integer], parameters: FloatScales) -> Arrays:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels import minifloats

        assert parameters.codes is not None
        stored = parameters.stored(codes)
        packed = minifloats.pair(stored) if self.bits == 4 else np.ascontiguousarray(stored)
        return {"weight": packed.view("<u4"), "scales": parameters.codes}

    def shape(self, arrays: Stored) -> tuple[int, int]:
        """As ``CheckpointFormat``."""
        outputs, across = matrix_of(arrays, "weight").shape
        return outputs, across * 32 // self.bits

    def decode(self, arrays: Stored) -> F32:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels import minifloats

        shape, packed, scales = self.shape(arrays), arrays["weight"], matrix_of(arrays, "scales")
        if packed.dtype != np.uint32 or scales.dtype != np.uint8:
            raise ValueError(f"codes of type {packed.dtype} and scales of type {scales.dtype}, expected u32 and u8")
        raw = np.ascontiguousarray(packed).view(np.uint8)
        values = minifloats.e2m1_pairs(raw) if self.bits == 4 else minifloats.e4m3(raw)
        held = minifloats.e4m3(scales) if self.mode == "nvfp4" else minifloats.e8m0(scales)
        return np.asarray(values * minifloats.spread(held, shape, (1, self.group_size)), np.float32)

    def notes(self) -> tuple[str, ...]:
        """What is to be known of its scales."""
        if self.mode == "nvfp4":
            return (
                *super().notes(),
                "MLX's nvfp4 has no scale for the whole matrix, so small weights meet E4M3's coarsest steps: "
                "MLX-4bit-g64 is as large and loses less.",
            )
        return super().notes()


def format_of(configuration: Mapping[str, Any], *, has_biases: bool) -> MlxFormat | None:
    """The format of one matrix of a folder with this ``quantization``, whose layers may differ; None where it says
    nothing that is known."""
    if has_biases:
        size = configuration.get("group_size")
        return MlxAffine(group_size=size) if type(size) is int and size in GROUP_SIZES else None
    mode = configuration.get("mode")
    return MlxFloat.in_mode(mode) if isinstance(mode, str) and mode in _MODES else None


def _positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are rotated in the keys that mlx-lm's models read. transformers from 5 on has them together, as
    ``rope_parameters``, and a model that does not look there would rotate by its default base."""
    found = config.get("rope_parameters")
    if not isinstance(found, Mapping):
        return {}
    own: dict[str, Any] = {}
    if isinstance(whole := found.get("full_attention"), Mapping):  # layers with windows have a base of their own
        sliding = found.get("sliding_attention")
        if isinstance(sliding, Mapping):
            own["rope_local_base_freq"] = sliding.get("rope_theta")
        found = whole
    own |= {key: found.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    kind = found.get("rope_type", "default")
    if kind != "default":
        scaling = {key: value for key, value in found.items() if key not in own}
        own["rope_scaling"] = {**scaling, "type": kind}
    return {key: value for key, value in own.items() if value is not None and config.get(key) is None}


def _plain(scheme: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scheme.items() if not isinstance(value, Mapping)}


def _is_scheme(configuration: Mapping[str, Any], mode: str) -> bool:
    """Whether it is one of MLX's, of this mode; other formats have words of their own for what made them."""
    return "quant_method" not in configuration and configuration.get("mode", _AFFINE) == mode


def _fitting(shapes: Mapping[str, tuple[int, int]]) -> str:
    """Levels that hold all of these, for messages."""
    rows = [inputs for _, inputs in shapes.values()]
    names = [f"MLX-4bit-g{size}" for size in GROUP_SIZES if all(row % size == 0 for row in rows)]
    names += [f"MLX-{mode}" for mode, own in _MODES.items() if all(row % own.group_size == 0 for row in rows)]
    return ", ".join(names) or "none; GGUF levels take every row"
