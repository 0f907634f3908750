"""AWQ's own format ("GEMM"), 4 bits. For N outputs, K inputs and G groups:

    qweight   int32 [K, N/8]    codes, packed along the outputs, in an order of their own
    scales    f16   [G, N]
    qzeros    int32 [G, N/8]    zero points, packed in the same order

Slot i of a word (bits 4i to 4i + 3) holds output column ``8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.levels.checkpoints.base import Arrays, Stored, matrix_of
from bitladder.levels.checkpoints.grouped import SPELLINGS, parse_grouped, widest_group
from bitladder.levels.checkpoints.integers import IntegerFormat, group_size_in, words
from bitladder.levels.kinds import CheckpointLevel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bitladder.kernels.grid import F32
    from bitladder.kernels.groups import Affine

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output column of eight sits in each slot of a word."""


@dataclass(frozen=True)
class Awq(IntegerFormat):
    """AWQ GEMM."""

    prefixes: ClassVar[tuple[str, ...]] = ("AWQ",)
    grammar: ClassVar[str] = SPELLINGS["AWQ"].grammar
    about: ClassVar[str] = (
        "Whole numbers of 4 bits with a scale and a zero point for each group of weights. Before rounding, "
        "input channels with large activations are scaled up, so that they lose less. For GPU servers that "
        "batch requests, as GPTQ; it overfits the calibration text less."
    )
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "scales", "qzeros")
    tunable: ClassVar[tuple[str, ...]] = ("scales",)
    groups_first: ClassVar[bool] = True
    stores_zeros: ClassVar[bool] = True
    layout: ClassVar[str] = "awq"
    kernels: ClassVar[tuple[str, ...]] = ("AWQ",)

    @classmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """``AWQ-4bit-g64[-sym]``."""
        found = parse_grouped(name)
        if found is None or found.prefix != "AWQ" or found.layout:
            return None
        return CheckpointLevel(found.name, cls(found.bits, found.group_size, found.sym), found.method)

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> Awq | None:
        """As ``CheckpointFormat``: 4 bits in the layout "GEMM"."""
        size, zeros = group_size_in(configuration), configuration.get("zero_point", True)
        version = str(configuration.get("version", "gemm")).lower()
        known = configuration.get("quant_method") == "awq" and version == "gemm" and configuration.get("bits") == 4
        if not known or not size or type(zeros) is not bool:
            return None
        return cls(4, size, not zeros)

    @classmethod
    def offers(cls, rows: Collection[int]) -> tuple[str, ...]:
        """The widest groups that divide every row."""
        size = widest_group(rows)
        return () if size is None else (f"AWQ-4bit-g{size}",)

    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """As ``CheckpointFormat``."""
        groups, across = self.groups_of(inputs), words(outputs, self.bits)
        return 4 * across * inputs + 2 * groups * outputs + 4 * across * groups

    def encode(self, codes: npt.NDArray[np.integer], parameters: Affine) -> Arrays:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels.packing import pack

        return {
            "qweight": pack(codes.T, self.bits, ORDER),
            "scales": np.ascontiguousarray(parameters.scales.T).astype(np.float16),
            "qzeros": pack(parameters.zeros.T, self.bits, ORDER),
        }

    def shape(self, arrays: Stored) -> tuple[int, int]:
        """As ``CheckpointFormat``."""
        inputs, across = matrix_of(arrays, "qweight").shape
        return across * 32 // self.bits, inputs

    def decode(self, arrays: Stored) -> F32:
        """As ``CheckpointFormat``."""
        import numpy as np

        from bitladder.kernels.packing import unpack

        outputs, _ = self.shape(arrays)
        codes = unpack(matrix_of(arrays, "qweight"), self.bits, outputs, ORDER).T
        zeros = unpack(matrix_of(arrays, "qzeros"), self.bits, outputs, ORDER).T
        return self.weights_of(codes, zeros, matrix_of(arrays, "scales").T.astype(np.float32))

    def configuration(self, *, ignored: tuple[str, ...]) -> dict[str, Any]:
        """As ``CheckpointFormat``; readers look for the names inside those of layers."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": not self.sym,
            "version": "gemm",
            "quant_method": "awq",
            "modules_to_not_convert": list(ignored),
        }
