"""What a checkpoint format has to say of itself.

A Linear computes ``y = W x`` with ``W f32[outputs, inputs]``. A format stores it as arrays whose names are the layer's
name and a suffix. The values that weights can take, its *grid*, are the format's own: ``search`` finds scales (and
whatever else belongs to them) for a matrix, a method chooses codes on that grid (``levels/methods.py``), and ``encode``
makes both into arrays:

    weights --search--> Parameters --method--> codes --encode--> arrays --decode--> weights as a reader computes them

An object is the format of one level: it holds bits, group size and the like, is compared by them, and knows nothing of
how codes are chosen. What is said of a whole folder is a ``FolderFormat``; most folders store every layer alike, and
their format is that of each layer, too (``CheckpointFormat``). One that mixes (``mixed.py``) has a format for each.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from bitladder.levels.kinds import CHECKPOINT_ENGINES, WHOLE_ROW

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from bitladder.kernels.grid import F32, Grid
    from bitladder.levels.kinds import CheckpointLevel

Arrays = dict[str, "npt.NDArray[Any]"]
"""Arrays of one linear layer by suffix, to be written."""
Stored = Mapping[str, "npt.NDArray[Any]"]
"""The same, as they were read."""


class Parameters(Protocol):
    """Scales of one matrix, and all else that turns its codes into weights."""

    def grid(self) -> Grid:
        """Where weights can lie, for choosing codes."""

    def nearest(self, weights: F32) -> npt.NDArray[np.int16]:
        """The code of the nearest value for each of ``f32[rows, columns]``."""

    def rows(self, rows: slice) -> Parameters:
        """Those of some rows."""

    def decode(self, codes: npt.NDArray[np.integer]) -> F32:
        """Weights ``f32[rows, columns]`` of codes, exactly as a reader of the file computes them."""


class FolderFormat(ABC):
    """How a checkpoint folder of one level is stored. Subclasses are frozen dataclasses of what may differ."""

    prefixes: ClassVar[tuple[str, ...]]
    """First words of its levels' names, in upper case."""
    grammar: ClassVar[str]
    """What names look like that no other format shows, for messages."""
    about: ClassVar[str] = ""
    """What it is and when to use it, in two or three sentences."""
    float_bytes: ClassVar[int] = 2
    """Bytes of each value of what stays float: embedding, head, norms, biases."""
    everywhere: ClassVar[bool] = False
    """Embedding and head are quantized, too; every array has a row for each output then."""

    @classmethod
    @abstractmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """The level of this format that ``name``, in any case, stands for; None where the name is another format's.

        Raises:
            UnknownLevel: the name is of this format's kind, and no engine could run such a level.
        """

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> FolderFormat | None:  # noqa: ARG003
        """The format of a folder whose ``config.json`` has this ``quantization_config``, whoever wrote it; None where
        it is another, or one that is not read exactly."""
        return None

    @classmethod
    def offers(cls, rows: Collection[int]) -> tuple[str, ...]:  # noqa: ARG003
        """Names of levels that GPUs run fast, for a model whose matrices have ``rows`` of so many weights."""
        return ()

    @abstractmethod
    def of(self, linear: str) -> CheckpointFormat | None:
        """The format of one linear layer, by its whole name on disk; None: it stays float."""

    @property
    @abstractmethod
    def forms(self) -> tuple[CheckpointFormat, ...]:
        """The formats of its linear layers, as far as they are chosen."""

    @property
    def signature(self) -> str:
        """What a folder's bytes depend on beside the level's name; empty where the name says everything."""
        return ""

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines that serve it."""
        return CHECKPOINT_ENGINES

    @property
    def kernels(self) -> tuple[str, ...]:
        """The schemes of ``data/kernels.yaml`` that an engine needs kernels for."""
        return (self.layout,)

    @property
    @abstractmethod
    def layout(self) -> str:
        """What readers call it."""

    @property
    def reads_peaks(self) -> bool:
        """Whether the largest magnitude of an input is stored beside the matrices that read it."""
        return False

    @property
    @abstractmethod
    def bpw(self) -> float:
        """Bits per weight of a layer with long rows, 16-bit scales (and packed zero points) included."""

    @property
    @abstractmethod
    def stand_in(self) -> str:
        """The block format of ``formats/blocks.py`` that formulas for speed take its layers for."""

    @abstractmethod
    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of one layer in the file, without its bias; scales in the float type of the model have 16 bits."""

    def check_shapes(self, level: str, shapes: Mapping[str, tuple[int, int]]) -> None:  # noqa: B027 - most refuse some
        """Refuse a model that cannot be stored so.

        Args:
            level: The level's name, for the message.
            shapes: ``(outputs, inputs)`` of every layer to be quantized, by name.

        Raises:
            UsageError: names the first layer that does not fit, and what would fit all.
        """

    @abstractmethod
    def configuration(self, *, ignored: tuple[str, ...]) -> dict[str, Any]:
        """What ``config.json`` carries as ``quantization_config``.

        Args:
            ignored: Linear layers that stay float: whole paths, or, where a name has a dot, the ends of paths.
        """

    def entries(self, configuration: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """What ``config.json`` has beside the model's own ``config``: where it carries a ``configuration``, and what
        else readers look for."""
        return {"quantization_config": dict(configuration)}

    def stacked(self, linear: str) -> tuple[str, int] | None:  # noqa: ARG002
        """The layer whose arrays hold those of a linear layer together with others of its kind, and its place there;
        None where it has arrays of its own."""
        return None

    def files(self, configuration: Mapping[str, Any]) -> dict[str, bytes]:  # noqa: ARG002
        """Files beside ``config.json`` that readers look for, by name."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What a user should know before building such a level: which engines refuse it."""
        return ()

    def slow_paths(self, engine: str) -> list[str]:  # noqa: ARG002
        """Warnings where an engine (empty: none is chosen yet) would run it, but slowly."""
        return []


class CheckpointFormat(FolderFormat):
    """How a linear layer is stored, and a folder whose linear layers are all stored so."""

    tunable: ClassVar[tuple[str, ...]] = ()
    """Suffixes of float arrays in which every weight is linear, one number for a group of neighbouring inputs of an
    output: what can be tuned while codes stay."""

    groups_first: ClassVar[bool] = False
    """Whether these arrays are [groups, outputs] and not [outputs, groups]."""

    model_dtype: ClassVar[frozenset[str]] = frozenset()
    """Suffixes of f32 arrays that are stored in the float type of the model."""
    byte_types: ClassVar[Mapping[str, str]] = {}
    """By suffix, torch's name for the type of what is an array of bytes here: numpy has no such type."""

    input_arrays: ClassVar[tuple[str, ...]] = ()
    """Suffixes of what says how inputs are rounded."""

    outputs_together: ClassVar[int] = 0
    """Outputs that can be stored without knowing of others, so that every array has rows in proportion to outputs; 0:
    only a whole matrix can."""

    group_size: int = WHOLE_ROW
    """Inputs of an output that share a scale; ``WHOLE_ROW``: all."""

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> CheckpointFormat | None:  # noqa: ARG003
        """As ``FolderFormat``."""
        return None

    def of(self, linear: str) -> CheckpointFormat:  # noqa: ARG002
        """As ``FolderFormat``: all alike."""
        return self

    @property
    def forms(self) -> tuple[CheckpointFormat, ...]:
        """As ``FolderFormat``."""
        return (self,)

    @property
    def scheme(self) -> str:
        """What the field calls it, in a word."""
        return self.layout

    @property
    @abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """Of every array that a quantized layer may have; the first two are always there, and mark one."""

    @property
    def marks(self) -> frozenset[str]:
        """Suffixes that no float tensor has: what bears one belongs to a quantized layer."""
        return frozenset(self.suffixes) - {"weight"}

    @property
    def rounds_inputs(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What engines do to a layer's inputs before they multiply; None: they take them as they are."""
        return None

    def joined(
        self,
        matrices: Iterable[F32],  # noqa: ARG002
        importance: F32 | None,  # noqa: ARG002
        peak: float | None,  # noqa: ARG002
    ) -> CheckpointFormat:
        """The format for matrices that read the same input, with what they must share: engines multiply them as one.

        Args:
            matrices: ``f32[rows, columns]`` each; looked at only where something is shared.
            importance: As ``search``.
            peak: The largest magnitude of the input; None where it is not known or not read.
        """
        return self

    def input_rounding(self, arrays: Stored) -> Callable[[torch.Tensor], torch.Tensor] | None:  # noqa: ARG002
        """``rounds_inputs`` of one layer, from those of its arrays that are named in ``input_arrays``."""
        return self.rounds_inputs

    @abstractmethod
    def search(
        self, weights: F32, importance: F32 | None, *, scale_dtype: str = "float16", quick: bool = False
    ) -> Parameters:
        """Scales that cost least, rounded to what the file stores.

        Args:
            weights: ``f32[rows, columns]``, finite.
            importance: ``f32[columns]``, what a squared error of each column costs; None: all the same.
            scale_dtype: The float type of the model: ``float16``, ``bfloat16`` or ``float32``.
            quick: Only good enough to rank scaled versions of the same matrix by.

        Raises:
            ValueError: the weights are too large for the format.
        """

    @abstractmethod
    def encode(self, codes: npt.NDArray[np.integer], parameters: Any) -> Arrays:
        """The arrays of one layer. Those in ``model_dtype`` stay f32 here.

        Args:
            codes: ``[outputs, inputs]``.
            parameters: As ``search`` gave them, for these rows.
        """

    @abstractmethod
    def shape(self, arrays: Stored) -> tuple[int, int]:
        """``(outputs, inputs)`` of a stored layer.

        Raises:
            ValueError, KeyError: arrays contradict one another, or are missing.
        """

    @abstractmethod
    def decode(self, arrays: Stored) -> F32:
        """Weights ``f32[outputs, inputs]`` of a stored layer; nothing is allocated by a size that arrays only claim.

        Raises:
            ValueError, KeyError: as ``shape``.
        """


def matrix_of(arrays: Stored, suffix: str) -> npt.NDArray[Any]:
    """A two-dimensional array; raises KeyError where it is missing, ValueError where it has another rank."""
    found = arrays[suffix]
    if found.ndim != 2:
        raise ValueError(f"{suffix} has the shape {found.shape}, expected two dimensions")
    return found


def digest(weights: F32) -> str:
    """A hash of decoded weights, shape included."""
    return digest_of_rows(weights.shape, [weights])


def digest_of_rows(shape: tuple[int, ...], parts: Iterable[F32]) -> str:
    """The hash of weights of this shape that come some rows at a time."""
    import numpy as np

    found = hashlib.blake2b(repr(tuple(shape)).encode(), digest_size=16)
    for part in parts:
        found.update(np.ascontiguousarray(part, np.float32).data)
    return found.hexdigest()
