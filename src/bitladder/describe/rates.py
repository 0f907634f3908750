"""How fast a machine is at what a language model does: figures that the engine was measured at, or that
stand in for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bitladder.formats.blocks import QTYPES
from bitladder.units import Basis


@dataclass(frozen=True)
class PoolRates:
    """One memory pool (a GPU's memory, or RAM with its cores) and what works on it.

    ``source``: measured where the engine ran here, derived from a data sheet's figures, or assumed.
    """

    stream: Mapping[str, float]
    """qtype -> bytes of weights per second while decoding, all cores, in matrices with long rows. Decoding
    reads every weight once per token.
    """
    matmul: Mapping[str, float]
    """qtype -> multiply-adds times two per second while a prompt is computed, in matrices with long rows."""
    kv_stream: float
    """Bytes of KV cache per second while decoding."""
    attention: float
    """Operations per second of attention while a prompt is computed."""
    layer_s: float
    """Seconds a layer costs beyond its bytes: starting and joining the work of all cores."""
    token_s: float
    """Seconds a token costs beyond its layers: sampling, server, bookkeeping."""
    prompt_s: float
    """Seconds a prompt costs beyond its arithmetic."""
    source: Basis
    row_s: Mapping[str, float] = field(default_factory=dict)
    """qtype -> seconds that a row of a matrix costs beyond its bytes, decoding: rows of small models are short."""
    prompt_row_s: Mapping[str, float] = field(default_factory=dict)
    """The same per row and token of a prompt."""
    heads_stream: float = 0.0
    """Bytes of 16-bit KV cache per second if each query head's reading counts: on a CPU heads that share keys and
    values do the work of heads that do not. 0 where only bytes count."""
    noise: float = 1.0
    """Factor by which repeats of the same measurement differed: nine in ten were within it of the fastest."""

    def row_of(self, qtype: str) -> float:
        """Seconds of a row beyond its bytes, decoding; of a type that was not measured, the nearest in size."""
        return _nearest(self.row_s, qtype) if self.row_s else 0.0

    def prompt_row_of(self, qtype: str) -> float:
        """Seconds of a row and token of a prompt beyond the arithmetic."""
        return _nearest(self.prompt_row_s, qtype) if self.prompt_row_s else 0.0

    def stream_of(self, qtype: str) -> float:
        """Bytes per second for a qtype; of one that was not measured, that of the nearest in size."""
        return _nearest(self.stream, qtype)

    def matmul_of(self, qtype: str) -> float:
        """Operations per second for a qtype; of one that was not measured, that of the nearest in size."""
        return _nearest(self.matmul, qtype)


@dataclass(frozen=True)
class MeasuredMachine:
    """What ``machine --measure`` found, and where and when."""

    machine: str
    engine: str
    when: str
    """Date and time, UTC, ISO 8601."""
    seconds: float
    """How long measuring took."""
    rates: PoolRates
    ram_read: float
    """Bytes per second that plain reading gets from RAM with all cores."""
    f32_matmul: float
    """Operations per second of a large 32-bit matrix product."""
    disk_read: float
    """Bytes per second from the drive of the cache folder; of the file system's cache if that cannot be
    bypassed.
    """
    gpus: tuple[Mapping[str, float], ...] = field(default=())
    """Per GPU: ``read``, ``f16_matmul`` and ``from_host``, bytes or operations per second."""


def _nearest(table: Mapping[str, float], qtype: str) -> float:
    if qtype in table:
        return table[qtype]
    wanted = QTYPES[qtype].bpw
    return table[min(table, key=lambda name: (abs(QTYPES[name].bpw - wanted), name))]


CPU_EFFICIENCY = 0.75
"""Share of RAM's peak bandwidth that decoding gets with enough cores."""
GPU_EFFICIENCY = 0.70
"""Share of a GPU memory's peak bandwidth that decoding gets."""
MATMUL_EFFICIENCY = 0.45
"""Share of a GPU's peak matrix throughput that computing a prompt gets."""


def from_data_sheet(bandwidth: float, flops: float, *, gpu: bool) -> PoolRates:
    """Rates that a data sheet's peak figures lead one to expect; good to about a third either way."""
    stream = bandwidth * (GPU_EFFICIENCY if gpu else CPU_EFFICIENCY)
    matmul = flops * MATMUL_EFFICIENCY
    return PoolRates(
        stream={"F16": stream},
        matmul={"F16": matmul},
        kv_stream=stream,
        attention=matmul,
        layer_s=15e-6 if gpu else 20e-6,
        token_s=300e-6,
        prompt_s=10e-3,
        source=Basis.DERIVED,
    )
