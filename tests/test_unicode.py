"""Texts of every script: the same text in other characters, whole words, counts, lines, steps between two."""

import re
import time
import unicodedata

import pytest

from bitladder import unicode


def test_lines_end_with_line_feeds_alone():
    text = "a\u2028b\x85c\x0bd\x0ce\x1cf\u2029g\r\nh\ri\n\nj\n"
    assert unicode.lines(text) == ["a\u2028b\x85c\x0bd\x0ce\x1cf\u2029g", "h", "i", "", "j"]
    assert unicode.lines("") == []
    assert unicode.lines("a") == ["a"]


def test_bytes_become_text_without_a_mark():
    assert unicode.decoded(b"\xef\xbb\xbfa\r\n") == "a\r\n"
    with pytest.raises(UnicodeDecodeError):
        unicode.decoded(b"\xff\xfea\x00")


def test_halves_of_characters():
    assert unicode.half_character("ab\ud83d") == 2
    assert unicode.half_character("a\U0001f600") is None
    assert unicode.mended("a\ud83d\ude00b\ude00\ud83dc") == "a\U0001f600b\ufffd\ufffdc"
    unicode.mended("\udc80" * 9).encode()


FOUND = [
    ("北京", "中国的首都是北京。"),
    ("北京", "北京是中国的首都。"),
    ("東京", "日本の首都は東京です。"),
    ("서울", "대한민국의 수도는 서울입니다."),
    ("กรุงเทพ", "เมืองหลวงคือกรุงเทพมหานคร"),
    ("Python", "用Python写函数"),
    ("ភ្នំពេញ", "រាជធានីគឺភ្នំពេញ។"),
    ("リンゴ", "これはリンゴです"),
    ("日本", "日本語"),
    ("3", "リンゴが3個"),
    ("AI", "AI서울"),
    ("Zürich", unicodedata.normalize("NFD", "Die Stadt heißt Zürich.")),
    (unicodedata.normalize("NFD", "Zürich"), "Zürich"),
    ("Straße", "DIE STRASSE"),
    ("istanbul", "İSTANBUL"),
    ("ΣΊΣΥΦΟΣ", "σίσυφος"),
    ("москва", "Столица — МОСКВА."),
    ("10 000 euros", "Le total est de 10\u202f000 euros."),
    ("New York", "in New\n\tYork"),
    ("New York", "in New\u3000York"),
    ("don't", "I don’t know"),
    ("don’t", "I don't know"),
    ("term", "a long-term plan"),
    ("well-known", "a well\u2011known fact"),
    ("C++", "written in C++."),
    ("C#", "C# and F#"),
    ("C", "written in C."),
    ("C", "C/C++"),
    ("x", "x+y"),
    ("2", "2+2"),
    ("i", "i + 1"),
    ("Italie", "l'Italie"),
    ("France", "France's capital"),
    ("office", "o\ufb03ce".replace("\ufb03", "ffi")),
    ("ABC", "ＡＢＣ社"),
    ("３", "it is 3"),
    ("カ", "ｶ"),
    ("ガ", "ｶﾞ"),
    ("a.b", "a.b!"),
    ("co\u00adoperate", "cooperate"),
    ("हिन्दी", "यह हिन्दी है"),
    ("3.14", "π is 3.14."),
    ("5", "5."),
    ("5", "about 5, maybe"),
    ("1,250", "it is 1,250."),
    ("2024", "24.12.2024"),
    ("2", "1,2,3"),
    ("شمس", "الـ شمس."),
    ("5", "(5)"),
    ("🙂", "ok🙂"),
    ("yes", "\u200byes\u200b"),
    ("۵", "عدد ۵ است"),
    ("R&D", "our R&D team"),
    ("%", "50%"),
]
NOT_FOUND = [
    ("C", "written in C++."),
    ("C", "C# only"),
    ("F", "F#"),
    ("C", "C++17"),
    ("no", "I know"),
    ("cat", "concatenate"),
    ("can", "I can't"),
    ("can", "I can’t"),
    ("3", "3.14"),
    ("14", "3.14"),
    ("5", "15"),
    ("5", "1.5 kg"),
    ("250", "1,250"),
    ("हिन्द", "हिन्दी"),
    ("e", unicodedata.normalize("NFD", "x̌e\u0323")),
    ("국", "한국은"),
    ("sun", "sunlight"),
    ("北京", "北 京"),
    ("naive", "naïve"),
    ("москв", "Москва"),
    ("کار", "کارخانه"),
    ("a", "ñandú"),
    ("resume", "résumé"),
    ("ไท", "ไท์"),
    ("A", "A+"),
]


@pytest.mark.parametrize(("words", "text"), FOUND)
def test_words_that_stand_in_a_text(words, text):
    assert unicode.has_words(text, words)


@pytest.mark.parametrize(("words", "text"), NOT_FOUND)
def test_words_that_do_not(words, text):
    assert not unicode.has_words(text, words)


def test_text_anywhere():
    assert unicode.has_text("pricing", "ing", same_case=True)
    assert not unicode.has_text("PRICING", "ing", same_case=True)
    assert unicode.has_text("PRICING", "ing", same_case=False)
    assert unicode.has_text(unicodedata.normalize("NFD", "café"), "É", same_case=False)
    assert not unicode.has_text("don’t", "don't", same_case=True)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("北京。", "北京"),
        ("はい！", "はい"),
        ("„Ja“.", "ja"),
        ("« Oui »", "oui"),
        ("**Positive**", "positive"),
        ('  "Yes,  sir."\n', "yes, sir"),
        ("「はい」", "はい"),
        ("_No_.", "no"),
        ("`x`", "x"),
        ("**“Yes.”**", "yes"),
        ("ＹＥＳ", "yes"),
        ("हाँ।", "हाँ"),
        ("Yes…", "yes"),
        ("\ufeffyes\r\n", "yes"),
        ("C++", "c++"),
        (unicodedata.normalize("NFD", "Café"), "café"),
        ("...", ""),
        ("(a)", "(a)"),
        ("isn’t", "isn't"),
    ],
)
def test_short_answers(text, short):
    assert unicode.short_answer(text) == short


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("one two three", 3),
        ("a - b", 2),
        ("long-term and/or", 2),
        ("https://x.y/z", 1),
        ("这是一个句子。", 6),
        ("用Python写函数", 5),
        ("東京タワー", 3),
        ("カタカナ", 1),
        ("ひらがな", 4),
        ("대한민국의 수도는", 2),
        ("one\u3000two", 2),
        ("ក\u200bខ", 2),
        ("हिन्दी में", 2),
        ("e\u0301te\u0301", 1),
        ("…", 0),
        ("42 % of it", 3),
    ],
)
def test_counts_of_words(text, count):
    assert unicode.count_words(text) == count


def test_words_of_scripts_whose_words_only_a_dictionary_knows_are_estimated():
    assert 5 <= unicode.count_words("ฉันรักประเทศไทยและอาหารไทยมากที่สุด") <= 12  # 10 by a dictionary


def test_words_and_pieces():
    text = "Don't pay 1,250.50 euros—用Python写 हिन्दी 👩‍💻!\n"
    assert unicode.words(text) == [
        "Don't",
        "pay",
        "1,250.50",
        "euros",
        "—",
        "用",
        "Python",
        "写",
        "हिन्दी",
        "👩",
        "\u200d",
        "💻",
        "!",
    ]
    assert "".join(unicode.pieces(text)) == text
    assert "👩‍💻" in unicode.pieces(text)
    assert unicode.bare_words("Don't PAY, 北京; naïve_x") == ["don", "t", "pay", "北", "京", "naïve", "x"]


def test_canonical_forms_keep_case_and_marks():
    assert unicode.canonical("\ufeffA\r\nb\rc e\u0301 “x”") == "A\nb\nc é “x”"


def steps(before, after):
    return [(kind, before[a], after[b]) for kind, a, b in unicode.changes(before, after)]


def test_changes():
    assert steps(["a", "b", "c"], ["a", "x", "c"]) == [
        ("equal", ["a"], ["a"]),
        ("replace", ["b"], ["x"]),
        ("equal", ["c"], ["c"]),
    ]
    assert steps(["a", "a"], ["a"]) == [("equal", ["a"], ["a"]), ("delete", ["a"], [])]
    assert steps([], []) == []
    assert [kind for kind, *_ in steps(["é"], ["e\u0301"])] == ["equal"]
    for before, after in [("abcabc", "xabcy"), ("", "ab"), ("ab", ""), ("abab", "ab"), ("kitten", "sitting")]:
        found = unicode.changes(before, after)
        assert "".join(before[one.before] for one in found) == before
        assert "".join(after[one.after] for one in found) == after


HOSTILE = {
    "one word without end": lambda: unicode.changes(["x", *["yes"] * 20_000], ["yes"] * 20_000 + ["y"]),
    "marks without end": lambda: unicode.folded("a" + "\u0301\u0323" * 200_000),
    "a word everywhere": lambda: unicode.has_words("a" * 100_000, "a"),
    "numbers everywhere": lambda: unicode.has_words("1.1" * 50_000, "1"),
    "words of one letter": lambda: unicode.count_words("字" * 300_000),
    "letters of Thai": lambda: unicode.count_words("ก" * 300_000),
    "marks alone": lambda: unicode.words("\u0301" * 300_000),
    "quotes around": lambda: unicode.short_answer("\"'." * 100_000 + "x" + ".'\"" * 100_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_takes_long(name):
    began = time.process_time()
    HOSTILE[name]()
    assert time.process_time() - began < 10  # seconds of ours; without limits it is minutes and more


def test_no_other_module_splits_lines_of_what_was_read():
    """Files and answers of others go through ``lines``; what programs and machines print is split as they print it."""
    from pathlib import Path

    source = Path(unicode.__file__).parent
    found = {
        f"{path.relative_to(source)}"
        for path in source.rglob("*.py")
        if re.search(r"\.(read_text|decode|text)\b[^\n]*\.splitlines\(", path.read_text())
    }
    assert found <= {"files/gguf_writer.py", "engines/vllm.py"}
