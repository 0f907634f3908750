"""The ``quantization_config`` of compressed-tensors folders, written and read.

It has groups of layers, each with a *scheme*: how weights are quantized and how engines quantize inputs. In most
folders one group holds every Linear that is not ignored; those of ``mixed.py`` have several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bitladder.errors import UsageError


def scheme_in(configuration: Mapping[str, Any], layout: str, kind: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """How weights and inputs are quantized in a configuration from outside; empty where it is of another layout, its
    weights are of another ``kind`` (``int`` or ``float``), or layers differ."""
    groups = configuration.get("config_groups")
    of_layout = configuration.get("quant_method") == "compressed-tensors" and configuration.get("format") == layout
    if not of_layout or not isinstance(groups, Mapping) or len(groups) != 1:
        return {}, {}
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    inputs = group.get("input_activations") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping | None) or weights.get("type") != kind:
        return {}, {}
    return weights, inputs or {}


def agrees(found: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> bool:
    """Whether a scheme from outside is the one that is written here, by all that decides what codes mean."""
    deciding = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic")
    if wanted is None or not found:
        return wanted is None and not found
    return all(_same(found.get(key, _USUAL.get(key)), wanted[key]) for key in deciding)


_USUAL = {"symmetric": True, "dynamic": False}


def _same(found: object, wanted: object) -> bool:
    return found == wanted and type(found) is type(wanted)


def arguments(
    bits: int,
    strategy: str,
    *,
    kind: str = "int",
    group_size: int | None = None,
    block: tuple[int, int] | None = None,
    dynamic: bool | str = False,
    symmetric: bool = True,
    scale_dtype: str | None = None,
) -> dict[str, Any]:
    """How weights, or inputs, are quantized.

    Args:
        bits: Of a code.
        strategy: What shares a scale: ``channel``, ``group``, ``tensor_group``, ``block``, ``token``.
        kind: ``int`` or ``float``.
        group_size: Values of a row that share one.
        block: Rows and columns that share one.
        dynamic: Scales are found at run time; ``local``: those of groups are, one for all is stored.
        symmetric: Without zero points.
        scale_dtype: torch's name of the type of scales, where it is not the model's.
    """
    found = {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "block_structure": None if block is None else list(block),
        "dynamic": dynamic,
        "actorder": None,
        "observer": "static_minmax" if isinstance(dynamic, str) else None if dynamic else "minmax",
        "observer_kwargs": {},
    }
    return found if scale_dtype is None else found | {"scale_dtype": scale_dtype, "zp_dtype": scale_dtype}


def configuration_of(
    layout: str, ignored: tuple[str, ...], weights: dict[str, Any], inputs: dict[str, Any] | None
) -> dict[str, Any]:
    """The whole of a folder whose layers are alike; ``ignored`` holds whole paths, or patterns where a name is the end
    of one."""
    return whole(layout, ignored_names(ignored), [group(layout, ["Linear"], weights, inputs)])


def ignored_names(ignored: tuple[str, ...]) -> list[str]:
    """Layers that stay float, as configurations name them: whole paths, or patterns where a name is the end of one."""
    return [f"re:.*{re.escape(name)}$" if "." in name else name for name in ignored]


def group(layout: str, targets: list[str], weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """Layers of one scheme: whole paths, patterns after ``re:``, or a class of modules."""
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": layout,
    }


def whole(layout: str, ignore: list[str], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A configuration of some groups."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "config_groups": {f"group_{number}": one for number, one in enumerate(groups)},
    }


def check_groups(level: str, shapes: Mapping[str, tuple[int, int]], group: int) -> None:
    """Refuse matrices ``(outputs, inputs)`` whose rows a type's only size of groups does not divide; raises
    UsageError."""
    for name, (_, inputs) in shapes.items():
        if inputs % group:
            raise UsageError(
                f"{level}: {name} has rows of {inputs} weights, which groups of {group} do not divide.",
                means="The type has no other size of groups.",
                do="Ask for FP8-DYNAMIC or W4A16-channel, which have a scale for each row.",
            )
