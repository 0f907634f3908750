"""The same kernels on torch tensors, so on a GPU: one lane per block, as many lanes as there are blocks.

There is one source for both. The functions of ``affine``, ``scale``, ``pack`` and ``decode`` work on lanes through a
dozen operations (``lanes.py``); here their code runs with torch's operations under the same names, on vectors as long
as the tensor has blocks instead of sixteen. Each operation is one torch call, float32 throughout, in the same order,
so the bytes are the CPU's.

What this gives up: every operation reads and writes GPU memory. A fused kernel would keep a block in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.errors import UsageError
from bitladder.formats.blocks import QTYPES
from bitladder.kernels import affine, decode, lanes, scale
from bitladder.kernels.rows import AFFINE, SCALE, STATE_ROWS, Effort, searches
from bitladder.kernels.sixteen import Sixteen

CHUNK_WEIGHTS = 1 << 24
"""Weights per round: bounds the memory besides the tensors to about 16 bytes times this."""


class Tile:
    """Rows of one value per block, addressed as the lane arrays are: 16 elements a row.

    Storing puts a new tensor in the row's place, so that what was loaded before keeps its value, as in a register.
    """

    def __init__(self, rows: list[torch.Tensor], step: int = lanes.LANES, first: int = 0) -> None:
        self.rows, self.step, self.first = rows, step, first
        self.size = step * len(rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Tile(self.rows, self.step, self.first + index.start // self.step)
        return self.rows[self.first + index // self.step]

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        self.rows[self.first + index // self.step] = value


def _empty(rows: int, like: torch.Tensor) -> Tile:
    return Tile([like] * rows)


def _less(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where(x < y, x, y)


def _greater(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where(x > y, x, y)


def _store_f16(tile: Tile, index: int, x: torch.Tensor) -> None:
    low_high = x.to(torch.float16).view(torch.uint8).reshape(-1, 2)
    tile[index], tile[index + lanes.LANES] = low_high[:, 0], low_high[:, 1]


def _cast(kind: torch.dtype) -> Callable[[Any], Any]:
    return lambda value: value.to(kind) if isinstance(value, torch.Tensor) else value


def _f16_at(data: Tile, at: int, _half: Any) -> torch.Tensor:
    return torch.stack([data[at], data[at + 1]], dim=1).view(torch.float16)[:, 0].to(torch.float32)


def _operations(device: torch.device) -> dict[str, Any]:
    """What the kernels' names for lane operations, casts and tables mean on this device."""
    table = torch.from_numpy(scale.IQ4_VALUES).to(device)
    numbers = {"float32": torch.float32, "int32": torch.int32, "uint8": torch.uint8, "int8": torch.int8}
    return {
        "splat": lambda value: torch.tensor(float(value), dtype=torch.float32, device=device),
        "load": lambda tile, index: tile[index],
        "store": lambda tile, index, x: tile.__setitem__(index, x.expand_as(tile[index])),
        "store_u8": lambda tile, index, x: tile.__setitem__(index, (x.to(torch.int32) & 255).to(torch.uint8)),
        "store_f16": _store_f16,
        "where": torch.where,
        "minimum": _less,
        "maximum": _greater,
        "magnitude": torch.abs,
        "nearest": torch.round,  # ties to even
        "to_f16": lambda x: _greater(_less(x, x.new_tensor(65504.0)), x.new_tensor(-65504.0)).half().float(),
        "f16_at": _f16_at,
        "IQ4_VALUES": _Table(table),
        "np": SimpleNamespace(**{name: _cast(kind) for name, kind in numbers.items()}),
    }


class _Table:
    """Values looked up by a tensor of numbers."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self.values[index.long()]


def _retargeted(function: Any, device: torch.device) -> Callable[..., Any]:
    """The Python code of a compiled function, and of all it calls, over ``_operations``."""
    operations = _operations(device)
    done: dict[Any, Callable[..., Any]] = {}

    def convert(compiled: Any) -> Callable[..., Any]:
        if compiled not in done:
            plain = compiled.py_func
            names = dict(plain.__globals__)
            twin = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
            done[compiled] = twin
            names.update(
                {n: convert(v) for n, v in list(names.items()) if hasattr(v, "py_func") and n not in operations}
            )
            names.update({name: value for name, value in operations.items() if name in names})
        return done[compiled]

    return convert(function)


def quantize(
    weights: torch.Tensor, qtype: str, *, importance: torch.Tensor | None = None, effort: Effort = "good"
) -> torch.Tensor:
    """``kernels.quantize`` for a block format: f32[rows, columns] to uint8[rows, row_bytes], where the weights are.

    Arguments have been checked; ``importance`` is f32[columns] on the same device, its largest entry 1.
    """
    rows, columns = weights.shape
    row = AFFINE.get(qtype) or SCALE[qtype]
    length, type_size = row.parts * row.size, QTYPES[qtype].type_size
    look = searches(row, effort, weighted=importance is not None)
    blocks = weights.reshape(-1, length)
    out = torch.empty(len(blocks), type_size, dtype=torch.uint8, device=weights.device)
    step = max(1, CHUNK_WEIGHTS // columns) * (columns // length)
    encode = _retargeted((affine if qtype in AFFINE else scale).encode, weights.device)
    for start in range(0, len(blocks), step):
        values = blocks[start : start + step].T.clamp(-1e15, 1e15).contiguous()
        if importance is None:
            counted = torch.ones_like(values[:1]).expand(length, -1)
        else:
            counted = importance.reshape(-1, length).T.repeat(1, values.shape[1] * length // columns)
        low, high = (torch.tensor(float(code), device=values.device) for code in (row.low, row.high))
        state = _empty(STATE_ROWS * row.parts, values[0])
        lanes_of = Tile(list(values)), Tile(list(counted)), state, row.parts * lanes.LANES
        tile, codes = _empty(type_size, values[0]), _empty(length, values[0])
        encode(Sixteen(*lanes_of, low, high, row), look, codes, tile)
        out[start : start + step] = torch.stack(tile.rows, dim=1)
    return out.reshape(rows, -1)


def check_device(name: str) -> None:
    """Raises UsageError where torch has no such device here, or none that computes in float64 as sums do."""
    try:
        torch.ones(1, dtype=torch.float64, device=name).sum().item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise UsageError(
            f"torch has no device '{name}' here; there is {', '.join(there)}.",
            means="This machine lacks it, torch was installed without it, or it has another name.",
            do="Name another with --device, or leave it out to compute on the CPU.",
        ) from error


def quantize_array(
    weights: NDArray[np.float32],
    qtype: str,
    importance: NDArray[np.float32] | None,
    effort: Effort,
    device: str,
    out: NDArray[np.uint8],
) -> NDArray[np.uint8]:
    """``quantize`` for arrays in main memory: to the device, and the bytes back. Arguments have been checked."""
    rows, columns = weights.shape
    counted = None if importance is None else torch.from_numpy(importance).to(device)
    step = max(1, CHUNK_WEIGHTS // max(1, columns))
    for start in range(0, rows if columns else 0, step):
        chunk = np.require(weights[start : start + step], np.float32, ["C", "W"])
        part = quantize(torch.from_numpy(chunk).to(device), qtype, importance=counted, effort=effort)
        out[start : start + step] = part.cpu().numpy()
    return out


def dequantize(data: torch.Tensor, qtype: str) -> torch.Tensor:
    """``kernels.dequantize`` for a block format of ``rows.py``: uint8[rows, row_bytes] to f32[rows, columns]."""
    form = QTYPES[qtype]
    blocks = list(data.reshape(-1, form.type_size).T.contiguous())
    out = [blocks[0]] * form.block_size
    # one block for the loops, which is all blocks at once
    _retargeted(decode.DECODERS[qtype], data.device)(Tile(blocks, 1), Tile(out, 1), None)
    return torch.stack(out, dim=1).reshape(data.shape[0], -1)
