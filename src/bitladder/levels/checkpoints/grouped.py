"""Names of the form ``METHOD-Nbit-gSIZE-options``: ``GPTQ-4bit-g64-asym``, ``AWQ-4bit-g32-ct``.

They say the method first, and several formats store its codes; an option chooses another format than the method's own.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from bitladder.errors import UnknownLevel
from bitladder.levels.kinds import WHOLE_ROW
from bitladder.levels.methods import AWQ, GPTQ, Method

GROUP_SIZES = (32, 64, 128)
"""That kernels of engines know."""


@dataclass(frozen=True)
class Spelling:
    """Names of one method."""

    method: Method
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    sym: bool
    """Whether zero lies in the middle of the codes unless an option says otherwise."""
    flip: str
    """That option."""
    layouts: tuple[str, ...]
    """Options that choose another format."""
    grammar: str


SPELLINGS = {
    "GPTQ": Spelling(
        GPTQ, (2, 3, 4, 8), (*GROUP_SIZES, WHOLE_ROW), True, "asym", ("ct", "v2"),
        "GPTQ-{2,3,4,8}bit-{g32,g64,g128,row}[-asym][-ct][-v2]",
    ),
    "AWQ": Spelling(AWQ, (4,), GROUP_SIZES, False, "sym", ("ct",), "AWQ-4bit-{g32,g64,g128}[-sym][-ct]"),
}  # fmt: skip
_NAME = re.compile(
    r"(GPTQ|AWQ)-([0-9]{1,6})bit-(?:g(0*[1-9][0-9]{0,5})|row)((?:-[a-z0-9]+)*)", re.IGNORECASE | re.ASCII
)


@dataclass(frozen=True)
class GroupedName:
    """What such a name says."""

    name: str
    """As it is printed."""
    prefix: str
    """A key of ``SPELLINGS``."""
    bits: int
    group_size: int
    sym: bool
    layout: str
    """The option that chooses a format; empty for the method's own."""

    @property
    def method(self) -> Method:
        """How codes are chosen."""
        return SPELLINGS[self.prefix].method


def parse_grouped(text: str) -> GroupedName | None:
    """What a name says, in any case; None where it has another form.

    Raises:
        UnknownLevel: it has this form, and no reader of these formats would understand such a level.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        return None
    prefix = match[1].upper()
    own = SPELLINGS[prefix]
    bits, group_size = int(match[2]), int(match[3] or WHOLE_ROW)
    options = sorted({option for option in match[4].lower().split("-") if option})
    _check(text, prefix, bits, group_size, options)
    name = "-".join([prefix, f"{bits}bit", f"g{group_size}" if group_size else "row", *options])
    sym = own.sym != (own.flip in options)
    layout = next((option for option in options if option in own.layouts), "")
    return GroupedName(name, prefix, bits, group_size, sym, layout)


def widest_group(rows: Collection[int]) -> int | None:
    """The largest group that divides every row; None where none does."""
    return next((size for size in sorted(GROUP_SIZES, reverse=True) if all(row % size == 0 for row in rows)), None)


def _check(text: str, prefix: str, bits: int, group_size: int, options: list[str]) -> None:
    own = SPELLINGS[prefix]
    if prefix == "AWQ" and bits not in own.bits:
        raise UnknownLevel(
            f"'{text}' asks for AWQ at {bits} bits.",
            means="Every AWQ kernel of vLLM, transformers and GPTQModel takes 4 bits only; "
            "such a file could not be run.",
            do=f"Ask for GPTQ-{bits}bit-g64, or for {'Q2_K' if bits == 2 else 'Q3_K_M'} with an importance matrix, "
            "which any llama.cpp runs."
            if bits in (2, 3)
            else "Ask for AWQ-4bit-g64.",
        )
    if bits not in own.bits:
        raise UnknownLevel(f"'{text}' asks for {bits} bits.", do=f"GPTQ has 2, 3, 4 and 8 bits: {own.grammar}.")
    if group_size not in own.group_sizes:
        raise UnknownLevel(
            f"'{text}' asks for groups of {group_size or 'a whole row'}.",
            means="The kernels that run such files know groups of 32, 64 and 128"
            + (" and whole rows." if WHOLE_ROW in own.group_sizes else "."),
            do=f"Levels look like {own.grammar}.",
        )
    if unknown := set(options) - {own.flip, *own.layouts}:
        raise UnknownLevel(
            f"'{text}' has an option '{min(unknown)}' that {prefix} levels do not.",
            do=f"Levels look like {own.grammar}.",
        )
    if len(layouts := [option for option in options if option in own.layouts]) > 1:
        both = " and ".join(f"-{option}" for option in layouts)
        raise UnknownLevel(f"'{text}' asks for two layouts at once.", do=f"Keep one of {both}.")
