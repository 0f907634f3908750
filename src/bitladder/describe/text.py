"""Texts to measure or calibrate on."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain, count

CHARACTERS_PER_TOKEN = 4
"""The usual estimate for English, where the tokenizer is not known: nobody outside knows a cloud's."""
FEWEST_LETTERS_PER_TOKEN = 2
"""Of ASCII: a low guess, so that the room derived from it is enough for any text."""


def most_tokens(text: str) -> int:
    """Tokens that a text has at most, for any usual tokenizer: half as many as ASCII letters, and one for each byte of
    other scripts, which a vocabulary without them spells byte by byte."""
    letters = sum(character < "\x80" for character in text)
    return letters // FEWEST_LETTERS_PER_TOKEN + len(text.encode("utf-8", "replace")) - letters


@dataclass(frozen=True)
class Document:
    """One text with a name. Documents, not tokens, are what intervals resample, by name (``told_apart``)."""

    name: str
    text: str
    kind: str = ""
    """What the file's name says of it: its extension, say; not part of what is hashed."""


_LANGUAGES = frozenset(
    [
        "ar",
        "bg",
        "bn",
        "cs",
        "da",
        "de",
        "el",
        "en",
        "es",
        "fa",
        "fi",
        "fr",
        "he",
        "hi",
        "hu",
        "id",
        "it",
        "ja",
        "ko",
        "nl",
        "no",
        "pl",
        "pt",
        "ro",
        "ru",
        "sv",
        "sw",
        "ta",
        "th",
        "tr",
        "uk",
        "vi",
        "zh",
        "code",
        "data",
    ]
)
_LEAST_SHARE = 0.02
"""A script with a smaller share of the letters is a name or a quotation."""


def languages_of(document: Document) -> tuple[str, ...]:
    """Languages as the name lists them in front (``de-...``, ``pt-nl-sv-pl``), else the scripts of the letters."""
    named = _named_languages(document)
    if named:
        return named
    counts = scripts_of(document.text)
    letters = sum(counts.values())
    return tuple(sorted(name for name, count in counts.items() if count >= _LEAST_SHARE * letters))


def scripts_of(text: str) -> dict[str, int]:
    """How many of the first 20,000 characters are letters of each script, by the first word of their names in Unicode
    (``Latin``, ``Cjk``, ``Hiragana``)."""
    counts: dict[str, int] = {}
    for letter in text[:20_000]:
        if letter.isalpha():
            script = unicodedata.name(letter, "other").split()[0].capitalize()
            counts[script] = counts.get(script, 0) + 1
    return counts


def subject_of(document: Document) -> str:
    """What a document is about, in the words of its name; of a file with a telling extension, that."""
    rest = document.name.split("-")[len(_named_languages(document)) :]
    return document.kind or " ".join(rest)


def _named_languages(document: Document) -> tuple[str, ...]:
    found = []
    for part in document.name.split("-"):
        if part not in _LANGUAGES:
            break
        found.append(part)
    return tuple(found)


def told_apart(documents: Iterable[Document]) -> list[Document]:
    """Each text once, and no two under one name, since intervals resample documents by it: later ones are numbered,
    ``report (2)``."""
    found: dict[str, Document] = {}
    texts: set[str] = set()
    for document in documents:
        if document.text not in texts:
            texts.add(document.text)
            numbered = (f"{document.name} ({number})" for number in count(2))
            name = next(name for name in chain([document.name], numbered) if name not in found)
            found[name] = replace(document, name=name)
    return list(found.values())


def text_hash(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts, so that evidence is tied to the very words it was measured on."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
