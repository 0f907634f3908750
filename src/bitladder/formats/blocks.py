"""One row per ``qtype``: how many weights a block holds and which bytes store them, fields in file order.

Everything that counts bytes (file sizes, tensor shapes, bits per weight, memory) derives from these rows, so it cannot
disagree. Field names are ggml's own (ggml-common.h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class QType:
    """A block format. ``type_size`` bytes store ``block_size`` weights that lie side by side in a row."""

    name: str
    ggml_type: int
    block_size: int
    fields: tuple[tuple[str, int], ...]

    @property
    def type_size(self) -> int:
        """Bytes in a block."""
        return sum(size for _, size in self.fields)

    @property
    def bpw(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.type_size / self.block_size

    @property
    def is_quantized(self) -> bool:
        """Whether weights share scales: false for floats and plain integers."""
        return self.block_size > 1

    def offset(self, field: str) -> int:
        """Where a field starts in the block, in bytes."""
        at = 0
        for name, size in self.fields:
            if name == field:
                return at
            at += size
        raise KeyError(field)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of ``columns`` weights.

        Raises:
            ValueError: the row is no whole number of blocks.
        """
        blocks, rest = divmod(columns, self.block_size)
        if rest:
            raise ValueError(
                f"a row of {columns} weights is not a multiple of {self.name}'s block of {self.block_size}"
            )
        return blocks * self.type_size

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor; ``shape`` in numpy order (columns last). Raises as ``row_bytes`` does."""
        if not shape:
            return self.row_bytes(1)
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])


_ROWS = (
    # plain numbers
    QType("F32", 0, 1, (("x", 4),)),
    QType("F16", 1, 1, (("x", 2),)),
    QType("BF16", 30, 1, (("x", 2),)),
    QType("F64", 28, 1, (("x", 8),)),
    QType("I8", 24, 1, (("x", 1),)),
    QType("I16", 25, 1, (("x", 2),)),
    QType("I32", 26, 1, (("x", 4),)),
    QType("I64", 27, 1, (("x", 8),)),
    # blocks of 32: one scale d, for some a minimum m
    QType("Q4_0", 2, 32, (("d", 2), ("qs", 16))),
    QType("Q4_1", 3, 32, (("d", 2), ("m", 2), ("qs", 16))),
    QType("Q5_0", 6, 32, (("d", 2), ("qh", 4), ("qs", 16))),
    QType("Q5_1", 7, 32, (("d", 2), ("m", 2), ("qh", 4), ("qs", 16))),
    QType("Q8_0", 8, 32, (("d", 2), ("qs", 32))),
    QType("Q8_1", 9, 32, (("d", 2), ("s", 2), ("qs", 32))),
    # super-blocks of 256: d (and dmin) scale the small integer scales of sub-blocks
    QType("Q2_K", 10, 256, (("scales", 16), ("qs", 64), ("d", 2), ("dmin", 2))),
    QType("Q3_K", 11, 256, (("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2))),
    QType("Q4_K", 12, 256, (("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128))),
    QType("Q5_K", 13, 256, (("d", 2), ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128))),
    QType("Q6_K", 14, 256, (("ql", 128), ("qh", 64), ("scales", 16), ("d", 2))),
    QType("Q8_K", 15, 256, (("d", 4), ("qs", 256), ("bsums", 32))),
    # codes that index a table of values
    QType("IQ2_XXS", 16, 256, (("d", 2), ("qs", 64))),
    QType("IQ2_XS", 17, 256, (("d", 2), ("qs", 64), ("scales", 8))),
    QType("IQ3_XXS", 18, 256, (("d", 2), ("qs", 96))),
    QType("IQ1_S", 19, 256, (("d", 2), ("qs", 32), ("qh", 16))),
    QType("IQ4_NL", 20, 32, (("d", 2), ("qs", 16))),
    QType("IQ3_S", 21, 256, (("d", 2), ("qs", 64), ("qh", 8), ("signs", 32), ("scales", 4))),
    QType("IQ2_S", 22, 256, (("d", 2), ("qs", 64), ("qh", 8), ("scales", 8))),
    QType("IQ4_XS", 23, 256, (("d", 2), ("scales_h", 2), ("scales_l", 4), ("qs", 128))),
    QType("IQ1_M", 29, 256, (("qs", 32), ("qh", 16), ("scales", 8))),
    QType("TQ1_0", 34, 256, (("qs", 48), ("qh", 4), ("d", 2))),
    QType("TQ2_0", 35, 256, (("qs", 64), ("d", 2))),
    QType("MXFP4", 39, 32, (("e", 1), ("qs", 16))),
    QType("NVFP4", 40, 64, (("d", 4), ("qs", 32))),
    QType("Q1_0", 41, 128, (("d", 2), ("qs", 16))),
)

QTYPES: dict[str, QType] = {row.name: row for row in _ROWS}
QTYPE_BY_NUMBER: dict[int, QType] = {row.ggml_type: row for row in _ROWS}
TRAINED = frozenset({"MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0"})
"""Types on whose grid models are trained or published: such weights lose by any other grid, however fine, and most
levels' types are larger. They are kept unless another type is asked for."""
