"""What checkpoints call the linear layers of one expert, where transformers holds all experts of a layer in one stack.

Most checkpoints hold them one by one, and levels keep their names. Others hold stacks, too, with a column for each
output or with rows of gate and up in turn; no quantized layout has room for those. The tools that quantize such models
take the stack apart into linear layers ``experts.N.gate_proj``, ``up_proj`` and ``down_proj`` (llm-compressor), which
is what vLLM looks for. Which rows are the gate's is what llama.cpp's converter made ``ffn_gate_exps`` of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bitladder.walk.correspondence import ParameterLayout

F32 = NDArray[np.float32]
_STACKED = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.weight")


def names_on_disk(path: str, value: F32, stored: Mapping[str, F32]) -> tuple[str, ...]:
    """The names on disk of one expert's share of a stack, ``{}`` for its number: equal runs of its rows, in order.

    Args:
        path: of the stack.
        value: f32[experts, rows, columns].
        stored: the layer's tensors as they are on disk, by name.

    Returns:
        None of them where the stack is not there expert by expert.
    """
    names: dict[int, list[tuple[int, str]]] = {}
    for name, one in stored.items():
        if one.ndim != 2 or one.shape[-1] != value.shape[-1] or value.shape[1] % len(one):
            continue
        numbered = [at for at, word in enumerate(name.split(".")) if word.isdigit()]
        if not numbered:
            continue
        expert = int(name.split(".")[numbered[-1]])
        if expert >= len(value):
            continue
        for part in range(value.shape[1] // len(one)):
            if np.array_equal(value[expert, part * len(one) : (part + 1) * len(one)], one):
                words = name.removesuffix(".weight").split(".")
                words[numbered[-1]] = "{}"
                names.setdefault(expert, []).append((part, ".".join(words)))
    shares = {tuple(name for _, name in sorted(own)) for own in names.values()}
    whole = len(names) == len(value) and len(shares) == 1
    return next(iter(shares)) if whole and "{}" not in path else ()


def linear_experts(
    path: str, experts: int, roles: tuple[str, ...], layout: ParameterLayout | str
) -> tuple[tuple[str, ...], bool] | None:
    """The names of the linear layers that one expert of a stack is taken apart into, ``{}`` for its number, in the
    order of their rows; and whether rows belong to them in turn, not in runs.

    Args:
        path: of the stack.
        experts: how many there are.
        roles: of the tensors that it is made of in the file.
        layout: how.

    Returns:
        None where they are no experts, or their rows lie in neither way.
    """
    words = [found[1] for role in roles if (found := _STACKED.fullmatch(role))]
    owner = path.rpartition(".")[0]
    if len(words) != len(roles):
        return None
    names = tuple(f"{owner}.{{}}.{word}_proj" for one in words for word in one.split("_"))
    if isinstance(layout, str):
        return (names, False) if len(roles) == 1 else None
    if len(words) == 1 and len(names) == 2:  # gate above up, as llama.cpp holds the two in one tensor
        part = layout.parts[0]
        return (names, False) if np.array_equal(part.ours, part.theirs) else None
    ways = [
        in_turn
        for in_turn in (False, True)
        if all(
            np.array_equal(part.ours, _rows(experts, len(part.ours), number, len(layout.parts), in_turn=in_turn))
            and np.array_equal(part.theirs, np.arange(len(part.theirs)))
            for number, part in enumerate(layout.parts)
        )
    ]
    return (names, ways[0]) if ways else None


def _rows(experts: int, count: int, number: int, parts: int, *, in_turn: bool) -> NDArray[np.int64]:
    """Which rows of a stack are so many that one of its parts has, expert by expert."""
    share = count // experts
    own = np.arange(share) * parts + number if in_turn else np.arange(share) + number * share
    return (np.arange(experts)[:, None] * share * parts + own).reshape(-1)
