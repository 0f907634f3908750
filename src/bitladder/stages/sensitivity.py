"""The table that recipes are chosen from: for every tensor and type, the predicted rise in output KL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitladder import __version__
from bitladder.describe.windows import Window, tokens_hash
from bitladder.errors import BadInput
from bitladder.files.folders import cache_key
from bitladder.files.gguf import GgufFile
from bitladder.formats.blocks import QTYPES
from bitladder.formats.recipes import LOW_CHOICES, is_quantizable, types_for
from bitladder.formats.roles import EMBEDDING, OUTPUT
from bitladder.formats.tensors import TensorInfo
from bitladder.kernels import REVISION, dequantize, quantize
from bitladder.kernels.feedback import REVISION as FEEDBACK_REVISION
from bitladder.kernels.feedback import share_left
from bitladder.levels.methods import GPTQ, Prepared
from bitladder.plan.calibration_text import LEAST_TOKENS
from bitladder.progress import Progress, silent
from bitladder.records import to_json
from bitladder.records.reading import read_json
from bitladder.records.recipe import SensitivityTable, TensorLoss
from bitladder.units import GiB
from bitladder.walk.checkpoint_walk import held_out
from bitladder.walk.driver import Resumable
from bitladder.walk.feedback import FeedbackSettings, factor_of
from bitladder.walk.inputs import InputStatistics, statistics_of
from bitladder.walk.keep import Arrays, Keep
from bitladder.walk.made import FEW_TOKENS, naming
from bitladder.walk.opened import layered
from bitladder.walk.products import wants_half_products
from bitladder.walk.sensitivity import (
    Curvatures,
    EmbeddingSensitivity,
    HeadCurvature,
    Sensitivity,
    SensitivityPass,
    embedding_curvature,
)
from bitladder.walk.states import batches_of
from bitladder.walk.weights import FileWeights

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

ROWS, _MATRICES = 512, 8
"""Rows of a matrix, and matrices of a stack, that stand for all: their mean error is known to a percent."""
FEW_ROWS = 64
"""The same where encoding a row takes fifty times as long, or codes are chosen with feedback."""
MADE_BY = (__version__, REVISION, FEEDBACK_REVISION)
"""What tables of losses depend on beside model, text and choices."""
_LOSSES = "losses"
"""Among arrays that are kept, beside importances by the names of their tensors."""


class SeenInput:
    """What a calibration text says of an input: its statistics, and what methods make of its Hessian, once each."""

    def __init__(self, name: str, statistics: InputStatistics, held_out: float = 0.0) -> None:
        """``name``: a tensor that reads it, told where its Hessian cannot be factored. ``held_out``: the share of the
        tokens that ``statistics.held_out`` is of."""
        self._name, self.statistics = name, statistics
        self._held_out = held_out if len(statistics.held_out) else 0.0

    @cached_property
    def pivots(self) -> NDArray[np.float64]:
        """What an error of each column costs per token once later columns make up for it, f64[columns]."""
        _, factor = factor_of(self._name, self.statistics, FeedbackSettings())
        return np.asarray(factor.pivots[np.argsort(factor.order)] / self.statistics.tokens)

    @cached_property
    def prepared(self) -> Prepared:
        """What writers of checkpoints would know of it from the tokens that are not held out; nothing where they round
        to nearest for want of tokens.

        Raises:
            BadWeights: the Hessian cannot be factored.
        """
        seen = self.statistics
        if seen.tokens < FEW_TOKENS:
            return Prepared()
        with naming(None, self._name):
            return GPTQ.prepare(seen.gram - seen.held_out if self._held_out else seen.gram)

    def costs(self, wrong: F32) -> NDArray[np.float64]:
        """Squared error f64[rows] per token of the outputs of rows that are off by f32[rows, columns] and were fitted
        to what ``prepared`` knows, as they would have been to more text: the mean of what they lose there and on what
        was held out, since one is too low and the other too high by about as much (as of a regression: Mallows 1973,
        Technometrics 15)."""
        seen, share = self.statistics, self._held_out
        along = np.einsum("rk,rk->r", wrong @ seen.gram, wrong, dtype=np.float64) / seen.tokens
        if not share:
            return np.asarray(along)
        apart = np.einsum("rk,rk->r", wrong @ seen.held_out, wrong, dtype=np.float64) / seen.tokens
        return np.asarray(((along - apart) / (1 - share) + apart / share) / 2)


class Choices(Protocol):
    """What tensors may be stored as, and with what errors."""

    @property
    def key(self) -> str:
        """What tells tables over different choices apart; empty for the block types of GGUF files."""

    @property
    def by_head(self) -> bool:
        """Whether codes are chosen with what errors of a head's rows cost together."""

    @property
    def holds_out(self) -> bool:
        """Whether ``fed`` is measured: on a half of the text that the other half's codes were not fitted to."""

    def of(self, info: TensorInfo) -> tuple[str, ...]:
        """Names of what a tensor may become; none where it stays as it is."""

    def rows(self, choice: str) -> int:
        """How many rows of a matrix stand for all: fewer where encoding takes long."""

    def nbytes(self, info: TensorInfo, choice: str) -> int:
        """Bytes of a tensor as one of them."""

    def errors(self, weights: F32, choice: str, importance: F32, threads: int) -> NDArray[np.float64]:
        """Squared errors f64[rows, columns] of a quick encoding of some rows, codes to nearest."""

    def fed(self, weights: F32, choice: str, errors: NDArray[np.float64], seen: SeenInput) -> NDArray[np.float64]:
        """Squared error f64[rows] of each row's outputs, per token, once codes are chosen with feedback; ``errors``: as
        ``errors`` gave them."""


class BlockTypes:
    """``Choices`` of GGUF recipes; ``low``: codebook types among them."""

    holds_out = False
    by_head = True

    def __init__(self, *, low: bool = False) -> None:
        self._low, self.key = low, "codebooks" if low else ""

    def of(self, info: TensorInfo) -> tuple[str, ...]:
        """As ``Choices``."""
        return types_for(info, low=self._low) if is_quantizable(info) else ()

    def rows(self, choice: str) -> int:
        """As ``Choices``."""
        return FEW_ROWS if choice in LOW_CHOICES else ROWS

    def nbytes(self, info: TensorInfo, choice: str) -> int:
        """As ``Choices``."""
        return QTYPES[choice].nbytes(info.shape)

    def errors(self, weights: F32, choice: str, importance: F32, threads: int) -> NDArray[np.float64]:
        """As ``Choices``."""
        data = quantize(weights, choice, importance=importance, effort="fast", threads=threads)
        return np.asarray((dequantize(data, choice, threads=threads) - weights).astype(np.float64) ** 2)

    def fed(
        self,
        weights: F32,  # noqa: ARG002
        choice: str,  # noqa: ARG002
        errors: NDArray[np.float64],
        seen: SeenInput,
    ) -> NDArray[np.float64]:
        """As ``Choices``: errors as large as without feedback, each of which later columns make up for in part."""
        return np.asarray(errors @ seen.pivots)


BLOCK_TYPES = BlockTypes()


@dataclass(frozen=True)
class Weighed:
    """Predicted losses, and the mean squares of each tensor's inputs as quantizers take them: f32[columns], or
    f32[matrices, columns] for a stack. ``curvatures``: if they were found, which are not those of a call that went on
    from a killed one's gradients; ``half``: whether passes multiplied in bfloat16."""

    table: SensitivityTable
    importance: Mapping[str, F32]
    curvatures: Curvatures | None
    half: bool


def sensitivity_table(source: GgufFile, windows: Sequence[Window], *, threads: int = 1) -> SensitivityTable:
    """The table of ``weigh`` alone."""
    return weigh(source, windows, threads=threads).table


def weigh(
    source: GgufFile,
    windows: Sequence[Window],
    *,
    threads: int = 1,
    device: str = "cpu",
    state_bytes: int = GiB,
    spill: Path | None = None,
    keep: Path | None = None,
    progress: Progress = silent,
    half: bool | None = None,
    choices: Choices = BLOCK_TYPES,
) -> Weighed:
    """Predict what every (tensor, type) costs, not yet compared with measurements.

    Args:
        source: the model.
        windows: calibration text; a few thousand tokens do, since a row's weight is a mean over all of them.
        threads: for quantizing.
        device: where arithmetic happens, as torch names it.
        state_bytes: hidden states beyond this go to a file in ``spill``.
        spill: a folder; the system's for temporary files by default.
        keep: a folder in which a killed call leaves its gradients and what it knows; one over the same model and text
            goes on from there, and removes them at its end. None keeps nothing.
        progress: told after each layer.
        half: whether to multiply in bfloat16; None: where the processor can.
        choices: what tensors may be stored as.

    Raises:
        BadInput: too little text.
        BadFile, BadWeights, UnknownArchitecture: the model cannot be walked.
        OutputError: no room for hidden states.
    """
    tokens = sum(len(window.tokens) for window in windows)
    if tokens < LEAST_TOKENS:
        raise BadInput(
            f"The calibration text has {tokens} tokens; at least {LEAST_TOKENS} are needed to weigh tensors.",
            means="Sensitivities of so few tokens describe the text and not the model.",
            do="Give a longer text, or leave it out to use the one that ships.",
        )
    weights = FileWeights(source, threads=threads)
    model = layered(source, weights, device=device)
    batches = batches_of(windows)
    half = wants_half_products(half, device)
    own = (choices.key,) if choices.key else ()
    key = cache_key("weigh", type(model).__name__, *MADE_BY, source.sha256, tokens_hash(windows), str(half), *own)
    apart = held_out(windows) if choices.holds_out else frozenset()
    table = _Table(source, weights, choices, threads, sum(len(windows[at].tokens) for at in apart) / tokens)
    passes = SensitivityPass(
        model,
        weights,
        batches,
        state_bytes=state_bytes,
        spill=spill,
        half=half,
        keep=Keep(keep, key) if keep else None,
        results=table,
        held_out=apart,
    )
    passes.run(table.take, progress)
    curvatures = None if table.curvature is None or table.resumed else Curvatures(table.curvature, table.heads)
    losses = {name: tuple(own.values()) for name, own in table.losses.items()}
    weighed = SensitivityTable(source.sha256, tokens_hash(windows), tokens, losses)
    return Weighed(weighed, table.importance, curvatures, half)


class _Table(Resumable):
    """Losses of every tensor and type, and importances, as sensitivities come in."""

    def __init__(self, source: GgufFile, weights: FileWeights, choices: Choices, threads: int, held_out: float) -> None:
        self._tensors = {info.name: info for info in source.model.tensors if is_quantizable(info)}
        self._weights, self._choices, self._threads, self._inputs = weights, choices, threads, _Inputs(held_out)
        self._head: Sensitivity | None = None
        self.losses: dict[str, dict[str, TensorLoss]] = {}
        self.importance: dict[str, F32] = {}
        self.curvature: F64 | None = None
        """Of the embedding; None where gradients went on from those of a killed call."""
        self.heads: dict[str, F32] = {}
        self._left: dict[str, float] = {}
        """Of what tensors lose, once rows of a head make up for one another; first tokens lose what they did."""
        self.resumed = False

    def take(self, sensitivity: Sensitivity | EmbeddingSensitivity | HeadCurvature) -> None:
        """Add one tensor's."""
        if isinstance(sensitivity, HeadCurvature):
            self.heads[sensitivity.name] = sensitivity.blocks
            if self._choices.by_head:
                left = sensitivity.first + (1 - sensitivity.first) * share_left(sensitivity.blocks)
                self._left[sensitivity.name] = left
            return
        name = EMBEDDING if isinstance(sensitivity, EmbeddingSensitivity) else sensitivity.name
        if name not in self._tensors:
            return
        info = self._tensors[name]
        losses = (
            _of_embedding(info, self._weights, sensitivity, self._choices, self._threads)
            if isinstance(sensitivity, EmbeddingSensitivity)
            else _of_matrix(info, self._weights, sensitivity, self._inputs, self._choices, self._threads)
        )
        if isinstance(sensitivity, Sensitivity) and name in self._left:
            losses = {qtype: replace(one, fed=one.fed * self._left[name]) for qtype, one in losses.items()}
        if isinstance(sensitivity, Sensitivity):
            self.importance[name] = _importance(sensitivity)
            if name in (OUTPUT, EMBEDDING):
                self._head = sensitivity
        elif self._head:
            self.curvature = embedding_curvature(self._head, sensitivity)
        self.losses[name] = _added(self.losses[name], losses) if name in self.losses else losses  # tied: read both ways
        self._weights.forget(name)

    def arrays(self) -> Arrays:
        """As ``Resumable``."""
        losses = {name: tuple(own.values()) for name, own in self.losses.items()}
        return {**self.importance, _LOSSES: np.frombuffer(json.dumps(to_json(losses)).encode(), np.uint8)}

    def resume(self, layers: int, arrays: Arrays) -> None:  # noqa: ARG002
        """As ``Resumable``."""
        self.resumed = True
        self.importance = {name: array for name, array in arrays.items() if name != _LOSSES}
        losses = read_json(dict[str, tuple[TensorLoss, ...]], arrays[_LOSSES].tobytes())
        self.losses = {name: {one.qtype: one for one in own} for name, own in losses.items()}


def _importance(seen: Sensitivity) -> F32:
    """Mean squares of the inputs; those of an expert that no token reached all alike."""
    means = [one.squares / one.tokens if one.tokens else np.ones_like(one.squares) for one in seen.inputs]
    return np.asarray(means[0] if len(means) == 1 else np.stack(means), np.float32)


class _Inputs:
    """The last input; tensors that read the same one come one after another."""

    def __init__(self, held_out: float) -> None:
        """``held_out``: as of ``SeenInput``."""
        self._held_out = held_out
        self._last: SeenInput | None = None

    def of(self, name: str, statistics: InputStatistics) -> SeenInput:
        """That of a tensor."""
        if self._last is None or self._last.statistics is not statistics:
            self._last = SeenInput(name, statistics, self._held_out)
        return self._last


def _of_matrix(
    info: TensorInfo, weights: FileWeights, seen: Sensitivity, known: _Inputs, choices: Choices, threads: int
) -> dict[str, TensorLoss]:
    """Losses of a matrix or a stack of them, from the rows that weigh most and a sample of the others."""
    rows = info.shape[-2]
    matrices = int(np.prod(info.shape[:-2], dtype=int))
    sample = np.unique(np.linspace(0, matrices - 1, min(matrices, _MATRICES)).astype(int))
    totals = {qtype: np.zeros(2) for qtype in choices.of(info)}
    if not totals:
        return {}
    for matrix in sample:
        inputs = seen.inputs[matrix if len(seen.inputs) > 1 else 0]
        if not inputs.tokens:
            continue
        energy = seen.rows[matrix if len(seen.rows) > 1 else 0]
        samples = {count: _sampled(energy, count) for count in {choices.rows(qtype) for qtype in totals}}
        own = {count: weights(info.name, chosen + matrix * rows) for count, (chosen, _) in samples.items()}
        read = known.of(info.name, inputs)
        energies = inputs.squares.astype(np.float32)
        plain = inputs.squares / inputs.tokens
        for qtype, total in totals.items():
            count = choices.rows(qtype)
            error, share = choices.errors(own[count], qtype, energies, threads), samples[count][1]
            total += [share @ (error @ plain), share @ choices.fed(own[count], qtype, error, read)]
    scale = matrices / len(sample) / 2 / seen.predictions
    return {
        qtype: TensorLoss(qtype, choices.nbytes(info, qtype), float(total[0] * scale), float(total[1] * scale))
        for qtype, total in totals.items()
    }


def _sampled(energy: NDArray[np.float64], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows to try, half of them the heaviest, and the weight with which each counts so that all rows are covered."""
    if len(energy) <= count:
        return np.arange(len(energy)), energy
    order = np.argsort(-energy, kind="stable")
    heavy, rest = order[: count // 2], order[count // 2 :]
    spread = rest[np.linspace(0, len(rest) - 1, count // 2).astype(int)]
    stretch = energy[rest].sum() / max(float(energy[spread].sum()), np.finfo(np.float64).tiny)
    chosen = np.concatenate([heavy, spread])
    share = np.concatenate([energy[heavy], energy[spread] * stretch])
    back = np.argsort(chosen)
    return chosen[back], share[back]


def _of_embedding(
    info: TensorInfo, weights: FileWeights, seen: EmbeddingSensitivity, choices: Choices, threads: int
) -> dict[str, TensorLoss]:
    """Losses of the rows that were looked up, each by its own gradients; feedback leaves as large a share of each as it
    leaves under the gradients of all."""
    own = weights(info.name, seen.tokens)
    importance = seen.weights.sum(axis=0).astype(np.float32)
    tokens = int(seen.counts.sum())
    read = SeenInput(info.name, statistics_of(seen.curvature * tokens, tokens))
    losses = {}
    for qtype in choices.of(info):
        wrong = choices.errors(own, qtype, importance, threads)
        loss = float(np.einsum("ij,ij->", seen.weights, wrong)) / 2 / seen.predictions
        plain = seen.counts @ (wrong @ seen.curvature.diagonal())
        share = seen.counts @ choices.fed(own, qtype, wrong, read) / plain if plain else 1.0
        losses[qtype] = TensorLoss(qtype, choices.nbytes(info, qtype), loss, loss * float(min(1.0, share)))
    return losses


def _added(first: Mapping[str, TensorLoss], second: Mapping[str, TensorLoss]) -> dict[str, TensorLoss]:
    return {
        qtype: TensorLoss(qtype, one.bytes, one.plain + second[qtype].plain, one.fed + second[qtype].fed)
        for qtype, one in first.items()
    }
