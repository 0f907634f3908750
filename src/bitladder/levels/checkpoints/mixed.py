"""Folders whose linear layers have schemes of their own: compressed-tensors' "mixed-precision".

The configuration has a group for each scheme, whose targets are whole names of layers, or patterns for the experts of a
layer, which are many and alike. Arrays are those of each layer's own scheme.

    CT-bpw4.60     schemes that lose least at 4.60 bits per weight of the linear layers (``plan/schemes.py``)

A level of that name has no schemes until its tensors have been weighed; a folder has them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from bitladder.errors import UnknownLevel
from bitladder.levels.checkpoints.base import CheckpointFormat, FolderFormat
from bitladder.levels.checkpoints.compressed_tensors import IntQuantized, PackQuantized
from bitladder.levels.checkpoints.ct_config import ignored_names, whole
from bitladder.levels.checkpoints.fp8 import Fp8
from bitladder.levels.checkpoints.integers import STAND_INS
from bitladder.levels.checkpoints.mx import Mxfp4, Mxfp8
from bitladder.levels.checkpoints.nvfp4 import Nvfp4
from bitladder.levels.kinds import CheckpointLevel
from bitladder.levels.methods import GPTQ

SCHEMES = (
    "W2A16-g64", "W2A16-g32", "W3A16-g128", "W3A16-g64", "W3A16-g32", "W4A16-g128", "W4A16-g64", "W4A16-g32",
    "MXFP4A16", "NVFP4A16", "W5A16-g128", "W5A16-g64", "W6A16-g128", "W6A16-g64", "W8A16-channel", "FP8-DYNAMIC",
)  # fmt: skip
"""What recipes choose from: schemes that vLLM has kernels for and that store errors of weights alone, but for
``FP8-DYNAMIC``, whose inputs lose little."""
FLOAT = "none"
"""In place of a scheme: the layer stays float."""

_NAME = re.compile(r"CT-bpw([0-9]{1,2}(?:\.[0-9]{1,4})?)", re.IGNORECASE | re.ASCII)
_LINEAR = "Linear"
_OF_LAYERS: tuple[type[CheckpointFormat], ...] = (PackQuantized, IntQuantized, Fp8, Nvfp4, Mxfp4, Mxfp8)
_PATTERN = re.compile(r"\^?(?:[\w/:-]|\\[.d][+*]?|\.[+*]?|\[[\w-]+\][+*]?|\((?:\?:)?[\w|]+\))+\$?", re.ASCII)
"""Patterns of targets that are read: without a quantifier inside another, which could take for ever."""
_LONGEST_NAME, _MOST_STARS, _MOST_PATTERNS = 512, 3, 4096


@dataclass(frozen=True)
class SchemeGroup:
    """Layers of one scheme."""

    form: CheckpointFormat
    targets: tuple[str, ...]
    """Whole names of layers, patterns after ``re:``, or ``Linear`` for all that no other target names."""


@dataclass(frozen=True)
class Mixed(FolderFormat):
    """``bits``: per weight of the linear layers, 0 where nobody said; ``groups``: none before schemes are chosen.
    ``floats``: linear layers that stay float, as ``targets`` of a group."""

    bits: float
    groups: tuple[SchemeGroup, ...] = ()
    floats: tuple[str, ...] = ()

    prefixes: ClassVar[tuple[str, ...]] = ("CT",)
    grammar: ClassVar[str] = "CT-bpw4.60"
    about: ClassVar[str] = (
        "Every layer gets the scheme with which the whole loses least under so many bits per weight: whole "
        "numbers of 2 to 8 bits, FP8 or 4-bit floats. For vLLM, where no single width fits the memory well."
    )
    layout: ClassVar[str] = "mixed-precision"
    engines: ClassVar[tuple[str, ...]] = ("vllm", "transformers")

    @classmethod
    def parse(cls, name: str) -> CheckpointLevel | None:
        """``CT-bpw4.60``; more than two digits only if there are more."""
        if (match := _NAME.fullmatch(name)) is None:
            return None
        bits = float(match[1])
        if not 2 < bits <= 16:
            raise UnknownLevel(
                f"There is no level '{name}'.",
                do="Bits per weight of the linear layers lie between 2 and 16, as in CT-bpw4.60.",
            )
        return mixed_level(cls(bits))

    @classmethod
    def recognise(cls, configuration: Mapping[str, Any]) -> Mixed | None:
        """As ``FolderFormat``: every group is of a scheme that is read."""
        groups = configuration.get("config_groups")
        is_mixed = configuration.get("quant_method") == "compressed-tensors" and isinstance(groups, Mapping)
        if not is_mixed or not groups or (configuration.get("format") != cls.layout and len(groups) < 2):
            return None
        found = [_group(one, configuration.get("format")) for one in groups.values()]
        patterns = sum(target.startswith("re:") for one in found if one for target in one.targets)
        if patterns > _MOST_PATTERNS:
            return None
        known = tuple(one for one in found if one is not None)
        return cls(0.0, known) if len(known) == len(found) else None

    def of(self, linear: str) -> CheckpointFormat | None:
        """As ``FolderFormat``: names go before patterns, and both before ``Linear``."""
        exact, patterns = self._targets
        if linear in exact:
            return exact[linear]
        named = next((form for pattern, form in patterns if pattern.match(linear)), None)
        return named or exact.get(_LINEAR)

    @property
    def forms(self) -> tuple[CheckpointFormat, ...]:
        """As ``FolderFormat``."""
        return tuple(group.form for group in self.groups)

    @cached_property
    def _targets(self) -> tuple[dict[str, CheckpointFormat], list[tuple[re.Pattern[str], CheckpointFormat]]]:
        exact: dict[str, CheckpointFormat] = {}
        patterns = []
        for group in self.groups:
            for target in group.targets:
                if target.startswith("re:"):
                    patterns.append((re.compile(target[3:]), group.form))
                else:
                    exact.setdefault(target, group.form)
        return exact, patterns

    @property
    def signature(self) -> str:
        """A hash of what each layer gets."""
        said = repr([(group.form, group.targets) for group in self.groups])
        return hashlib.sha256(said.encode()).hexdigest() if self.groups else ""

    @property
    def kernels(self) -> tuple[str, ...]:
        """Those of all its schemes; of a level without any yet, none are known."""
        return tuple(dict.fromkeys(one for group in self.groups for one in group.form.kernels))

    @property
    def reads_peaks(self) -> bool:
        """Where a scheme does."""
        return any(group.form.reads_peaks for group in self.groups)

    @property
    def bpw(self) -> float:
        """Of all linear layers together."""
        return self.bits

    @property
    def stand_in(self) -> str:
        """The block format with as many bits."""
        return STAND_INS[min(max(int(self.bits), 2), 8)]

    def stored_bytes(self, outputs: int, inputs: int) -> int:
        """As ``FolderFormat``, of a layer that has as many bits as all: some have more, others fewer."""
        return int(self.bits * outputs * inputs / 8)

    def configuration(self, *, ignored: tuple[str, ...]) -> dict[str, Any]:
        """As ``FolderFormat``."""
        groups = []
        for group in self.groups:
            (own,) = group.form.configuration(ignored=())["config_groups"].values()
            groups.append({**own, "targets": list(group.targets)})
        return whole(self.layout, [*ignored_names(ignored), *self.floats], groups)

    def notes(self) -> tuple[str, ...]:
        """Those of all its schemes, and what transformers 5.19 makes of several."""
        own = (
            "transformers with compressed-tensors reads it as it is; with dequantize=True it takes all layers for the "
            "first scheme's, and fails.",
        )
        notes = dict.fromkeys(note for group in self.groups for note in group.form.notes())
        return (*notes, *(own if len(self.groups) > 1 else ()))

    def slow_paths(self, engine: str) -> list[str]:
        """Those of all its schemes."""
        return list(dict.fromkeys(path for group in self.groups for path in group.form.slow_paths(engine)))


def mixed_level(form: Mixed) -> CheckpointLevel:
    """The level of a format, by the bits that it has."""
    bits = f"{form.bits:.2f}" if form.bits == round(form.bits, 2) else f"{form.bits:g}"
    return CheckpointLevel(f"CT-bpw{bits}", form, GPTQ)


def _group(found: object, layout: object) -> SchemeGroup | None:
    """A group from outside; None where its scheme or its targets are not read."""
    if not isinstance(found, Mapping):
        return None
    own = found.get("format") or layout
    alone = {"quant_method": "compressed-tensors", "format": own, "config_groups": {"group_0": found}}
    form = next((form for kind in _OF_LAYERS if (form := kind.recognise(alone)) is not None), None)
    targets = found.get("targets")
    if form is None or not isinstance(targets, list) or not all(_is_read(target) for target in targets):
        return None
    return SchemeGroup(form, tuple(targets))


def _is_read(target: object) -> bool:
    if not isinstance(target, str) or len(target) > _LONGEST_NAME:
        return False
    if not target.startswith("re:"):
        return True
    return _PATTERN.fullmatch(target[3:]) is not None and len(re.findall(r"[+*]", target)) <= _MOST_STARS
