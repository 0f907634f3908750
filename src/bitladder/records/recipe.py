"""Recipes: which type each tensor gets, what it is predicted to cost, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitladder.records import Real
from bitladder.records.calibration import LinearLoss
from bitladder.records.level_file import LevelFile


@dataclass(frozen=True)
class TensorLoss:
    """What storing one tensor in a type is predicted to add to the mean KL divergence, in nats per token.

    ``plain``: nearest codes under the importance-weighted search. ``fed``: codes chosen with error feedback.
    """

    qtype: str
    bytes: int
    plain: Real
    fed: Real


@dataclass(frozen=True)
class SensitivityTable:
    """Predicted losses of every (tensor, type), and how predictions of whole recipes compare with measurements.

    A recipe's predicted sum ``s`` stands for a measured mean KL of ``scale * s ** power``, fitted to ``checked`` (pairs
    of predicted sum and measured KL of whole recipes on text that the sensitivities never saw). ``error`` is the
    typical relative error of that fit. ``fed`` is the share of that which files with error feedback were measured to
    lose: 1 until one has missed what was asked of it.
    """

    source_sha256: str
    text_hash: str
    tokens: int
    losses: Mapping[str, tuple[TensorLoss, ...]]
    checked: tuple[tuple[Real, Real], ...] = ()
    scale: Real = 1.0
    power: Real = 1.0
    error: Real = float("nan")
    fed: Real = 1.0

    def expected(self, predicted: float, *, feedback: bool = False) -> float:
        """The KL divergence to expect of a recipe whose tensors' losses sum to ``predicted``."""
        share = self.fed if feedback else 1.0
        return float(share * self.scale * predicted**self.power) if predicted > 0 else 0.0

    def needed(self, kl: float, *, feedback: bool = False) -> float:
        """The sum of losses that is expected to give this KL divergence."""
        share = self.fed if feedback else 1.0
        return float((kl / share / self.scale) ** (1 / self.power)) if kl > 0 else 0.0


@dataclass(frozen=True)
class Recipe:
    """A type for every tensor of a model.

    ``label`` names it by what it is (``bpw3.50``); ``limits`` are what it had to keep to, in words. ``expected_kl`` is
    None where nothing was predicted, as for a recipe read off another tool's file.
    """

    label: str
    architecture: str
    qtypes: Mapping[str, str]
    bytes: int
    bpw: Real
    expected_kl: Real | None
    limits: tuple[str, ...] = ()
    feedback: bool = False


@dataclass(frozen=True)
class Tuning:
    """Free numbers of a file (block scales and minima, norms) tuned so that its predictions match the source's.

    ``before`` and ``after`` are mean KL divergences on ``held_out`` tokens of the text to tune on that no step saw;
    the numbers are kept where that fell by more than chance. ``note`` says why less was done than could be.
    """

    kept: bool
    numbers: int
    tokens: int
    held_out: int
    steps: int
    before: Real
    after: Real
    note: str = ""


@dataclass(frozen=True)
class FittedLevel:
    """A file written with error feedback: its recipe, and what each tensor that this run fitted lost on the
    calibration text (none of a file that was there, of a resumed one those after the kill)."""

    file: LevelFile
    recipe: Recipe
    losses: tuple[LinearLoss, ...]
    tokens: int
    """Calibration tokens that the codes were fitted to."""
    method: str = ""
    """How they were chosen, in words that change whenever the bytes may."""
    tuning: Tuning | None = None
    """What came of tuning, if this run did any."""
