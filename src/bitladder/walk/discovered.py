"""What decoder layers of one kind are made of, found by looking: a row of ``formats/families`` that nobody wrote.

The parameters' order in the file comes from ``correspondence.py``; which linear layers share an input, in which order
inputs are computed, and where a pass may stop, from one run of the layer on noise (``products_seen.py``). What could
take up scales of an input is tried: the layer must give the same after it did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.formats.families.family import LayerKind
from bitladder.formats.roles import Parameter, SharedInput, Stop
from bitladder.walk.correspondence import ParameterLayout
from bitladder.walk.inputs import PRODUCTS
from bitladder.walk.layers import Entry
from bitladder.walk.products_seen import Memory, Product, Products, expert_inputs, memory_of
from bitladder.walk.transforms import offset_of

_TOKENS = 24
NARROW = 32
"""Rows or columns that fill no group of any format."""
_UNCHANGED = 1e-4
"""Share of the largest output by which scales that are taken up may change it in float32."""
ROUTER = "ffn_gate_inp"
"""llama.cpp's name, in all families, for what weighs or chooses experts."""
MadeOf = Mapping[str, tuple[tuple[str, ...], ParameterLayout | str]]
"""By path of a parameter the roles that it is made of, and how."""
Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FoundKind:
    """A kind of layer, and what is known of it beside its row."""

    row: LayerKind
    entries: tuple[Entry, ...]
    routers: tuple[str, ...]
    unseen: tuple[str, ...]
    """Tensors with several columns whose inputs nobody can watch: they are quantized without statistics."""
    kept: tuple[str, ...]
    """Parameters and buffers that no tensor gives back: the checkpoint's own are used."""


@dataclass
class _Looked:
    """What one run showed."""

    products: list[Product] = field(default_factory=list)
    reads: dict[str, list[Memory]] = field(default_factory=dict)
    """By module, what its forward was given first."""
    offered: dict[str, list[Memory]] = field(default_factory=dict)
    """By module, all tensors that its forward was given."""
    gave: dict[str, list[Any]] = field(default_factory=dict)
    """By module, what its forward gave."""
    alive: list[torch.Tensor] = field(default_factory=list)
    """Everything that memory is compared of, so that none is used twice."""


def discover(
    block: nn.Module,
    run: Run,
    width: int,
    made_of: MadeOf,
    value_channels: NDArray[np.intp],
) -> FoundKind:
    """Look at a filled layer.

    Args:
        block: the layer; it is as before afterwards.
        run: runs it on states f32[1, tokens, width].
        width: of hidden states.
        made_of: by path the roles that a parameter is made of, and how.
        value_channels: which value row each input of an output projection comes from, where heads share them.
    """
    states = torch.randn(1, _TOKENS, width, generator=torch.Generator().manual_seed(0))
    looked = _look(block, run, states)
    parameters = tuple(Parameter(path, roles, layout) for path, (roles, layout) in made_of.items())
    inputs, unseen = _inputs(block, looked, made_of)
    routers = tuple(dict.fromkeys(p.path.removesuffix(".weight") for p in parameters if _decides(block, p)))
    trial = _Trial(block, run, states, parameters, routers, value_channels)
    inputs = [trial.absorbed(shared, _before(block, looked, shared)) for shared in inputs]
    stops, entries = _stops(block, looked, inputs)
    held = [path for path, _ in (*block.named_parameters(), *block.named_buffers()) if path in block.state_dict()]
    kept = tuple(path for path in held if path not in made_of)
    return FoundKind(LayerKind(parameters, tuple(inputs), stops), entries, routers, unseen, kept)


def _decides(block: nn.Module, parameter: Parameter) -> bool:
    """A router, or another matrix of a few rows or columns, whose few weights decide much."""
    if parameter.path not in dict(block.named_parameters()) or not parameter.roles[0].endswith(".weight"):
        return False
    shape = block.get_parameter(parameter.path).shape
    narrow = len(shape) == 2 and min(shape) < NARROW
    return narrow or parameter.roles[0].startswith(ROUTER)


def _look(block: nn.Module, run: Run, states: torch.Tensor) -> _Looked:
    looked = _Looked()

    def given(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            for place, one in enumerate((*arguments, *options.values())):
                if isinstance(one, torch.Tensor):
                    looked.alive.append(one)
                    looked.offered.setdefault(path, []).append(memory_of(one))
                    if place == 0 and arguments:
                        looked.reads.setdefault(path, []).append(memory_of(one))

        return hook

    def gave(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            looked.gave.setdefault(path, []).append(out)

        return hook

    with ExitStack() as hooks, torch.no_grad(), Products(block) as products:
        for path, module in block.named_modules():
            if path:
                hooks.callback(module.register_forward_pre_hook(given(path), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(gave(path)).remove)
        run(block, states)
    looked.products = products.seen
    return looked


def _inputs(block: nn.Module, looked: _Looked, made_of: MadeOf) -> tuple[list[SharedInput], tuple[str, ...]]:
    """Inputs in the order they are computed, and the tensors that read what no hook can see."""
    groups: dict[Any, list[Product]] = {}
    for product in looked.products:
        stacked = block.get_parameter(product.path).ndim > 2
        key: Any = product.path if stacked else memory_of(product.x)
        if not any(one.path == product.path for own in groups.values() for one in own):
            groups.setdefault(key, []).append(product)
    inputs, seen = [], set[str]()
    for own in groups.values():
        roles = tuple(dict.fromkeys(role for product in own for role in _kept_roles(product, made_of)))
        owner = own[0].path.rpartition(".")[0]
        if not roles or not owner:
            continue
        kind = _expert_kind(block, own[0])
        if kind == "linear" and memory_of(own[0].x) not in looked.reads.get(owner, []):
            continue
        if kind != "linear" and not looked.reads.get(owner):
            continue
        inputs.append(SharedInput(roles, owner, kind))
        seen.update(roles)
    matrices = [
        role
        for path, parameter in block.named_parameters()
        for role in made_of.get(path, ((), "same"))[0]
        if parameter.ndim > 1 and role.endswith(".weight")
    ]
    return inputs, tuple(role for role in matrices if role not in seen)


def _kept_roles(product: Product, made_of: MadeOf) -> Sequence[str]:
    """The tensors of a parameter whose columns meet its inputs."""
    roles, layout = made_of.get(product.path, ((), "same"))
    if isinstance(layout, str):
        return roles if product.natural else ()
    return [role for at, role in enumerate(roles) if layout.keeps_columns(at, natural=product.natural)]


def _expert_kind(block: nn.Module, product: Product) -> str:
    """How the inputs of a parameter are watched (``walk/inputs.py``)."""
    whole = block.get_parameter(product.path)
    if whole.ndim < 3:
        return "linear"
    owner, _, leaf = product.path.rpartition(".")
    module: Any = block.get_submodule(owner)
    usual = (
        {name for name, _ in module.named_parameters()} == {"gate_up_proj", "down_proj"}
        and callable(getattr(module, "act_fn", None))
        and product.natural
        and product.matrix is not None
        and hasattr(module, "num_experts")
    )
    if usual and _usual_gate(module):
        return "experts_in" if leaf == "gate_up_proj" else "experts_down"
    return f"{PRODUCTS}{leaf}"


def _usual_gate(module: Any) -> bool:
    """Experts that read ``act(gate) * up``, gate first: tried on noise."""
    x = torch.randn(4, module.gate_up_proj.shape[-1], device=module.gate_up_proj.device)
    zeros, ones = torch.zeros(4, 1, dtype=torch.long, device=x.device), torch.ones(4, 1, device=x.device)
    try:
        found = next(expert_inputs(module, "down_proj", (x, zeros, ones), torch.ones(4, dtype=torch.bool)))
    except Exception:  # called in another way than most
        return False
    gate, up = nn.functional.linear(x, module.gate_up_proj[0]).chunk(2, dim=-1)
    own = module.act_fn(gate) * up
    return found.shape == own.shape and bool(torch.allclose(found, own, rtol=1e-5, atol=1e-6))


def _before(block: nn.Module, looked: _Looked, shared: SharedInput) -> list[str]:
    """Modules whose outputs are an input, or could be made of a linear layer's: those that might take up scales."""
    if shared.kind != "linear":
        return []
    product = next((p for p in looked.products if p.path.rpartition(".")[0] == shared.module), None)
    if product is None:
        return []
    norms = [
        path
        for path, outs in looked.gave.items()
        if not list(block.get_submodule(path).children())
        and all(p.ndim < 2 for p in block.get_submodule(path).parameters(recurse=False))
        and list(block.get_submodule(path).parameters(recurse=False))
        and any(isinstance(out, torch.Tensor) and memory_of(out) == memory_of(product.x) for out in outs)
    ]
    linear = [
        path
        for path in dict.fromkeys(one.path.rpartition(".")[0] for one in looked.products)
        if isinstance(block.get_submodule(path), nn.Linear) and path != shared.module
    ]
    return norms or [path for path in linear if path.rpartition(".")[0] == shared.module.rpartition(".")[0]]


class _Trial:
    """Scales tried on a layer: it must give the same with them as without."""

    def __init__(
        self,
        block: nn.Module,
        run: Run,
        states: torch.Tensor,
        parameters: Sequence[Parameter],
        routers: Sequence[str],
        value_channels: NDArray[np.intp],
    ) -> None:
        self._block, self._run, self._states = block, run, states
        self._parameters, self._routers, self._channels = parameters, routers, value_channels
        with torch.no_grad():
            self._plain = run(block, states)

    def absorbed(self, shared: SharedInput, before: Sequence[str]) -> SharedInput:
        """The input, with what can take up scales on it."""
        readers = [
            p.path for p in self._parameters
            if set(p.roles) & set(shared.roles) and p.path.removesuffix(".weight") not in self._routers
        ]  # fmt: skip
        if not readers or any(self._block.get_parameter(path).ndim != 2 for path in readers):
            return shared
        columns = self._inputs_last(readers[0]).shape[-1]
        for path in before:
            own = [p for p in self._parameters if p.path in (f"{path}.weight", f"{path}.bias")]
            weight = next((p for p in own if p.path.endswith(".weight")), None)
            if weight is None or len(weight.roles) != 1 or not weight.roles[0].endswith(".weight"):
                continue
            stem = weight.roles[0].removesuffix(".weight")
            if any(p.roles != (f"{stem}.{p.path.rpartition('.')[2]}",) for p in own):
                continue
            if self._same_with(readers, own, columns, values="v_proj" in path):
                return SharedInput(shared.roles, shared.module, shared.kind, weight.roles[0])
        return shared

    def _inputs_last(self, path: str) -> torch.Tensor:
        """A matrix, or a view of it, with a row for each output."""
        value = self._block.get_parameter(path)
        return value.T if any(p.path == path and p.turned for p in self._parameters) else value

    def _same_with(self, readers: Sequence[str], absorbers: Sequence[Parameter], columns: int, *, values: bool) -> bool:
        rows = self._block.get_parameter(absorbers[0].path).shape[0]
        channels = self._channels if values else np.arange(columns)
        if len(channels) != columns or int(channels.max(initial=-1)) + 1 != rows:
            return False
        scales = torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.5
        device = self._states.device
        changed = {path: self._block.get_parameter(path).detach().clone() for path in readers}
        changed |= {p.path: self._block.get_parameter(p.path).detach().clone() for p in absorbers}
        with torch.no_grad():
            for path in readers:
                self._inputs_last(path).mul_(scales[torch.from_numpy(channels)].to(device))
            for parameter in absorbers:
                own = self._block.get_parameter(parameter.path)
                offset = offset_of(parameter.transform)
                shaped = scales.to(device).reshape(-1, *[1] * (own.ndim - 1))
                own.copy_((own + offset) / shaped - offset)
            out = self._run(self._block, self._states)
            for path, value in changed.items():
                self._block.get_parameter(path).copy_(value)
        return bool((out - self._plain).abs().max() <= _UNCHANGED * self._plain.abs().max())


def _stops(
    block: nn.Module, looked: _Looked, inputs: Sequence[SharedInput]
) -> tuple[tuple[Stop, ...], tuple[Entry, ...]]:
    """Parts of a layer that give what their last linear module gives, and nothing else of them is used."""
    stops, entries = [], []
    watched = {shared.module: shared for shared in inputs if shared.kind == "linear"}
    for owner, module in block.named_children():
        outs = looked.gave.get(owner, [])
        if len(outs) != 1 or not list(module.children()):
            continue
        pair = isinstance(outs[0], tuple)
        first = outs[0][0] if pair else outs[0]
        if (pair and len(outs[0]) != 2) or not isinstance(first, torch.Tensor):
            continue
        for path, shared in watched.items():
            given = looked.gave.get(path, [])
            if not path.startswith(f"{owner}.") or len(given) != 1 or not isinstance(given[0], torch.Tensor):
                continue
            x = next(p.x for p in looked.products if p.path.rpartition(".")[0] == path)
            if x.ndim != 3 or memory_of(given[0]) != memory_of(first) or not torch.equal(given[0], first):
                continue
            stops.append(Stop(shared.module, owner, pair))
            entries.append(Entry(shared.module, owner, _own_norm(block, looked, owner), pair))
    return tuple(stops), tuple(entries)


def _own_norm(block: nn.Module, looked: _Looked, owner: str) -> str | None:
    """The norm that only this part reads: what the part is given first is what the norm gave, which nobody else was
    given."""
    read = looked.offered.get(owner, [])
    for path, _ in block.named_children():
        outs = looked.gave.get(path, [])
        if len(outs) != 1 or not isinstance(outs[0], torch.Tensor) or path == owner:
            continue
        place = memory_of(outs[0])
        readers = {p.partition(".")[0] for p, given in looked.offered.items() if place in given}
        plain = not list(block.get_submodule(path).children())
        if plain and readers == {owner} and place in read:
            return path
    return None
