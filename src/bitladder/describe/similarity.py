"""Similarity of two texts between 0 and 1, chrF by the library that defines it, an optional extra.

chrF (Popovic 2015): F-score with beta 2 of character n-grams of length 1 to 6, sacrebleu's default;
sacrebleu's own figure is 100 times ours. ROUGE-L (Lin 2004): F-score of the longest common subsequence of words, as
rouge-score has it without stemming, but of words of every script, and in bits (Hyyrö 2004), so that long answers take
milliseconds. Neither knows meaning: "shall" and "shall not" are very similar.
"""

from __future__ import annotations

from collections.abc import Callable

from bitladder.errors import UsageError
from bitladder.unicode import bare_words


def chrf(text: str, other: str) -> float:
    """ChrF of a text against another, 0 to 1.

    Raises:
        UsageError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise _missing("chrF", "sacrebleu") from error
    return float(CHRF().sentence_score(text, [other]).score) / 100


def rouge_l(text: str, other: str) -> float:
    """ROUGE-L (F-score) of a text against another, 0 to 1; 0 where one has no words."""
    found, wanted = bare_words(text), bare_words(other)
    common = _longest_common(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _longest_common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence; a bit for each word of ``one`` says where the length grows."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(one) - row.bit_count()


LONGEST = 100_000
"""Characters of a text that is compared: n-grams of more fill the memory."""
METRICS: dict[str, Callable[[str, str], float]] = {"chrf": chrf, "rouge_l": rouge_l}


def _missing(metric: str, package: str) -> UsageError:
    return UsageError(
        f"{metric} needs the package {package}, which is not installed.",
        do="Install it with: pip install 'bitladder[similarity]'",
    )
