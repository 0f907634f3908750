"""What a comparison of several implementations of one model found, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

HEAD = -1
"""In the place of a layer's number: the norm and the head behind the layers."""


class Implementation(StrEnum):
    """Who computes the model's forward pass."""

    WALK = "walk"
    """Layers one by one, as everything here that measures, calibrates or weighs computes them."""
    TRANSFORMERS = "transformers"
    """transformers' own whole forward pass."""
    ENGINE = "engine"
    """llama.cpp on the file as it runs."""


class Trust(StrEnum):
    """Whether something can be trusted for this model."""

    YES = "yes"
    NO = "no"
    UNCHECKED = "unchecked"
    """Nothing here could be compared with what it rests on."""


@dataclass(frozen=True)
class ComparedSide:
    """One implementation, and why it took no part where it did not."""

    name: Implementation
    how: str
    """Where its layers and weights come from."""
    missing: str = ""
    """Why it cannot be compared; empty where it is."""


@dataclass(frozen=True)
class LayerGap:
    """A layer of one implementation, given what another one has before it, beside what that one has after it. Lengths
    are Euclidean, over the channels of a token's state."""

    layer: int
    """From 0, or ``HEAD``."""
    gap: float
    """Median over tokens: the length of the difference, as a share of what the layer changed."""
    bound: float
    """Median over tokens: how large that may be."""
    outside: float
    """Share of tokens whose difference is larger than it may be."""
    parts: bool
    """More tokens than may be are outside."""


@dataclass(frozen=True)
class ComparedPair:
    """Two implementations on the same tokens."""

    one: Implementation
    other: Implementation
    layers: tuple[LayerGap, ...]
    """Layers of ``one`` on the states of ``other``; empty where those cannot be seen."""
    unseen: str
    """Why there are no layers; empty where there are."""
    bound: str
    """In words, how the bound was set."""
    kl_mean: float
    """KL(other || one) of the next-token distributions of both whole passes, nats per token, over the last tokens."""
    kl_bound: float
    """What decides where no layers are seen; NaN where layers decide."""
    top1: float
    """Share of these tokens whose most likely next token is the same."""
    first: int | None
    """The first layer where they part, or ``HEAD``; None where none does."""
    agrees: bool


@dataclass(frozen=True)
class TrustedPart:
    """One thing that Bitladder does with the model, and whether it can be trusted."""

    what: str
    way: str
    """What it rests on."""
    trust: Trust
    why: str


@dataclass(frozen=True)
class SelfCheck:
    """What was compared, where it parts, and what can be trusted."""

    model: str
    architecture: str
    n_layer: int
    windows: int
    tokens: int
    """Of each window."""
    text: str
    """Where the tokens come from."""
    compared: tuple[ComparedSide, ...]
    comparisons: tuple[ComparedPair, ...]
    trust: tuple[TrustedPart, ...]
    notes: tuple[str, ...]
    """What these tokens cannot show."""
    agrees: bool
    """All that was compared agrees."""
