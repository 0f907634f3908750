"""What layers pass on beside the hidden states, packed into the states that the walk carries.

Two things occur: an input of each layer's own that depends on the text (Gemma's per-layer embeddings), and a store in
which a layer leaves something for later ones (keys and values that several layers share). Both are laid behind the
hidden states of every token, f32[windows, n, width + more], so that whatever keeps, spills, forks or resumes states
needs to know nothing of them, and gradients pass through them, too. Where layers pass on several streams of hidden
states (Gemma 3n), these lie one behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Place = int | str
"""Of an argument: its number after the hidden states, or its name."""


class LeavesMore(Exception):
    """A layer left something for later ones that nobody carries."""


@dataclass(frozen=True)
class Given:
    """An argument of one layer that depends on the text: its columns of the states, and its axes after windows and
    tokens."""

    place: Place
    start: int
    axes: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Where its columns end."""
        return self.start + math.prod(self.axes)

    def unpacked(self, states: torch.Tensor) -> torch.Tensor:
        """The argument f32[windows, n, ...]."""
        return states[..., self.start : self.stop].reshape(*states.shape[:2], *self.axes)


@dataclass(frozen=True)
class Left:
    """A tensor that a layer leaves in a store f32[windows, heads, n, columns], under a key, in a tuple."""

    option: str
    """The store's name among the arguments."""
    key: Hashable
    number: int
    """Its place in the tuple."""
    start: int
    heads: int
    columns: int
    layers: frozenset[int]
    """Who leaves it."""

    @property
    def stop(self) -> int:
        """Where its columns of the states end."""
        return self.start + self.heads * self.columns

    def unpacked(self, states: torch.Tensor) -> torch.Tensor:
        """As layers read it."""
        own = states[..., self.start : self.stop]
        return own.reshape(*own.shape[:2], self.heads, self.columns).transpose(1, 2)


def packed(value: torch.Tensor) -> torch.Tensor:
    """What layers leave, token by token: f32[windows, n, heads x columns]."""
    return value.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Carried:
    """The columns behind the hidden states. ``width``: of those alone, all streams together."""

    width: int
    streams: int = 0
    """Layers are given f32[streams, windows, n, width / streams]; 0: f32[windows, n, width]."""
    given: tuple[Mapping[int, Given], ...] = ()
    """By layer; one mapping for each argument."""
    left: tuple[Left, ...] = ()

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """The hidden states, as layers are given them."""
        own = states[..., : self.width]
        return own.reshape(*own.shape[:-1], self.streams, -1).movedim(-2, 0) if self.streams else own

    def columns(self, hidden: torch.Tensor) -> torch.Tensor:
        """What ``hidden`` undoes."""
        return hidden.movedim(0, -2).flatten(-2) if self.streams else hidden

    @property
    def total(self) -> int:
        """Columns of the states, hidden states and all else."""
        ends = [one.stop for by_layer in self.given for one in by_layer.values()] + [one.stop for one in self.left]
        return max([self.width, *ends])


def is_store(value: Any) -> bool:
    """What layers could leave something in for later ones."""
    return isinstance(value, MutableMapping)


@dataclass(frozen=True)
class Call:
    """What a decoder layer is called with beside the hidden states, and how it answers."""

    arguments: tuple[Any, ...]
    """Those after the hidden states."""
    options: Mapping[str, Any]
    named: str
    """The name by which hidden states are given; empty where they are the first argument."""
    layer: int = 0
    carried: Carried | None = None

    def __call__(self, block: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """The layer's answer, f32[windows, n, columns] as the states were.

        Raises:
            LeavesMore: the layer left something that nobody knew of.
        """
        carried = self.carried or Carried(states.shape[-1])
        arguments, options = self._given(carried, states)
        stores = {name: type(value)() for name, value in self.options.items() if is_store(value)}
        for name, store in stores.items():
            store.update(self._before(name, carried, states))
        before = {name: dict(store) for name, store in stores.items()}
        options |= stores
        hidden = carried.hidden(states)
        if self.named:
            out = block(*arguments, **{self.named: hidden}, **options)
        else:
            out = block(hidden, *arguments, **options)
        answer: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
        for name, store in stores.items():
            fresh = [key for key, value in store.items() if value is not before[name].get(key)]
            unknown = [key for key in fresh if not any(self._leaves(one, name, key) for one in carried.left)]
            if unknown:
                raise LeavesMore(str(unknown[0])[:40])
        answer = carried.columns(answer)
        return answer if carried.total == carried.width else self._packed(carried, states, answer, stores)

    def _given(self, carried: Carried, states: torch.Tensor) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and options, those that depend on the text from the states."""
        arguments, options = list(self.arguments), dict(self.options)
        for by_layer in carried.given:
            one = by_layer[self.layer]
            if isinstance(one.place, str):
                options[one.place] = one.unpacked(states)
            else:
                arguments[one.place] = one.unpacked(states)
        return arguments, options

    def _packed(
        self, carried: Carried, states: torch.Tensor, answer: torch.Tensor, stores: Mapping[str, Any]
    ) -> torch.Tensor:
        """The states after the layer: its answer, and what it left in the place of what was there."""
        rest, at = [], carried.width
        for left in sorted(carried.left, key=lambda one: one.start):
            if self.layer in left.layers:
                rest += [states[..., at : left.start], packed(stores[left.option][left.key][left.number])]
                at = left.stop
        return torch.cat([answer, *rest, states[..., at:]], dim=-1)

    def _leaves(self, left: Left, option: str, key: Hashable) -> bool:
        return left.option == option and left.key == key and self.layer in left.layers

    def _before(self, option: str, carried: Carried, states: torch.Tensor) -> dict[Hashable, tuple[torch.Tensor, ...]]:
        """What earlier layers left in a store."""
        found: dict[Hashable, list[torch.Tensor]] = {}
        for left in sorted(carried.left, key=lambda one: one.number):
            if left.option == option and min(left.layers) < self.layer:
                found.setdefault(left.key, []).append(left.unpacked(states))
        return {key: tuple(values) for key, values in found.items()}
