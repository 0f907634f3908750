"""Rotary position embeddings from a GGUF header: the angle of every pair of dimensions at every position.

The frequencies are theta ** (-2 i / d), changed as the header says:

    linear        divided by the scaling factor
    rope_freqs    divided element by element by a stored tensor (Llama 3's scaling)
    longrope      divided by the stored short factors within the trained context, by the long ones past it (Phi-3)
    yarn          between the plain and the divided frequency by a ramp over i, cosines scaled
                  (Peng et al. 2023, eq. 22-25)

as llama.cpp does in ``ggml_rope_ext``; anything else is refused, because positions would silently be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.errors import BadInput

_YARN_BETA_FAST, _YARN_BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class Rope:
    """Frequencies, float64[d / 2], and the factor on cosines and sines."""

    frequencies: NDArray[np.float64]
    scale: float = 1.0

    def cos_sin(self, n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, f32[1, n, d], for positions 0 to n - 1, each half of d holding the same angles."""
        angles = np.outer(np.arange(n), self.frequencies)
        angles = np.concatenate([angles, angles], axis=-1)[None]
        cos, sin = np.cos(angles) * self.scale, np.sin(angles) * self.scale
        return (
            torch.from_numpy(cos.astype(np.float32)).to(device),
            torch.from_numpy(sin.astype(np.float32)).to(device),
        )


def _yarn(plain: NDArray[np.float64], base: float, factor: float, n_ctx: int, keys: Mapping[str, Any]) -> Rope:
    """Dimensions that turn more than ``beta_fast`` times within the trained context keep their frequency,
    those that turn less than ``beta_slow`` times are divided by ``factor``, a linear ramp between."""
    d = 2 * len(plain)

    def dimension(turns: float) -> float:
        return d * math.log(n_ctx / (turns * 2 * math.pi)) / (2 * math.log(base))

    fast = float(keys.get("rope.scaling.yarn_beta_fast", _YARN_BETA_FAST))
    slow = float(keys.get("rope.scaling.yarn_beta_slow", _YARN_BETA_SLOW))
    low, high = max(0, math.floor(dimension(fast))), min(d - 1, math.ceil(dimension(slow)))
    ramp = np.clip((np.arange(len(plain)) - low) / max(0.001, high - low), 0, 1)
    scale = 1.0 + 0.1 * math.log(factor)
    return Rope(plain * (1 - ramp) + plain / factor * ramp, scale)


def rope_from_header(
    keys: Mapping[str, Any], dims: int, n_window: int, stored: Mapping[str, NDArray[np.float32]]
) -> Rope:
    """The rotary embedding of a model's full-attention layers.

    Args:
        keys: the header's keys without the architecture's prefix.
        dims: rotated dimensions of a head.
        n_window: positions that will be used: chooses between long and short factors.
        stored: the file's own factors, by tensor name (``formats.roles.ROPE_TENSORS``).

    Raises:
        BadInput: a scaling that is not known here.
    """
    base = float(keys.get("rope.freq_base", 10000.0))
    plain = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    kind = keys.get("rope.scaling.type", "none")
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)) or 1.0)
    n_trained = int(keys.get("rope.scaling.original_context_length", keys.get("context_length", n_window)))
    if "rope_factors_short.weight" in stored:
        which = "rope_factors_long.weight" if n_window > n_trained else "rope_factors_short.weight"
        return Rope(plain / stored[which], float(keys.get("rope.scaling.attn_factor", 1.0)))
    if "rope_freqs.weight" in stored:
        plain = plain / stored["rope_freqs.weight"]
    if kind in ("none", "linear") or (kind == "yarn" and factor == 1.0):
        return Rope(plain / (factor if kind != "none" or "rope.scale_linear" in keys else 1.0))
    if kind == "yarn":
        return _yarn(plain, base, factor, n_trained, keys)
    raise BadInput(
        f"The model scales its rotary positions by '{kind}'.",
        means="Known are linear, yarn and stored factors (Llama 3, Phi-3); others would give wrong figures.",
        do="Measure this model through the engine with a workload instead.",
    )
