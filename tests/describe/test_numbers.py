"""Numbers as people write them: what each spelling means, and what is no number."""

import math
import time

import pytest

from bitladder.describe.numbers import LOCALES, numbers, spelled

SPELLINGS = [
    (42, "42"),
    (42, "42."),
    (42, "The answer is 42!"),
    (42, "= 42€"),
    (42, "**42**"),
    (42, r"$\boxed{42}$"),
    (42, "４２"),
    (42, "٤٢"),
    (42, "४२"),
    (7, "7️⃣"),
    (1250, "$1,250.00"),
    (1250, "1,250"),
    (1234567, "1,234,567"),
    (1234567.89, "1,234,567.89"),
    (1250, r"1{,}250"),
    (1000, "1_000"),
    (1234567, "1'234'567"),
    (1234567, "1’234’567"),
    (1234567, "1\u00a0234\u00a0567"),
    (1234567, "1\u202f234\u202f567"),
    (1234567, "1\u2009234\u2009567"),
    (12, "12km"),
    (5, "5kg"),
    (30, "30min"),
    (100, "100ms"),
    (8, "8GB"),
    (20, "20°C"),
    (20, "20℃"),
    (12.5, "12.5%"),
    (50, r"50\%"),
    (12, "12-inch"),
    (5, "5mg/dl"),
    (15, "15th"),
    (1, "1st"),
    (2, "2nd"),
    (3, "3º"),
    (1, "1ère"),
    (3, "3rd."),
    (7, "Q7"),
    (4, "A4"),
    (3, "the grid is 2x3"),
    (3, "2 × 3"),
    (500, "Rs.500"),
    (500, "USD500"),
    (5, "US$5"),
    (5, "€5"),
    (5, "n°5"),
    (5, "#5"),
    (19, "COVID-19"),
    (4, "GPT-4"),
    (12, "10-12"),
    (12, "10–12"),
    (5, "±5"),
    (5, "+5"),
    (5, "~5"),
    (5, "(5)"),
    (3, "リンゴが3個"),
    (0.5, ".5"),
    (0.5, "0.5"),
    (0.5, "is .5."),
    (-0.5, "-.5"),
    (0.05, "p = .05"),
    (5, "word.5"),
    (0.5, "$.5"),
    (-5, "-5"),
    (-5, "−5"),
    (-5, "–5"),
    (-5, "－5"),
    (-5, "- 5"),
    (-5, "− 5"),
    (-5, "x = - 5"),
    (-5, "is -5"),
    (-5, "-$5"),
    (-5, "-5°C"),
    (5, "7 - 5"),
    (5, "(2) - 5"),
    (-5, "minus 5"),
    (-5, "The answer is - 5"),
    (5, "7-5"),
    (-1250, "-1,250"),
    (1000, "1e3"),
    (1000, "1E+3"),
    (0.001, "1e-3"),
    (0.001, "1e−3"),
    (6.02e23, "6.02×10^23"),
    (6.02e23, "6.02 x 10^23"),
    (6.02e23, "6.02*10**23"),
    (6.02e23, "6.02·10²³"),
    (6.02e23, r"$6.02 \times 10^{23}$"),
    (1.6e-19, "1.6 × 10⁻¹⁹"),
    (1.6e-19, "1.6 × 10^-19"),
    (1e6, "10^6"),
    (1e6, "10⁶"),
    (5, "5²"),
    (2.5, "2.5 m²"),
    (0.75, "3/4"),
    (0.75, "¾"),
    (1.5, "1 1/2"),
    (1.5, "1½"),
    (1.5, "1 ½"),
    (-1.5, "-1 1/2"),
    (0.75, "3⁄4"),
    (0.75, r"\frac{3}{4}"),
    (2024, "24/12/2024"),
    (3, "1/2/3"),
    (2.5, "2.5M"),
    (5, "5k"),
    (7, "7B"),
    (1250000, "1.25 million"),
    (3e9, "3 billion"),
    (3e9, "3bn"),
    (2e6, "2 Mio."),
    (2e9, "2 Milliarden"),
    (20000, "2万"),
    (3e8, "3亿"),
    (5e5, "5 lakh"),
    (2e7, "2 crore"),
    (2000, "2 thousand"),
    (2e6, "2-million"),
    (31, "0x1F"),
    (0, "0"),
    (0, "-0"),
    (7, "007"),
    (30, "10:30"),
    (1e3, "1,000."),
    (3, "1,2,3"),
    (56, "1,234,56"),
]


@pytest.mark.parametrize(("value", "text"), SPELLINGS)
def test_the_last_number_of_a_text(value, text):
    assert numbers(text)[-1] == pytest.approx(value, rel=1e-12)


OTHERWISE = [(2.5e6, "2.5M"), (5000, "5k"), (7e9, "7B"), (5, "- 5"), (8, "8/10"), (5, "is - 5")]


@pytest.mark.parametrize(("value", "text"), OTHERWISE)
def test_the_other_reading(value, text):
    assert value in spelled(text)[-1].readings[1:]


BY_LOCALE = [
    ("de", 0.5, "0,5"),
    ("de", 1234567.5, "1.234.567,5"),
    ("de", 1234.0, "1.234"),
    ("de", -0.5, "−,5"),
    ("de", 3.14, "3.14"),
    ("de", 1250.5, "1'250,5"),
    ("de", 2.5e6, "2,5 Mio."),
    ("de", 1500.0, "1,5 Tsd"),
    ("fr", 1234567.8, "1 234 567,8"),
    ("fr", 12.0, "12,0"),
    ("fr", 1234.5, "1\u202f234,5"),
    ("fr", 3.5, "3.5"),
    ("de-CH", 1234.5, "1'234.5"),
    ("de-AT", 1234.5, "1 234,5"),
    ("fr-CH", 1234.5, "1 234.5"),
    ("en-IN", 1234567.8, "12,34,567.8"),
    ("hi", 1234567.0, "१२,३४,५६७"),
    ("hi", 1234567.0, "1,234,567"),
    ("es", 1e6, "1.000.000"),
    ("es-MX", 1e6, "1,000,000"),
    ("en", 567.0, "1 234 567"),
    ("en", 1.234, "1.234"),
    ("pt", 1.5e6, "1,5 milhões"),
    ("ru", 2.5e6, "2,5 млн"),
    ("sv", 1e4, "10 000"),
]


@pytest.mark.parametrize(("locale", "value", "text"), BY_LOCALE)
def test_signs_by_locale(locale, value, text):
    assert numbers(text, locale)[-1] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "version 1.2.3",
        "192.168.0.1",
        "24.12.2024",
        "five",
        "½".replace("½", "half"),
        "...",
        "m²",
        "Ⅷ",
        "٫",
        "x^",
        "inf",
        "NaN",
        "-",
    ],
)
def test_no_numbers(text):
    assert numbers(text) == []


def test_all_of_a_text_in_order():
    assert numbers("1,250.5 and -3, 2e3; v1.2.3, A4 and 50%.") == [1250.5, -3.0, 2000.0, 50.0]
    assert numbers("5 g of CO2, H2O and B12") == [5.0]
    assert numbers("1 + 2 = 3") == [1.0, 2.0, 3.0]
    assert numbers("between 3–5 and 1/4") == [3.0, 5.0, 0.25]


def test_every_locale_reads_plain_numbers():
    for locale in LOCALES:
        assert numbers("42, -7", locale) == [42.0, -7.0]


@pytest.mark.parametrize(
    "text",
    [
        "9" * 200_000,
        "1," * 100_000,
        "1.1" * 100_000,
        "1 " * 100_000,
        "-" * 200_000 + "5",
        "1e" * 100_000,
        "1/2/" * 50_000,
        "½" * 100_000,
        "10^" * 100_000,
        "0x" * 100_000,
        r"\frac{" * 50_000,
        "123,456" * 50_000,
        "1_" * 100_000,
        "9" * 500 + "e999999999",
        "1e999999999",
        "5 " + "million" * 50_000,
        " " * 300_000 + "-" + " " * 300_000 + "5",
    ],
)
def test_hostile_texts_are_read_at_once(text):
    began = time.process_time()
    assert not any(map(math.isnan, numbers(text)))
    assert time.process_time() - began < 10
