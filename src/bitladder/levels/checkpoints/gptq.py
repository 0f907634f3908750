"""GPTQ's own format, as GPTQModel, vLLM and transformers read it. For N outputs, K inputs, G groups and b bits:

    qweight   int32 [K*b/32, N]    codes, packed along the inputs
    scales    f16   [G, N]
    qzeros    int32 [G, N*b/32]    zero points, packed along the outputs; the first version stores zero - 1
    g_idx     int32 [K]            the group of every input

Versions: ``gptq``, and ``gptq_v2`` (``-v2`` in a level's name), which stores zero points as they are. The first cannot
hold a zero of 0: -1 would borrow from its neighbours when a reader adds 1 to the whole word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.levels.checkpoints.base import Arrays, Stored, matrix_of
from bitladder.levels.checkpoints.grouped import SPELLINGS, parse_grouped, widest_group
from bitladder.levels.checkpoints.integers import IntegerFormat, group_size_in, words
from bitladder.levels.kinds import CHECKPOINT_ENGINES, CheckpointLevel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bitladder.kernels.grid import F32
    from bitladder.kernels.groups import Affine

_DAMP_PERCENT = 0.01
"""What the configuration says, for readers that look; the damping of each layer is in the log."""


@dataclass(frozen=True)
class Gptq(IntegerFormat):
    """GPTQ, first or second version."""

    version: int = 1

    prefixes: ClassVar[tuple[str, ...]] = ("GPTQ",)
    grammar: ClassVar[str] = SPELLINGS["GPTQ"].grammar
    about: ClassVar[str] = (
        "Whole numbers of 2, 3, 4 or 8 bits with a scale for each group of weights. Weights are rounded one "
        "input after the other, and those that follow make up for the error, measured on calibration text. "
        "For GPU servers that batch requests; 4 bits are the usual choice, 2 and 3 run slowly or not at all "
        "there."
    )
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "scales", "qzeros", "g_idx")
    tunable: ClassVar[tuple[str, ...]] = ("scales",)
    groups_first: ClassVar[bool] = True
    stores_zeros: ClassVar[bool] = True

    @classmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """``GPTQ-4bit-g64[-asym][-v2]``."""
        found = parse_grouped(name)
        if found is None or found.prefix != "GPTQ" or found.layout not in ("", "v2"):
            return None
        form = cls(found.bits, found.group_size, found.sym, version=2 if found.layout else 1)
        return CheckpointLevel(found.name, form, found.method)

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> Gptq | None:
        """As ``CheckpointFormat``: one number of bits and one group size for all layers, in int32 words."""
        bits, size = configuration.get("bits"), group_size_in(configuration)
        sym, layout = configuration.get("sym", True), configuration.get("checkpoint_format") or "gptq"
        plain = configuration.get("pack_dtype", "int32") == "int32" and not configuration.get("dynamic")
        if configuration.get("quant_method") != "gptq" or not plain or size is None or type(bits) is not int:
            return None
        if bits not in SPELLINGS["GPTQ"].bits or type(sym) is not bool or layout not in ("gptq", "gptq_v2"):
            return None
        return cls(bits, size, sym, version=1 if layout == "gptq" else 2)

    @classmethod
    def offers(cls, rows: Collection[int]) -> tuple[str, ...]:
        """4 bits in the widest groups that divide every row."""
        size = widest_group(rows)
        return () if size is None else (f"GPTQ-4bit-g{size}",)

    @property
    def layout(self) -> str:
        """As ``checkpoint_format`` in the configuration."""
        return "gptq" if self.version == 1 else "gptq_v2"

    @property
    def engines(self) -> tuple[str, ...]:
        """vLLM 0.32, and SGLang with its kernels, have some for symmetric 4 and 8 bits."""
        return tuple(one for one in CHECKPOINT_ENGINES if one not in ("vllm", "sglang") or self._is_usual)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Of the usual ones; others have none to speak of, as ``engines`` says."""
        return ("GPTQ",) if self._is_usual else ()

    @property
    def _is_usual(self) -> bool:
        return self.sym and self.bits in (4, 8)

    @property
    def least_zero(self) -> int:
        """1 in the first version."""
        return self._shift

    @property
    def _shift(self) -> int:
        """The file holds zero points less this."""
        return 1 if self.version == 1 else 0

    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """As ``CheckpointFormat``."""
        groups = self.groups_of(inputs)
        codes, zeros = words(inputs, self.bits) * outputs, words(outputs, self.bits) * groups
        return 4 * codes + 2 * groups * outputs + 4 * zeros + 4 * inputs

    def encode(self, codes: npt.NDArray[np.integer], parameters: Affine) -> Arrays:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels.grid import contiguous_groups
        from bitladder.kernels.packing import pack

        zeros = (parameters.zeros.T - self._shift) & (2**self.bits - 1)
        return {
            "qweight": np.ascontiguousarray(pack(codes, self.bits).T),
            "scales": np.ascontiguousarray(parameters.scales.T).astype(np.float16),
            "qzeros": pack(zeros, self.bits),
            "g_idx": contiguous_groups(codes.shape[1], self.group_size),
        }

    def shape(self, arrays: Stored) -> tuple[int, int]:
        """As ``CheckpointFormat``."""
        rows, outputs = matrix_of(arrays, "qweight").shape
        return outputs, rows * 32 // self.bits

    def decode(self, arrays: Stored) -> F32:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels.packing import unpack

        outputs, inputs = self.shape(arrays)
        codes = unpack(np.ascontiguousarray(matrix_of(arrays, "qweight").T), self.bits, inputs)
        zeros = unpack(matrix_of(arrays, "qzeros"), self.bits, outputs).T.astype(np.int32) + self._shift
        scales = matrix_of(arrays, "scales").T.astype(np.float32)
        return self.weights_of(codes, zeros, scales, arrays.get("g_idx"))

    def configuration(self, *, ignored: tuple[str, ...]) -> dict[str, Any]:  # noqa: ARG002
        """As ``CheckpointFormat``; readers take layers without ``qweight`` for float ones."""
        return {
            "bits": self.bits,
            "group_size": self.group_size or -1,
            "sym": self.sym,
            "desc_act": False,
            "static_groups": True,
            "true_sequential": True,
            "damp_percent": _DAMP_PERCENT,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": self.layout,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["bitladder"]},
        }

    def files(self, configuration: Mapping[str, Any]) -> dict[str, bytes]:
        """Readers also look for the quantization in a file of its own."""
        return {"quantize_config.json": (json.dumps(configuration, indent=2) + "\n").encode()}

    def notes(self) -> tuple[str, ...]:
        """As vLLM 0.32 and transformers 5 behave."""
        notes = []
        if self.bits == 8:
            notes.append("vLLM runs 8-bit GPTQ on GPUs only, not on CPUs; Q8_0 is its GGUF twin.")
        if self.bits in (2, 3):
            notes.append(f"vLLM has no kernel for {self.bits}-bit GPTQ; GPTQModel's Torch kernel runs it.")
        if not self.sym:
            notes.append("vLLM refuses asymmetric GPTQ on every platform; transformers with GPTQModel runs it.")
        if self.version == 2:
            notes.append("GPTQ's second layout is read by GPTQModel; others expect the first.")
        return tuple(notes)
