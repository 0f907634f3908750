"""What formats of integer codes in groups share.

A group is ``g`` inputs that share a scale (and a zero point), ``G = K / g`` groups for K inputs. A code is an unsigned
integer of ``b`` bits, ``W[n, k] = (code - zero) * scale``, and codes lie in int32 words, low bits first
(``kernels/packing.py``).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.errors import UsageError
from bitladder.levels.checkpoints.base import CheckpointFormat
from bitladder.levels.checkpoints.grouped import GROUP_SIZES, SPELLINGS
from bitladder.levels.kinds import WHOLE_ROW

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bitladder.kernels.grid import F32
    from bitladder.kernels.groups import Affine

_QUICK_SHRINKS = (1.0, 0.92, 0.84, 0.75)
"""Enough candidate scales to rank versions of a matrix by; the final search takes all."""
_LARGEST_GROUP = 1 << 20
STAND_INS = {8: "Q8_0", 7: "Q8_0", 6: "Q6_K", 5: "Q5_0", 4: "Q4_0", 3: "Q3_K", 2: "Q2_K"}
"""Block formats with as many bits."""


@dataclass(frozen=True)
class IntegerFormat(CheckpointFormat):
    """Codes of ``bits`` bits, ``group_size`` inputs to a scale (``WHOLE_ROW``: all), zero in the middle of the codes
    (``sym``) or stored."""

    bits: int
    group_size: int = WHOLE_ROW
    sym: bool = True

    packed: ClassVar[bool] = True
    """Codes lie in words, and must fill them along both axes."""
    signed_scales: ClassVar[bool] = True
    """Symmetric scales may be negative."""

    @property
    @abstractmethod
    def stores_zeros(self) -> bool:
        """Whether zero points take room in the file."""

    @property
    def least_zero(self) -> int:
        """The smallest zero point that can be stored."""
        return 0

    @property
    def bpw(self) -> float:
        """As ``CheckpointFormat``; scales of whole rows do not count."""
        if self.group_size == WHOLE_ROW:
            return float(self.bits)
        return self.bits + (16 + (self.bits if self.stores_zeros else 0)) / self.group_size

    @property
    def stand_in(self) -> str:
        """The block format with as many bits."""
        return STAND_INS[self.bits]

    def check_shapes(self, level: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """As ``CheckpointFormat``: groups must divide every row, and codes fill words along both axes."""
        words = 32 // math.gcd(32, self.bits)
        for name, (outputs, inputs) in shapes.items():
            if self.group_size and inputs % self.group_size:
                raise self._undivided(level, name, inputs, shapes)
            if self.packed and (outputs % words or inputs % words):
                raise UsageError(
                    f"{level}: {name} is {outputs} x {inputs}, and {words} codes of {self.bits} bits fill its words.",
                    means="The layout packs whole words along both axes.",
                    do="Choose another number of bits, or a GGUF level.",
                )

    def _undivided(self, level: str, name: str, inputs: int, shapes: Mapping[str, tuple[int, int]]) -> UsageError:
        fitting = [size for size in GROUP_SIZES if all(row % size == 0 for _, row in shapes.values())]
        offers = ", ".join(f"g{size}" for size in fitting) or "none of g32, g64, g128"
        prefix = level.partition("-")[0]
        own = SPELLINGS.get(prefix)
        whole = "; GPTQ also takes whole rows (row)" if own is not None and WHOLE_ROW in own.group_sizes else ""
        if prefix.endswith("A16"):
            whole = "; channel, a scale for each whole row, always fits"
        return UsageError(
            f"{level}: {name} has rows of {inputs} weights, which groups of {self.group_size} do not divide.",
            means="Every weight must lie in a full group, or engines read the scales of the wrong one.",
            do=f"Sizes that divide every row of this model: {offers}{whole}.",
        )

    def search(
        self, weights: F32, importance: F32 | None, *, scale_dtype: str = "float16", quick: bool = False
    ) -> Affine:
        """As ``CheckpointFormat``, over several scales and zeros of each group (``kernels/groups.py``)."""
        import numpy as np

        from bitladder.kernels import groups

        return groups.search(
            weights,
            self.bits,
            self.group_size,
            sym=self.sym,
            importance=importance,
            least_zero=self.least_zero,
            scale_dtype=scale_dtype if self.model_dtype else "float16",
            signed=self.signed_scales,
            shrinks=np.array(_QUICK_SHRINKS, np.float32) if quick else groups.SHRINKS,
        )

    def slow_paths(self, engine: str) -> list[str]:
        """As ``CheckpointFormat``."""
        if self.bits > 3:
            return []
        who = engine or "the engine"
        return [f"{who} has no fast kernel for 2- and 3-bit GPTQ: a GGUF level of that size runs at full speed"]

    def groups_of(self, inputs: int) -> int:
        """How many groups a row of so many weights has."""
        return -(-inputs // self.group_size) if self.group_size else 1

    def weights_of(
        self,
        codes: npt.NDArray[np.integer],
        zeros: npt.NDArray[np.integer],
        scales: F32,
        group: npt.NDArray[np.integer] | None = None,
    ) -> F32:
        """Weights ``f32[rows, columns]`` of codes of that shape, zeros and scales ``[rows, groups]``; ``group``: that
        of each column, where they are not neighbours.

        Raises:
            ValueError: the shapes contradict one another.
        """
        import numpy as np

        from bitladder.kernels.grid import contiguous_groups

        rows, columns = codes.shape
        if self.group_size and columns % self.group_size:
            raise ValueError(f"rows of {columns} weights, which groups of {self.group_size} do not divide")
        for what, found in (("scales", scales), ("zeros", zeros)):
            if found.shape != (rows, self.groups_of(columns)):
                raise ValueError(f"{what} of shape {found.shape}, expected {(rows, self.groups_of(columns))}")
        if group is None:
            group = contiguous_groups(columns, self.group_size)
        elif group.shape != (columns,) or (group.size and not 0 <= group.min() <= group.max() < scales.shape[1]):
            raise ValueError(f"groups of shape {group.shape} for {columns} columns, or numbers that no group has")
        centred = codes.astype(np.int32) - zeros.astype(np.int32)[:, group]
        with np.errstate(invalid="ignore"):  # infinite scales of a damaged file: whoever reads it looks for them
            return np.asarray(centred.astype(np.float32) * scales[:, group])


def group_size_in(configuration: Mapping[str, Any]) -> int | None:
    """What a configuration from outside says of groups, ``WHOLE_ROW`` for -1; None where that is no size."""
    found = configuration.get("group_size")
    if type(found) is not int or not (found == -1 or 0 < found <= _LARGEST_GROUP):
        return None
    return WHOLE_ROW if found == -1 else found


def words(count: int, bits: int) -> int:
    """int32 words that hold ``count`` codes (``kernels.packing.words_for``, which needs arrays)."""
    return -(-count * bits // 32)
