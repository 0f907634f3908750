"""Numbers in a text, as people write them.

    12km  15th  $1,250.00  -3  − 3  .5  1e3  6.02 × 10^23  3/4  1 1/2  ½  1.25 million  7️⃣  ４２  0x1F  1_000

A locale says which signs part thousands and decimals; ``en`` is usual. Apostrophes and spaces that do not break are
thousands in every locale. Numbers in words, dates and versions (``1.2.3``) are none. Where a spelling can be read in
two ways (``2.5M``, a bullet before ``5``), both readings count, the likelier first.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import NamedTuple

from bitladder.unicode import canonical


class Signs(NamedTuple):
    """What stands in a number: the decimal sign, and the signs between thousands."""

    decimal: str
    thousands: str


_POINT, _COMMA = Signs(".", ","), Signs(",", ".")
_SPACE = Signs(",", " ")
LOCALES: dict[str, Signs] = {
    "en": _POINT, "zh": _POINT, "ja": _POINT, "ko": _POINT, "th": _POINT, "he": _POINT, "es-MX": _POINT,
    "de": _COMMA, "es": _COMMA, "it": _COMMA, "nl": _COMMA, "pt": _COMMA, "da": _COMMA, "tr": _COMMA, "id": _COMMA,
    "el": _COMMA, "ro": _COMMA, "hr": _COMMA, "vi": _COMMA,
    "fr": _SPACE, "ru": _SPACE, "pl": _SPACE, "cs": _SPACE, "sv": _SPACE, "fi": _SPACE, "no": _SPACE, "nb": _SPACE,
    "hu": _SPACE, "uk": _SPACE, "sk": _SPACE, "bg": _SPACE, "de-AT": Signs(",", " ."),
    "de-CH": Signs(".", "'"), "fr-CH": Signs(".,", "' "), "it-CH": Signs(".", "'"),
    "hi": Signs(".", ",i"), "en-IN": Signs(".", ",i"),
}  # fmt: skip
"""Signs by language, or language and region. ``i``: groups of two digits before the last three (12,34,567)."""
_ANY_THOUSANDS = "'’\u00a0\u202f\u2009"

_SCALES = {
    1e3: "thousand thousands tausend tsd mille",
    1e5: "lakh lakhs lac",
    1e6: "million millions mio millionen millón millones milhão milhões milione milioni miljoen "
    "млн миллион миллиона миллионов",
    1e7: "crore crores",
    1e9: "billion billions bn mrd milliarde milliarden milliard milliards miliardi miljard "
    "млрд миллиард миллиарда миллиардов",
    1e12: "trillion trillions tn",
}  # fmt: skip
_SCALE = {word: scale for scale, listed in _SCALES.items() for word in listed.split()}
_CJK_SCALE = {"万": 1e4, "萬": 1e4, "億": 1e8, "亿": 1e8, "兆": 1e12, "만": 1e4, "억": 1e8}
_LETTER_SCALE = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_MINUS = "−–－﹣‐‑-"
_MOST_DIGITS = 400
_VULGAR = {chr(code): unicodedata.numeric(chr(code)) for code in [0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F), 0x2189]}


class Number(NamedTuple):
    """One number of a text."""

    readings: tuple[float, ...]
    """What it can mean, the likeliest first."""
    free: bool
    """Whether it stands by itself; the 2 of ``CO2`` does not."""


def numbers(text: str, locale: str = "en") -> list[float]:
    """The numbers of a text, in order, each in its likeliest reading."""
    return [number.readings[0] for number in spelled(text, locale)]


def spelled(text: str, locale: str = "en") -> list[Number]:
    """The numbers of a text, in order, with all that each can mean. Those that hang on letters (the 2 of ``CO2``) count
    only where there are no others.

    Raises:
        KeyError: no such locale.
    """
    found = _Reader(text, LOCALES[locale]).found()
    return [number for number in found if number.free] or found


class _Reader:
    """Reads one text from left to right."""

    def __init__(self, text: str, signs: Signs) -> None:
        self.text = _plain(text)
        self.numbers: list[Number] = []
        between = f"[{re.escape(signs.thousands.replace('i', '') + _ANY_THOUSANDS)}]"
        pairs = r"|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)" if "i" in signs.thousands else ""
        decimal = f"[{re.escape(signs.decimal)}]"
        self.spelling = re.compile(
            r"0[xX](?P<hex>[0-9a-fA-F]{1,16})(?![0-9a-zA-Z])"
            rf"|(?:(?P<whole>\d{{1,3}}(?P<sign>{between})\d{{3}}(?:(?P=sign)\d{{3}})*(?!\d){pairs}|\d+(?:_\d+)*)"
            rf"|(?<![\w.,])(?={decimal}\d))(?:{decimal}(?P<part>\d+))?"
            rf"|(?P<vulgar>[{''.join(_VULGAR)}])"
        )

    def found(self) -> list[Number]:
        at = 0
        while match := self.spelling.search(self.text, at):
            at = self._dotted(match) or self._take(match)
        return self.numbers

    def _dotted(self, match: re.Match[str]) -> int:
        """Where a version or a date that begins like a number ends; 0 when it is none."""
        rest = _DOTTED.match(self.text, match.end())
        if rest is None or (not match["part"] and rest[0].count(".") == 1):
            return 0
        return rest.end()

    def _take(self, match: re.Match[str]) -> int:
        """Take what matched, with what belongs to it on its right. Returns where it ends."""
        text, begin, end = self.text, match.start(), match.end()
        if match["vulgar"]:
            self._add(begin, _VULGAR[match["vulgar"]], mixed=True)
            return end
        if match["hex"]:
            self._add(begin, float(int(match["hex"], 16)))
            return end
        part = match["part"]
        if not part and (point := _DOTTED.match(text, end)):  # a decimal point where the locale has a comma
            part, end = point[0][1:], point.end()
        digits = re.sub(r"\D", "", match["whole"] or "0")
        value = math.inf if len(digits) > _MOST_DIGITS else float(f"{digits}.{(part or '0')[:_MOST_DIGITS]}")
        over = _OVER.match(text, end)
        if over and not part and int(over[1]) and text[begin - 1 : begin] != "/":
            self._add(begin, value / int(over[1]), value, mixed=value < int(over[1]))
            return over.end()
        value, others, end = self._scaled(value, end)
        self._add(begin, value, *others)
        return end

    def _scaled(self, value: float, end: int) -> tuple[float, tuple[float, ...], int]:
        """A value with the power of ten after it, what else it can mean, and where that ends."""
        text = self.text
        for pattern in (_EXPONENT, _TIMES_TEN):
            if power := pattern.match(text, end):
                return _times_ten_to(value, _exponent(power)), (), power.end()
        if value == 10 and (power := _POWER.match(text, end)):
            return _times_ten_to(1.0, _exponent(power)), (), power.end()
        if (word := _WORD.match(text, end)) and (scale := _SCALE.get(word[1].casefold())):
            return value * scale, (), word.end()
        if scale := _CJK_SCALE.get(text[end : end + 1]):
            return value * scale, (), end + 1
        scale = _LETTER_SCALE.get(text[end : end + 1])
        return value, (value * scale,) if scale and not text[end + 1 : end + 2].isalpha() else (), end

    def _add(self, begin: int, value: float, *others: float, mixed: bool = False) -> None:
        """Take a number with its sign, joined to a whole number before it if it is a fraction (``mixed``)."""
        before = self.text[max(0, begin - 16) : begin]
        whole = re.search(r"(?<![\d.,/])(\d{1,6}) ?$", before) if mixed else None
        if whole and self.numbers and abs(self.numbers[-1].readings[0]) == float(whole[1]):
            last = self.numbers.pop()
            self.numbers.append(last._replace(readings=tuple(one + math.copysign(value, one) for one in last.readings)))
            return
        free = not before[-1:].isalpha() or _FREE_LETTERS.search(before) is not None
        self.numbers.append(Number(_signed((value, *others), before), free))


def _signed(readings: tuple[float, ...], before: str) -> tuple[float, ...]:
    """With the minus before a number taken for its sign, for an operator, range or dash, or for either."""
    found = _SIGN.search(before)
    if found is None:
        return readings
    negative = tuple(-value for value in readings)
    left, space, gap = found["left"], found["space"], found["gap"] or found["word"]
    if not gap:  # -5 is signed, unless something is joined by it: 3-5, GPT-4
        return readings if (left.isalnum() or (left and left in ")]%°")) and not space else negative
    if left and left in "=:(≈<>≤≥[{,":
        return negative
    return readings if left.isdigit() or (left and left in ")]%°") else negative + readings


_DOTTED = re.compile(r"(?:\.\d+)+")
_OVER = re.compile(r"[/⁄](\d{1,9})(?![\d/]|[.,]\d)")
_EXPONENT = re.compile(rf"[eE](?P<power>[+{_MINUS}]?\d{{1,9}})(?P<raised>)(?!\w)")
_POWER_OF = rf"(?:(?:\^|\*\*)\s?\{{?\(?(?P<power>[+{_MINUS}]?\d{{1,9}})\)?\}}?|(?P<raised>[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{{1,9}}))"
_TIMES_TEN = re.compile(rf"\s{{0,3}}(?:[×x*·⋅]|\\times|\\cdot)\s{{0,3}}10{_POWER_OF}")
_POWER = re.compile(_POWER_OF)
_WORD = re.compile(r"[ \u00a0\u202f-]?([^\W\d_]{2,12})(?![^\W\d_])")
_FREE_LETTERS = re.compile(r"(?:^|[^A-Za-z])(?:USD|EUR|GBP|CHF|JPY|CNY|INR|AUD|CAD|US|R|RM)$|\d[x×]$")
_SIGN = re.compile(
    rf"(?P<left>\S?)(?P<space>\s*)(?:[{_MINUS}](?P<gap>[ \u00a0]?)|\b(?:minus|negative)(?P<word> ))[$€£¥₹]?$",
    re.IGNORECASE,
)


def _plain(text: str) -> str:
    """Digits and signs of every script as ASCII ones, LaTeX's fractions and thousands as plain ones."""
    text = canonical(text)
    text = re.sub(r"\\[dt]?frac\s?\{(-?\d{1,9})\}\s?\{(\d{1,9})\}", r"\1/\2", text).replace("{,}", ",")
    digits = {ord(c): str(unicodedata.decimal(c)) for c in set(text) if not c.isascii() and c.isdecimal()}
    return text.translate(digits | {0xFF0E: ".", 0xFF0C: ",", 0x66B: ".", 0x66C: "'", 0xFF0B: "+", 0xFF0F: "/"})


def _exponent(match: re.Match[str]) -> int:
    spelled = match["power"] or match["raised"].translate(_SUPERSCRIPT)
    return int(re.sub(f"[{_MINUS}]", "-", spelled))


def _times_ten_to(value: float, exponent: int) -> float:
    """As the literal would be read, to the last bit."""
    spelled = repr(value)
    return value if not math.isfinite(value) else float(f"{spelled}e{exponent}") if "e" not in spelled else math.inf
