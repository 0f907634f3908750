"""How codes are chosen, whatever the format that stores them.

A method reads statistics of a matrix's inputs off a calibration text. It may scale input channels first, with the layer
before taking up the inverse (``factors``); then it is ``prepare``d once for each input, and ``apply``'d to every matrix
that reads that input:

    Rounding    nearest codes; needs nothing                         apply
    Smoothing   SmoothQuant's scales, then nearest codes             factors, prepare, apply
    Scaling     AWQ's scales, then nearest codes                     factors, prepare, apply
    Feedback    GPTQ: errors move the codes of later columns         prepare, apply

The grid that codes lie on is the format's (``checkpoints/base.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, TypedDict, Unpack

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bitladder.kernels.gptq import Factor
    from bitladder.kernels.grid import F32
    from bitladder.levels.checkpoints.base import CheckpointFormat, Parameters

_FEWEST_ROWS, _SHARE_OF_ROWS = 256, 4
"""A loss that is only reported comes from every fourth row, or from so many: products cost as much as the search."""


class Statistics(StrEnum):
    """What a method reads off the calibration text."""

    NONE = "none"
    ENERGIES = "energies"
    """Mean squares of every input channel."""
    GRAM = "gram"
    """``X^T X`` of every input, and its largest values."""
    FEEDBACK = "feedback"
    """``X^T X`` of inputs that come through the layers as they were quantized so far: a pass of the level's own."""

    @property
    def needs_text(self) -> bool:
        """Whether what is made depends on a text."""
        return self is not Statistics.NONE


@dataclass(frozen=True)
class Prepared:
    """What a method knows of an input; by itself, nothing."""

    gram: F32 | None = None
    """``X^T X f32[columns, columns]``."""
    factor: Factor | None = None
    added: npt.NDArray[np.float64] | None = None
    """What was added to the diagonal before it was factored, ``f64[columns]``."""
    drift: F32 | None = None
    """As ``Known``."""
    damp: float = 0.0
    """Share of the mean diagonal that was added to the diagonal before it was factored."""
    note: str = ""
    """What went differently than usual."""


@dataclass(frozen=True)
class Rounded:
    """Codes ``i16[rows, columns]``, what turns them into weights, and what they cost on the calibration set."""

    codes: npt.NDArray[np.int16]
    parameters: Parameters
    decoded: F32
    """The weights ``f32[rows, columns]`` as a reader of the file computes them."""
    loss: float
    """Squared error of the outputs as a share of the outputs' energy; NaN without calibration inputs. Without feedback
    it is known from a part of the rows, spread over all."""


class Known(TypedDict, total=False):
    """What else ``Method.prepare`` may be told."""

    tokens: int
    """How many ``gram`` is a sum over; 0, as by default: so many that it is taken as it is."""
    drift: F32 | None
    """``(R - X)^T X f32[columns, columns]`` with R what the source has there; None where that is not known."""
    damp: float
    """Share of the mean diagonal to add to the diagonal where it is factored; 0.05 by default."""
    act_order: bool
    """Handle columns in falling order of their energy where the order matters, as by default."""
    overwrite: bool
    """``gram`` may be used as room, and must not be read again."""


class Method(ABC):
    """How codes are chosen. Subclasses have no state: one object of each serves all levels."""

    statistics: ClassVar[Statistics]
    revision: ClassVar[str] = "2"
    """Raised whenever the bytes of levels, or what is noted of them, change: those made by another are made again."""
    trials: ClassVar[float] = 0.0
    """Roundings of whole matrices that a search for scales takes, with a product of two square matrices each."""
    largest: ClassVar[bool] = False
    """Whether ``factors`` reads the largest magnitude of each channel."""

    widest_drift: ClassVar[int] = 0
    """Columns of the widest inputs that are compared with what the source has there: ``drift`` of ``prepare``."""

    def scales(self, *, into_norm: bool) -> bool:  # noqa: ARG002
        """Whether it scales an input whose inverse goes ``into_norm``, or into a linear layer."""
        return False

    def factors(
        self,
        form: CheckpointFormat,
        gram: F32,
        largest: F32,
        weights: Sequence[F32],
        *,
        tied: npt.NDArray[np.intp] | None = None,
    ) -> F32:
        """What multiplies each channel of an input that it scales, ``f32[columns]``.

        Args:
            form: How the matrices will be stored.
            gram: ``X^T X f32[columns, columns]`` of the input.
            largest: ``f32[columns]``, the largest magnitude of each channel.
            weights: Every matrix ``f32[rows, columns]`` that reads it.
            tied: As in ``kernels.awq.prepare``.
        """
        raise NotImplementedError

    @abstractmethod
    def prepare(self, gram: F32 | None, **known: Unpack[Known]) -> Prepared:
        """What is to be known of an input.

        Args:
            gram: ``X^T X f32[columns, columns]``; None where nothing was seen of it.
            known: As ``Known``; methods that do not factor read nothing of it.

        Raises:
            ValueError: it cannot be factored.
        """

    def importance(self, seen: Prepared) -> F32 | None:  # noqa: ARG002
        """What an error of each column costs where scales are searched, ``f32[columns]``; None: all the same."""
        return None

    @abstractmethod
    def apply(
        self, form: CheckpointFormat, seen: Prepared, weights: F32, *, scale_dtype: str = "float16", device: str = "cpu"
    ) -> Rounded:
        """Quantize ``weights f32[rows, columns]`` that read the input; plainly where nothing was seen of it. Codes with
        feedback are chosen on ``device``.

        Raises:
            ValueError: the weights are too large for the format.
        """


class Rounding(Method):
    """Nearest codes on scales searched with all columns alike: the bytes depend on no text. A Gram matrix, where one is
    at hand, tells the loss."""

    statistics = Statistics.NONE
    _weighs: ClassVar[bool] = False

    def prepare(self, gram: F32 | None, **_: Unpack[Known]) -> Prepared:
        """As ``Method``."""
        return Prepared(gram)

    def apply(
        self,
        form: CheckpointFormat,
        seen: Prepared,
        weights: F32,
        *,
        scale_dtype: str = "float16",
        device: str = "cpu",  # noqa: ARG002
    ) -> Rounded:
        """As ``Method``."""
        return _rounded(form, self.importance(seen), seen.gram, weights, scale_dtype)

    def importance(self, seen: Prepared) -> F32 | None:
        """The inputs' energies, where the method reads a text."""
        return None if seen.gram is None or not self._weighs else _energies(seen.gram)


class Smoothing(Rounding):
    """SmoothQuant: outliers of the inputs move into the weights where a norm comes before; then nearest codes on scales
    searched under the inputs' energies (Xiao et al. 2022, arXiv:2211.10438)."""

    statistics = Statistics.GRAM
    largest = True
    _weighs = True

    def scales(self, *, into_norm: bool) -> bool:
        """Behind norms only."""
        return into_norm

    def factors(
        self,
        form: CheckpointFormat,  # noqa: ARG002
        gram: F32,  # noqa: ARG002
        largest: F32,
        weights: Sequence[F32],
        *,
        tied: npt.NDArray[np.intp] | None = None,
    ) -> F32:
        """As ``Method``."""
        from bitladder.kernels import awq

        return awq.smooth_factors(largest, weights, tied=tied)


class Scaling(Rounding):
    """AWQ: input channels that matter grow, wherever something before can take up the inverse (``kernels/awq.py``);
    then nearest codes on scales searched under the inputs' energies."""

    statistics = Statistics.GRAM
    trials = 12 / 4  # twelve candidates, each on a quarter of the rows
    _weighs = True

    def scales(self, *, into_norm: bool) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def factors(
        self,
        form: CheckpointFormat,
        gram: F32,
        largest: F32,  # noqa: ARG002
        weights: Sequence[F32],
        *,
        tied: npt.NDArray[np.intp] | None = None,
    ) -> F32:
        """As ``Method``, with rounding as the format will do it."""
        from bitladder.kernels import awq

        def round_trip(scaled: F32, importance: F32) -> F32:
            found = form.search(scaled, importance, quick=True)
            return found.decode(found.grid().nearest(scaled))

        trips = [round_trip] * len(weights)
        return awq.prepare(gram, weights, trips, group_size=form.group_size, tied=tied).factors


class Feedback(Method):
    """GPTQ: scales by what an error of each column really costs, codes with error feedback, for weights that make up in
    part for what was lost before them (``kernels/gptq.py``)."""

    statistics = Statistics.FEEDBACK
    widest_drift = 11584  # whose square takes 512 MiB

    def prepare(self, gram: F32 | None, **known: Unpack[Known]) -> Prepared:
        """As ``Method``."""
        import numpy as np

        from bitladder.kernels import gptq

        if gram is None:
            return Prepared()
        seen, tokens, overwrite = np.diagonal(gram).astype(np.float64), known.get("tokens", 0), known.get("overwrite")
        if tokens:
            gram = gram if overwrite else gram.copy()
            gptq.shrink(gram, tokens)
        shrunk = np.diagonal(gram).astype(np.float64)
        damp, act_order = known.get("damp", gptq.DAMP), known.get("act_order", True)
        factor = gptq.prepare(gram, damp=damp, act_order=act_order, overwrite=bool(overwrite) or tokens > 0)
        note = f"Hessian not positive definite: damping raised to {factor.damp:g}" if factor.rescued else ""
        added, drift = shrunk - seen + factor.ridge, known.get("drift")
        return Prepared(factor=factor, added=added, drift=drift, damp=factor.damp, note=note)

    def importance(self, seen: Prepared) -> F32 | None:
        """What an error costs once the columns before are fixed."""
        return None if seen.factor is None else seen.factor.importance

    def apply(
        self, form: CheckpointFormat, seen: Prepared, weights: F32, *, scale_dtype: str = "float16", device: str = "cpu"
    ) -> Rounded:
        """As ``Method``."""
        from bitladder.kernels import gptq, gptq_device

        factor = seen.factor
        if factor is None:
            return _rounded(form, None, None, weights, scale_dtype)
        if seen.drift is not None:
            weights = gptq.making_up(factor, weights, seen.drift)
        parameters = form.search(weights, factor.importance, scale_dtype=scale_dtype)
        codes, cost = gptq_device.apply_on(device)(factor, weights, parameters.grid())
        # Costs are under the damped Hessian; the damping's own share is no error of the outputs.
        decoded = parameters.decode(codes)
        wrong = cost.sum() - _square_sum(decoded, seen.added, weights)
        whole = gptq.cost_of(factor, weights).sum() - _square_sum(weights, seen.added)
        return Rounded(codes, parameters, decoded, max(0.0, float(wrong / whole)) if whole > 0 else float("nan"))


ROUNDING, SMOOTHING, AWQ, GPTQ = Rounding(), Smoothing(), Scaling(), Feedback()


def relative_error(difference: F32, weights: F32, gram: F32) -> float:
    """``tr(D G D^T) / tr(W G W^T)``: how much of the outputs' energy on the calibration set is error."""
    import numpy as np

    whole = float(np.einsum("rk,rk->", weights @ gram, weights, dtype=np.float64))
    wrong = float(np.einsum("rk,rk->", difference @ gram, difference, dtype=np.float64))
    return wrong / whole if whole > 0 else float("nan")


def _rounded(
    form: CheckpointFormat, importance: F32 | None, gram: F32 | None, weights: F32, scale_dtype: str
) -> Rounded:
    """Nearest codes; the loss is known where there is a Gram matrix."""
    import numpy as np

    parameters = form.search(weights, importance, scale_dtype=scale_dtype)
    codes = parameters.nearest(weights)
    decoded = parameters.decode(codes)
    if gram is None:
        return Rounded(codes, parameters, decoded, float("nan"))
    count = min(len(weights), max(_FEWEST_ROWS, len(weights) // _SHARE_OF_ROWS))
    some = np.linspace(0, len(weights) - 1, count).astype(np.intp)
    return Rounded(codes, parameters, decoded, relative_error(decoded[some] - weights[some], weights[some], gram))


def _square_sum(values: F32, by: npt.NDArray[np.float64] | None, less: F32 | None = None) -> float:
    """Of squares, those of each column times ``by``; of differences to ``less``, where there is one."""
    import numpy as np

    squares = np.zeros(values.shape[1])
    for start in range(0, len(values), _FEWEST_ROWS):  # little memory beside the arguments
        some = slice(start, start + _FEWEST_ROWS)
        own = values[some] if less is None else values[some] - less[some]
        squares += np.einsum("rk,rk->k", own, own, dtype=np.float64)
    return float(squares.sum() if by is None else squares @ by)


def _energies(gram: F32) -> F32:
    """The Gram matrix's diagonal, mean 1."""
    import numpy as np

    diagonal = np.diagonal(gram).astype(np.float64)
    return np.asarray(diagonal / max(float(diagonal.mean()), np.finfo(np.float64).tiny), np.float32)
