"""Regular expressions of others, in Python's dialect, on texts of others: each search has an end.

Python's own engine has no limit of time, and an ordinary pattern on an answer that repeats itself takes longer than the
universe. The ``regex`` library has one, and reads the same dialect but for what is taken care of here.
"""

from __future__ import annotations

import functools
import re
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regex import Pattern

LONGEST_S = 1.0
"""Seconds for one search; an honest one takes milliseconds."""
LONGEST = 5000
"""Characters of a pattern."""
_BRACE = re.compile(r"\\N\{[^}]*\}|\\.|\{(?!\d*,?\d*\}|,\d+\})", re.DOTALL)


def check(pattern: str) -> None:
    """Whether a pattern can be searched for.

    Raises:
        ValueError: it is no regular expression, or too long a one.
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern)} characters; {LONGEST} are the most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(pattern)
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError, MemoryError, Warning) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def search(pattern: str, text: str, *, timeout_s: float = LONGEST_S) -> str | None:
    """The first match of a pattern in a text, or None.

    Raises:
        TimeoutError: it was not found in time; the message says so.
    """
    try:
        found = _compiled(pattern).search(text, timeout=timeout_s)
    except TimeoutError:
        raise TimeoutError(f"not done after {timeout_s:g} s on an answer of {len(text)} characters") from None
    except (MemoryError, RecursionError):
        raise TimeoutError("not done within the memory for it") from None
    return None if found is None else str(found[0])


@functools.lru_cache(maxsize=512)
def _compiled(pattern: str) -> Pattern[str]:
    """The pattern, with braces that are no counts as themselves: to ``regex`` they would mean a fuzzy match.

    Raises:
        ValueError: the library does not read it.
    """
    import regex  # here, because few criteria are patterns

    plain = _BRACE.sub(lambda match: "\\{" if match[0] == "{" else match[0], pattern)
    try:
        return regex.compile(plain, regex.VERSION0)
    except regex.error as error:
        raise ValueError(str(error)) from None
