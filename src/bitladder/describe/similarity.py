"""Similarity of two texts between 0 and 1, by the libraries that define the numbers; both are an optional extra.

chrF (Popovic 2015): F-score with beta 2 of character n-grams of length 1 to 6, sacrebleu's default;
sacrebleu's own figure is 100 times ours. ROUGE-L (Lin 2004): F-score of the longest common subsequence of
words, rouge-score's, without stemming. Neither knows meaning: "shall" and "shall not" are very similar.
"""

from __future__ import annotations

from collections.abc import Callable

from bitladder.errors import UsageError


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
    """ROUGE-L (F-score) of a text against another, 0 to 1.

    Raises:
        UsageError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("ROUGE-L", "rouge-score") from error
    return float(RougeScorer(["rougeL"], use_stemmer=False).score(other, text)["rougeL"].fmeasure)


METRICS: dict[str, Callable[[str, str], float]] = {"chrf": chrf, "rouge_l": rouge_l}


def _missing(metric: str, package: str) -> UsageError:
    return UsageError(
        f"{metric} needs the package {package}, which is not installed.",
        do="Install it with: pip install 'bitladder[similarity]'",
    )
