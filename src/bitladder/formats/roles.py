"""The words that rows of model families are written in: tensors by role, parameters made of them, shared inputs.

Tensors are named by *role*: ``attn_q.weight`` is ``blk.N.attn_q.weight`` of any layer N. A parameter of a
decoder layer is made of one or several roles by a transform that undoes what llama.cpp's converter did. Transforms
are named here and done in ``walk/transforms.py``:

    same         taken as it is
    unpermute    rows of a query or key projection go back from llama.cpp's interleaved rotary order to two
                 halves per head
    minus_one    the converter stored norm + 1, and transformers' layer adds the 1 itself
    row          a vector becomes a matrix of one row
    stack        several matrices one below the other, expert by expert (gate and up of fused experts)

What no row describes, a ``Rearrangement`` does (``walk/correspondence.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

EMBEDDING = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


FACTOR, INPUT_FACTOR = ".scale", ".input_scale"
"""In place of ``.weight``: one number, or one for each expert, that the engine multiplies a matrix's outputs with; and
what an engine with 4-bit products divides its inputs by."""


def factor_name(name: str) -> str:
    """The name of a matrix's factor: ``blk.0.ffn_down.scale`` of ``blk.0.ffn_down.weight``."""
    return name.removesuffix(".weight") + FACTOR


def factored(name: str) -> str:
    """The matrix that a factor belongs to, by its name; "" for any other tensor."""
    end = next((end for end in (INPUT_FACTOR, FACTOR) if name.endswith(end)), None)
    return "" if end is None else name.removesuffix(end) + ".weight"


def layer_tensor(layer: int, role: str) -> str:
    """The GGUF name of a role's tensor in a layer: ``blk.3.attn_q.weight``."""
    return f"blk.{layer}.{role}"


class Rearrangement(Protocol):
    """A transform that no name here describes, found by looking at a file and its checkpoint."""

    @property
    def turned(self) -> bool:
        """The parameter has a column for each output, where the tensors have a row."""

    @property
    def offset(self) -> float:
        """What the tensors have more than the parameter, in every value."""

    def shape_of(self, number: int) -> tuple[int, ...]:
        """That of a tensor."""

    def parameter(self, tensors: Sequence[Any]) -> Any:
        """The parameter, of the tensors in the order of their roles."""

    def tensor(self, number: int, parameter: Any) -> Any:
        """One of the tensors, of the parameter."""

    def per_row(self, number: int, values: Any) -> Any:
        """Values of the parameter's rows, for the rows of a tensor; None where its rows are other things."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a decoder layer: its path in the module, the roles it is made of, the transform that
    makes it."""

    path: str
    roles: tuple[str, ...]
    transform: str | Rearrangement = "same"
    optional: bool = False
    """A bias that transformers' layer has and a file may lack: zeros then."""

    @property
    def turned(self) -> bool:
        """A matrix with a column for each output: inputs meet its axis before the last."""
        return not isinstance(self.transform, str) and self.transform.turned


@dataclass(frozen=True)
class SharedInput:
    """Linear layers that read the same vectors, so that one set of statistics serves them all.

    ``module`` is the module whose first argument is that input. ``kind`` is ``linear`` (its forward's input),
    ``experts_in`` (an expert's share of the input of the fused experts) or ``experts_down`` (what an expert's
    down projection reads). ``absorbs`` is the role whose outputs can be divided by a scale that these layers'
    columns are multiplied by, when there is one: a norm before them, or a linear layer.
    """

    roles: tuple[str, ...]
    module: str
    kind: str = "linear"
    absorbs: str | None = None


@dataclass(frozen=True)
class Stop:
    """Where a pass through a layer may stop and a later one go on: the last linear layer of a part of it.

    What ``module`` reads is kept; the next pass puts its output in place of ``owner``'s, which must do nothing
    after ``module`` but return what it gave (followed by None where ``returns_pair``).
    """

    module: str
    owner: str
    returns_pair: bool = False
