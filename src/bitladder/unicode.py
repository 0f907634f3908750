"""Text as people write it, in every script: lines, forms of characters, letter case, words.

The one place for what the rest takes for granted of a text. Lines end with LF (CR LF and CR are read as such), never
with the other characters that ``str.splitlines`` counts: U+2028, U+2029 and U+0085 stand inside texts. Texts are
compared in one normal form (UAX 15), in any case by Unicode's folding, with typographic quotes, dashes and wide forms
as their plain ones. Words end where letters and marks end (after UAX 29), and scripts that are written without spaces
have no such ends, so there a word is found wherever it stands.
"""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from regex import Pattern

_LINE_END = re.compile(r"\r\n|\n|\r")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MOST_MARKS = 64
"""Combining marks in a row: texts have a few, and sorting them for a normal form is quadratic in the run."""
_LONG_RUN = re.compile(rf"[^\x00-\u02ff]{{{_MOST_MARKS}}}")

_UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{Javanese}\p{Balinese}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\u3005-\u3007\u30fc\uff70"
)
"""Scripts that are written without spaces between words, as a character class of the ``regex`` library."""
_LETTER = r"\p{L}\p{M}\p{N}_"
_LETTERS_OF_A_WORD = 4
"""Letters of a word, on average, in South East Asian scripts: where words end is only in a dictionary."""

_INVISIBLE = dict.fromkeys(
    [0xAD, 0x61C, 0x640, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF,
     *range(0xFE00, 0xFE10)]
)  # fmt: skip
"""Characters that change how a text is laid out and not what it says: soft hyphens, joiners, directions, variants."""
_PLAIN: dict[int, str] = {
    **dict.fromkeys(map(ord, "‘’‚‛′ʼ´`‹›"), "'"),
    **dict.fromkeys(map(ord, "“”„‟″«»「」『』〝〞〟"), '"'),
    **dict.fromkeys(map(ord, "‐‑‒–−﹣"), "-"),
    **dict.fromkeys(map(ord, "。｡"), "."),
    **dict.fromkeys(map(ord, "、､"), ","),
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFEF)
       if unicodedata.name(chr(code), "")},
}  # fmt: skip
_AROUND = "\"'*_ "
_AT_THE_END = ".!,;:…।॥۔،؛։።᙮"


def decoded(raw: bytes) -> str:
    """UTF-8 without its byte order mark; line ends stay.

    Raises:
        UnicodeDecodeError: it is none.
    """
    return raw.decode("utf-8-sig")


def lines(text: str) -> list[str]:
    """Lines without their ends. An end of line at the end of the text begins no line."""
    found = _LINE_END.split(text)
    return found if found[-1] else found[:-1]


def half_character(text: str) -> int | None:
    """Where a text holds half of a surrogate pair, which is no character and cannot be written; None where none."""
    found = _SURROGATE.search(text)
    return None if found is None else found.start()


def mended(text: str) -> str:
    """The text with halves of a surrogate pair that belong together joined, and others replaced by U+FFFD."""
    if half_character(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def canonical(text: str) -> str:
    """What is compared where letter case counts: lines end with LF, no byte order mark, composed characters (NFC)."""
    plain = _LINE_END.sub("\n", text.removeprefix("\ufeff"))
    return _normalized("NFC", plain)


@functools.lru_cache(maxsize=16)
def folded(text: str, *, case: bool = False) -> str:
    """What is compared where letter case does not count: a caseless match of Unicode (D145), white space as single
    spaces, typographic quotes and dashes and wide forms as their plain ones, nothing that is invisible. With ``case``
    letters stay what they are."""
    plain = _normalized("NFD", mended(text)).translate(_INVISIBLE).translate(_PLAIN)
    if not case:
        plain = plain.casefold().replace("i\u0307", "i").replace("ı", "i")
    plain = _normalized("NFC", plain)
    return " ".join(plain.translate(_PLAIN).split())


def short_answer(text: str) -> str:
    """For comparing short answers: folded, without quotes and marks of emphasis around, without a final full stop."""
    return folded(text).lstrip(_AROUND).rstrip(_AROUND + _AT_THE_END)


def same_text(one: str, other: str) -> bool:
    """Whether two texts are the same, white space around them, line ends and forms of characters aside."""
    return canonical(one).strip() == canonical(other).strip()


def has_words(text: str, wanted: str, *, same_case: bool = False) -> bool:
    """Whether words stand in a text as whole words, in any case (or the same) and with any white space between them.

    ``C`` is not in ``C++`` or ``C#``, ``can`` not in ``can't``, ``3`` not in ``3.14``. In scripts without spaces,
    and before what Korean attaches to a word, any place will do.
    """
    hay, needle = folded(text, case=same_case), folded(wanted, case=same_case)
    if not needle:
        return wanted in text
    at = hay.find(needle)
    while at >= 0:
        if _stands_alone(hay, at, at + len(needle)):
            return True
        at = hay.find(needle, at + 1)
    return False


def has_text(text: str, wanted: str, *, same_case: bool) -> bool:
    """Whether a text holds another anywhere, within words too."""
    if same_case:
        return canonical(wanted) in canonical(text)
    return canonical(canonical(wanted).casefold()) in canonical(canonical(text).casefold())


_NUMBER_RUN = re.compile(r"\d+\.\d+|\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_REST_OF_A_NAME = re.compile(r"\+\+|[+#](?!\w)")
_NEGATION = re.compile(r"'t(?!\w)")


def _stands_alone(text: str, start: int, end: int) -> bool:
    first, last = text[start], text[end - 1]
    if start and _joined(text[start - 1], first):
        return False
    after = text[end : end + 3]
    if after and (unicodedata.category(after[0])[0] == "M" or (_joined(last, after[0]) and not _hangul(last))):
        return False
    if last.isalpha() and (_REST_OF_A_NAME.match(after) or _NEGATION.match(after)):
        return False
    return not _within_a_number(text, start, end)


def _joined(one: str, other: str) -> bool:
    """Whether two neighbours belong to one word."""
    word = all(unicodedata.category(c)[0] in "LMN" or c == "_" for c in (one, other))
    return word and not _unspaced().match(one) and not _unspaced().match(other) and _hangul(one) == _hangul(other)


def _within_a_number(text: str, start: int, end: int) -> bool:
    """Whether the words begin or end with a part of a number (``5`` of ``1.5``)."""
    for inside in (start, end - 1):
        left, right = inside, inside + 1
        while text[inside].isdecimal() and left and _of_a_number(text[left - 1]) and inside - left < 50:
            left -= 1
        while text[inside].isdecimal() and right < len(text) and _of_a_number(text[right]) and right - left < 99:
            right += 1
        run = text[left:right].rstrip(".,")
        number = run.lstrip(".,")
        left += len(run) - len(number)
        if _NUMBER_RUN.fullmatch(number) and (left < start or left + len(number) > end):
            return True
    return False


def _of_a_number(character: str) -> bool:
    return character in ".,0123456789"


def _hangul(character: str) -> bool:
    return "\uac00" <= character <= "\ud7a3" or "\u1100" <= character <= "\u11ff" or "\u3130" <= character <= "\u318f"


def words(text: str) -> list[str]:
    """The words of a text, with apostrophes and hyphens inside, numbers with their points and commas, and single
    marks. Of scripts without spaces, each ideograph and each hiragana is one, of the others a run of letters."""
    found: list[str] = _word().findall(text)
    return found


def bare_words(text: str) -> list[str]:
    """The words of a text in lower case, without any marks: what measures of overlap count."""
    found: list[str] = _bare().findall(_normalized("NFC", text.lower()))
    return found


def pieces(text: str) -> list[str]:
    """A text cut where a reader would: white space, words, ideographs, what is seen as one character. Joined, they are
    the text."""
    found: list[str] = _piece().findall(text)
    return found


def count_words(text: str) -> int:
    """How many words a text has: what white space parts and holds a letter or a digit. Where a script has no spaces,
    each ideograph and each hiragana counts as one, as word processors count, a run of katakana as one, and of other
    scripts a run of letters as its length over four."""
    total = 0
    for part in text.replace("\u200b", " ").split():
        if _unspaced().search(part) is None:
            total += any(character.isalnum() for character in part)
            continue
        for found in _counted().finditer(part):
            letters = sum(unicodedata.category(character)[0] == "L" for character in found[0])
            total += -(-max(letters, 1) // _LETTERS_OF_A_WORD) if found["run"] else 1
    return total


@functools.cache
def _compiled(pattern: str) -> Pattern[str]:
    import regex  # here, because most of what is done needs no words

    return regex.compile(pattern)


_HAN = r"\p{Han}\p{Hiragana}\u3005-\u3007"
_KANA = r"[\p{Katakana}\u30fc\uff70]+"


def _unspaced() -> Pattern[str]:
    return _compiled(f"[{_UNSPACED}]")


def _word() -> Pattern[str]:
    return _compiled(
        rf"\d+(?:[.,]\d+)*|[{_HAN}]\p{{M}}*|{_KANA}|(?:(?![{_HAN}])[{_LETTER}])+(?:['’-](?:(?![{_HAN}])[{_LETTER}])+)*"
        r"|[^\s\p{L}\p{M}\p{N}_]"
    )


def _bare() -> Pattern[str]:
    return _compiled(rf"[{_HAN}]\p{{M}}*|{_KANA}|(?:(?![{_HAN}_])[{_LETTER}])+")


def _piece() -> Pattern[str]:
    return _compiled(rf"\s+|[{_HAN}]\p{{M}}*|{_KANA}|(?:(?![{_HAN}])[{_LETTER}])+|\X")


def _counted() -> Pattern[str]:
    return _compiled(
        rf"[{_HAN}]\p{{M}}*|{_KANA}|(?P<run>(?:(?![{_HAN}])[{_UNSPACED}]\p{{M}}*)+)|(?:(?![{_UNSPACED}])[{_LETTER}])+"
    )


class Change(NamedTuple):
    """One step from a sequence to another: ``kind`` and slices as ``difflib.SequenceMatcher.get_opcodes`` has them."""

    kind: str
    before: slice
    after: slice


_MOST_STEPS = 4_000_000
"""Pairs of equal words that are looked at: about a second. Answers that repeat one word have millions."""


def changes(before: Sequence[str], after: Sequence[str]) -> list[Change]:
    """Steps from one sequence of words to another, in order: longest matching blocks (difflib), between what both
    begin and end with. Composed and decomposed characters are the same. Where the middle is too large to match, it is
    one change."""
    old, new = ([_normalized("NFC", word) for word in one] for one in (before, after))
    shorter = min(len(old), len(new))
    start = next((n for n in range(shorter) if old[n] != new[n]), shorter)
    tail = next((n for n in range(shorter - start) if old[-1 - n] != new[-1 - n]), shorter - start)
    middle, other = old[start : len(old) - tail], new[start : len(new) - tail]
    found = [("equal", 0, start, 0, start)] if start else []
    counts = Counter(middle)
    if sum(counts[word] for word in other) > _MOST_STEPS:
        found.append(("replace", start, start + len(middle), start, start + len(other)))
    else:
        steps = difflib.SequenceMatcher(None, middle, other, autojunk=False).get_opcodes()
        found += [(kind, a + start, b + start, c + start, d + start) for kind, a, b, c, d in steps]
    if tail:
        found.append(("equal", len(old) - tail, len(old), len(new) - tail, len(new)))
    return [Change(kind, slice(a, b), slice(c, d)) for kind, a, b, c, d in found]


def _normalized(form: Literal["NFC", "NFD"], text: str) -> str:
    """A normal form, or the text itself where a run of marks has no end (a normal form sorts them, in quadratic
    time)."""
    if text.isascii() or (_LONG_RUN.search(text) and _endless_marks(text)):
        return text
    return unicodedata.normalize(form, text)


def _endless_marks(text: str) -> bool:
    run = 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) else 0
        if run >= _MOST_MARKS:
            return True
    return False
