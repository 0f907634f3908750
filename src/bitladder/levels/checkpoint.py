"""Checkpoint formats of GPTQ, AWQ and compressed-tensors: names, layouts, packing orders and config keys as
rows.

A Linear computes ``y = W x`` with ``W[N outputs, K inputs]``; a group is ``g`` inputs that share a scale (and
a zero point), ``G = K / g``. A code is an unsigned integer of ``b`` bits and ``W[n, k] = (code - zero) *
scale``. Integers of ``b`` bits lie in int32 words, low bits first:

    layout            codes                        scales              zeros
    gptq, gptq_v2     qweight [K*b/32, N]          scales f16 [G, N]   qzeros [G, N*b/32]; gptq stores zero - 1
    awq               qweight [K, N*b/32] *        scales f16 [G, N]   qzeros [G, N*b/32] *
    pack-quantized    weight_packed [N, K*b/32]    weight_scale [N, G] weight_zero_point [N*b/32, G], asymmetric only
    int-quantized     weight int8 [N, K]           weight_scale [N, 1] none

    * slot i of a word holds output column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bitladder.errors import UnknownLevel, UsageError
from bitladder.levels.kinds import WHOLE_ROW, CheckpointLevel

GROUP_SIZES = (32, 64, 128)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output column of eight sits in slot i of an AWQ word."""


@dataclass(frozen=True)
class Layout:
    """How one quantized Linear is stored. Suffixes follow the module's name; ``zeros`` may be absent from a
    file."""

    name: str
    quant_method: str
    codes: str
    scales: str
    zeros: str
    shape: str
    group_index: str
    order: tuple[int, ...] | None
    zero_shift: int
    """The file stores ``zero - zero_shift``."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Every suffix the layout may use."""
        return tuple(s for s in (self.codes, self.scales, self.zeros, self.shape, self.group_index) if s)


LAYOUTS: dict[str, Layout] = {
    row.name: row
    for row in (
        Layout("gptq", "gptq", "qweight", "scales", "qzeros", "", "g_idx", None, 1),
        Layout("gptq_v2", "gptq", "qweight", "scales", "qzeros", "", "g_idx", None, 0),
        Layout("awq", "awq", "qweight", "scales", "qzeros", "", "", AWQ_ORDER, 0),
        Layout(
            "pack-quantized", "compressed-tensors",
            "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "", None, 0,
        ),
        Layout("int-quantized", "compressed-tensors", "weight", "weight_scale", "", "", "", None, 0),
    )
}  # fmt: skip


GRAMMAR = (
    "GPTQ-{2,3,4,8}bit-{g32,g64,g128,row}[-asym][-ct], AWQ-4bit-{g32,g64,g128}[-sym][-ct], "
    "INT8-W8A16, INT8-W8A8, INT8-W8A8-smooth"
)
_GROUPED = re.compile(r"(GPTQ|AWQ)-([0-9]+)bit-(?:g([0-9]+)|row)((?:-[a-z0-9]+)*)", re.IGNORECASE)
_INT8 = {
    "INT8-W8A16": CheckpointLevel("INT8-W8A16", "INT8", 8, WHOLE_ROW, True, "pack-quantized"),
    "INT8-W8A8": CheckpointLevel("INT8-W8A8", "INT8", 8, WHOLE_ROW, True, "int-quantized", "int8"),
    "INT8-W8A8-SMOOTH": CheckpointLevel(
        "INT8-W8A8-smooth", "INT8", 8, WHOLE_ROW, True, "int-quantized", "int8", smooth=True
    ),
}
_OPTIONS = {"GPTQ": {"asym", "ct", "v2"}, "AWQ": {"sym", "ct"}}


def parse_checkpoint(name: str) -> CheckpointLevel:
    """The level that a name like ``GPTQ-4bit-g64`` or ``INT8-W8A8`` asks for; upper and lower case are the
    same.

    Options: ``-asym``/``-sym`` change the method's default (GPTQ symmetric, AWQ asymmetric), ``-ct`` writes
    compressed-tensors instead of the method's own layout, ``-v2`` GPTQ's second layout.

    Raises:
        UnknownLevel: no such level, or one that no engine can run.
    """
    if (int8 := _INT8.get(name.upper())) is not None:
        return int8
    match = _GROUPED.fullmatch(name)
    if match is None:
        raise UnknownLevel(f"'{name}' is not a checkpoint level.", do=f"Levels look like {GRAMMAR}.")
    method: Literal["GPTQ", "AWQ"] = "GPTQ" if match[1].upper() == "GPTQ" else "AWQ"
    bits, group_size = int(match[2]), int(match[3] or WHOLE_ROW)
    options = [option for option in match[4].lower().split("-") if option]
    _check_level(name, method, bits, group_size, options)
    sym = "asym" not in options if method == "GPTQ" else "sym" in options
    own = "awq" if method == "AWQ" else "gptq_v2" if "v2" in options else "gptq"
    label = "-".join([method, f"{bits}bit", f"g{group_size}" if group_size else "row", *sorted(options)])
    layout = "pack-quantized" if "ct" in options else own
    return CheckpointLevel(label, method, bits, group_size, sym, layout)


def _check_level(name: str, method: str, bits: int, group_size: int, options: list[str]) -> None:
    """Refuse what no reader of these formats understands."""
    if method == "AWQ" and bits != 4:
        raise UnknownLevel(
            f"'{name}' asks for AWQ at {bits} bits.",
            means="Every AWQ kernel of vLLM, transformers and GPTQModel takes 4 bits only; "
            "such a file could not be run.",
            do=f"Ask for GPTQ-{bits}bit-g64, or for {'Q2_K' if bits == 2 else 'Q3_K_M'} with an importance matrix, "
            "which any llama.cpp runs."
            if bits in (2, 3)
            else "Ask for AWQ-4bit-g64.",
        )
    if bits not in (2, 3, 4, 8):
        raise UnknownLevel(f"'{name}' asks for {bits} bits.", do=f"GPTQ has 2, 3, 4 and 8 bits: {GRAMMAR}.")
    if group_size not in (*GROUP_SIZES, WHOLE_ROW) or (method == "AWQ" and group_size == WHOLE_ROW):
        raise UnknownLevel(
            f"'{name}' asks for groups of {group_size or 'a whole row'}.",
            means="The kernels that run such files know groups of 32, 64 and 128"
            + (" and whole rows." if method == "GPTQ" else "."),
            do=f"Levels look like {GRAMMAR}.",
        )
    if unknown := set(options) - _OPTIONS[method]:
        raise UnknownLevel(
            f"'{name}' has an option '{min(unknown)}' that {method} levels do not.",
            do=f"Levels look like {GRAMMAR}.",
        )
    if {"ct", "v2"} <= set(options):
        raise UnknownLevel(f"'{name}' asks for two layouts at once.", do="Keep one of -ct and -v2.")


def stored_bytes(level: CheckpointLevel, outputs: int, inputs: int) -> int:
    """Bytes of one quantized Linear in the file, without its bias; scales in 16 bits."""
    layout = LAYOUTS[level.layout]
    groups = -(-inputs // level.group_size) if level.group_size else 1
    if layout.name == "int-quantized":
        return outputs * inputs + 2 * outputs
    packed, other = (outputs, inputs) if layout.name == "awq" else (inputs, outputs)
    size = 4 * _words(packed, level.bits) * other + 2 * groups * outputs
    if not level.sym or layout.name != "pack-quantized":
        size += 4 * _words(outputs, level.bits) * groups
    if layout.group_index:
        size += 4 * inputs
    return size + (16 if layout.shape else 0)


def _words(count: int, bits: int) -> int:
    """int32 words that hold ``count`` codes."""
    return -(-count * bits // 32)


def check_shapes(level: CheckpointLevel, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a level whose groups or words do not divide the model's Linears.

    Args:
        level: What is asked for.
        shapes: ``(outputs, inputs)`` of every Linear to be quantized, by name.

    Raises:
        UsageError: names the first Linear that does not divide, and the group sizes that divide all.
    """
    fitting = [size for size in GROUP_SIZES if all(inputs % size == 0 for _, inputs in shapes.values())]
    for name, (outputs, inputs) in shapes.items():
        if level.group_size and inputs % level.group_size:
            offers = ", ".join(f"g{size}" for size in fitting) or "none of g32, g64, g128"
            raise UsageError(
                f"{level.name}: {name} has rows of {inputs} weights, which groups of {level.group_size} do not divide.",
                means="Every weight must lie in a full group, or engines read the scales of the wrong one.",
                do=f"Sizes that divide every row of this model: {offers}"
                + ("; GPTQ also takes whole rows (row)." if level.method == "GPTQ" else "."),
            )
        words = 32 if level.bits == 3 else 32 // level.bits
        if level.layout != "int-quantized" and (outputs % words or inputs % words):
            raise UsageError(
                f"{level.name}: {name} is {outputs} x {inputs}, and {words} codes of {level.bits} bits fill its words.",
                means="The layout packs whole words along both axes.",
                do="Choose another number of bits, or a GGUF level.",
            )


def serving_notes(level: CheckpointLevel) -> tuple[str, ...]:
    """What a user should know before building a level: which engines refuse it (as vLLM 0.32 and transformers
    5 behave)."""
    notes = []
    if level.method == "GPTQ" and level.layout != "pack-quantized":
        if level.bits == 8:
            notes.append("vLLM runs 8-bit GPTQ on GPUs only, not on CPUs; Q8_0 is its GGUF twin.")
        if level.bits in (2, 3):
            notes.append(f"vLLM has no kernel for {level.bits}-bit GPTQ; GPTQModel's Torch kernel runs it.")
        if not level.sym:
            notes.append("vLLM refuses asymmetric GPTQ on every platform; transformers with GPTQModel runs it.")
        if level.layout == "gptq_v2":
            notes.append("GPTQ's second layout is read by GPTQModel; others expect the first.")
    if level.layout == "pack-quantized" and level.bits != 4:
        notes.append(
            f"vLLM on CPUs has no {level.bits}-bit weight-only kernel; transformers with compressed-tensors decodes it."
        )
    if level.layout == "pack-quantized" and not level.sym:
        notes.append(
            "transformers with compressed-tensors 0.20 expects zero points unpacked and refuses to load them; "
            "CompressedTensorsConfig(dequantize=True) or version 0.17 reads them, and so does vLLM."
        )
    return tuple(notes)


def quantization_config(
    level: CheckpointLevel, *, ignored: tuple[str, ...], damp_percent: float = 0.01
) -> dict[str, Any]:
    """What ``config.json`` carries as ``quantization_config``; ``ignored`` names the Linears that stay
    float."""
    if level.layout in ("gptq", "gptq_v2"):
        return {
            "bits": level.bits,
            "group_size": level.group_size or -1,
            "sym": level.sym,
            "desc_act": False,
            "static_groups": True,
            "true_sequential": True,
            "damp_percent": damp_percent,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": level.layout,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["bitladder"]},
        }
    if level.layout == "awq":
        return {
            "bits": level.bits,
            "group_size": level.group_size,
            "zero_point": not level.sym,
            "version": "gemm",
            "quant_method": "awq",
            "modules_to_not_convert": list(ignored),
        }
    return _compressed_tensors_config(level, ignored)


def _compressed_tensors_config(level: CheckpointLevel, ignored: tuple[str, ...]) -> dict[str, Any]:
    def arguments(strategy: str, *, dynamic: bool, symmetric: bool) -> dict[str, Any]:
        return {
            "num_bits": level.bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": strategy,
            "group_size": level.group_size if strategy == "group" else None,
            "block_structure": None,
            "dynamic": dynamic,
            "actorder": None,
            "observer": None if dynamic else "minmax",
            "observer_kwargs": {},
        }

    weights = arguments("group" if level.group_size else "channel", dynamic=False, symmetric=level.sym)
    inputs = arguments("token", dynamic=True, symmetric=True) if level.activations == "int8" else None
    return {
        "quant_method": "compressed-tensors",
        "format": level.layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
                "format": level.layout,
            }
        },
    }
