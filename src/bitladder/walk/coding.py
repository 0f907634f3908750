"""Choosing the codes of what reads an input: a piece of work of its own, done here or where units are computed.

An input's sums come first, of a stack's experts so many at a time that their Gram matrices stay within `GROUP_BYTES`:
no process ever holds those of hundreds of experts. A coder then chooses the codes of a *share*: some of the matrices
that read one input, or some experts of a stack. How an input's readers are cut into shares changes no byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from bitladder.describe.model import Model
from bitladder.formats.roles import SharedInput, layer_tensor
from bitladder.walk.inputs import InputStatistics
from bitladder.walk.layers import LayeredModel
from bitladder.walk.weights import LevelWeights

GROUP_BYTES = 256 * 1024**2
"""Of the Gram matrices of experts that are summed at a time: enough for 64 experts of 1,024 columns."""


@dataclass(frozen=True)
class Bench:
    """What a coder works with: a model that is open, its weights, and one layer of it."""

    model: LayeredModel
    weights: LevelWeights
    layer: Callable[[], nn.Module]
    threads: int | None = None
    """Of the kernels, where that is not the coder's own; no byte depends on it."""

    @property
    def block(self) -> nn.Module:
        """The layer, which is filled when it is first asked for."""
        return self.layer()


@dataclass(frozen=True)
class Share:
    """Readers of an input that are coded together."""

    readers: range
    """Their places among all that read it."""
    experts: range | None = None
    """Of a stack; None where an input is one for all."""


class Coder(Protocol):
    """Chooses codes of what reads one input of a layer. A value that can be pickled."""

    @property
    def layer(self) -> int:
        """Which layer."""

    @property
    def shared(self) -> SharedInput:
        """Which input."""

    @property
    def readers(self) -> int:
        """How many matrices, or stacks of them, read it."""

    @property
    def reads_peak(self) -> bool:
        """Whether the largest magnitude of the input is asked for, of all experts together."""

    @property
    def piecewise(self) -> bool:
        """Whether ``fill`` takes changes as they come, too, and not only all together."""

    def code(
        self, bench: Bench, share: Share, gathered: Iterator[InputStatistics], peak: float | None
    ) -> tuple[Any, Any]:
        """Code a share.

        Args:
            bench: where. Its block is left as it is found.
            share: of what.
            gathered: what the input looked like, for each expert of the share in turn.
            peak: the largest magnitude of the input.

        Returns:
            What whoever builds the level wants, and a change, for ``fill``.
        """

    def paths(self, model: LayeredModel) -> list[str]:
        """The layer's parameters that ``fill`` changes, and ``code`` reads if it asks for the block."""

    def fill(self, bench: Bench, changes: Sequence[Any]) -> None:
        """Put changes, in the order of their shares, into the block."""


def groups_of(model: Model, layer: int, shared: SharedInput) -> list[range | None]:
    """Experts whose sums are held at a time; one group of None where an input is one for all that read it."""
    if shared.kind == "linear":
        return [None]
    names = {layer_tensor(layer, role) for role in shared.roles}
    stacks = [one.shape for one in model.tensors if one.name in names and len(one.shape) == 3]
    experts, columns = model.dims.n_expert, max((shape[-1] for shape in stacks), default=1)
    at_a_time = max(1, GROUP_BYTES // (4 * columns**2))
    return list(runs(range(experts), -(-experts // at_a_time)))


def runs(numbers: range, count: int) -> Iterator[range]:
    """Numbers cut into so many runs, or fewer where there are fewer, as even as can be."""
    count = max(1, min(count, len(numbers)))
    for number in range(count):
        yield numbers[number * len(numbers) // count : (number + 1) * len(numbers) // count]


def shares_of(readers: int, experts: range | None, count: int) -> list[Share]:
    """What reads an input, of all experts or of these, in so many shares at most."""
    if experts is None:
        return [Share(run) for run in runs(range(readers), count)]
    return [Share(range(readers), run) for run in runs(experts, count)]
