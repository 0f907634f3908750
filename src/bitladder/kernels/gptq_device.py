"""Which of the two twins of GPTQ's rounding a device takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from bitladder.kernels.gptq import Factor, apply
from bitladder.kernels.grid import Grid

F32 = npt.NDArray[np.float32]
Apply = Callable[[Factor, F32, Grid], tuple[npt.NDArray[np.int16], npt.NDArray[np.float64]]]


def apply_on(device: str) -> Apply:
    """``gptq.apply``, or its twin for another device of torch than "cpu"."""
    if device == "cpu":
        return apply
    from bitladder.kernels import gptq_gpu  # torch is heavy, and most runs never need it here

    return partial(gptq_gpu.apply, device=device)
