"""A workload of 320 inputs of eight kinds with known answers, from the shipped texts and a few word lists.

Small models pass some of each kind and fail others, and what a level loses differs from kind to kind: what a
routing rule has to find out.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from bitladder.files.texts import shipped_texts

EACH = 40
CAPITALS = (
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna, Greece Athens, "
    "Poland Warsaw, Norway Oslo, Sweden Stockholm, Denmark Copenhagen, Finland Helsinki, Ireland Dublin, Belgium "
    "Brussels, Hungary Budapest, Russia Moscow, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Japan Tokyo, China "
    "Beijing, Thailand Bangkok, Vietnam Hanoi, Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, Colombia "
    "Bogota, Argentina Buenos, Brazil Brasilia, Australia Canberra, Iceland Reykjavik, Ukraine Kyiv, Romania "
    "Bucharest, Bulgaria Sofia, Serbia Belgrade, Iran Tehran, Iraq Baghdad, Nepal Kathmandu, Indonesia Jakarta"
)
OPPOSITES = (
    "hot cold, big small, up down, left right, day night, good bad, rich poor, young old, fast slow, open closed, "
    "full empty, hard soft, light dark, wet dry, happy sad, high low, early late, strong weak, long short, near "
    "far, clean dirty, loud quiet, first last, true false, love hate, win lose, buy sell, push pull, summer "
    "winter, north south, east west, inside outside, above below, before after, always never, thick thin, deep "
    "shallow, heavy light, brave afraid, alive dead"
)
LIKED = "I loved it and would buy it again", "It works perfectly", "The best I ever had", "Wonderful from start to end"
DISLIKED = "It broke on the first day", "A complete waste of money", "Terrible, I want a refund", "The worst I ever had"
THINGS = ["phone", "lamp", "kettle", "chair", "book"]
NAMES = ["Anna Berg", "Omar Haddad", "Lucy Stone", "Pavel Novak", "Maria Lopez"]

Made = tuple[str, dict[str, object], int]
"""A prompt, what is expected of the answer, and its longest answer in tokens."""


def _pairs(words: str) -> list[list[str]]:
    return [pair.split() for pair in words.split(", ")]


def _sentences() -> list[str]:
    english = (one.text for one in shipped_texts() if not one.name.startswith(("deutsch", "francais", "code", "table")))
    text = " ".join(english)
    return [found for found in re.findall(r"[A-Z][A-Za-z ,']{30,90}\.", text) if found.isascii()]


def _recall(_: random.Random) -> Iterator[Made]:
    for country, capital in _pairs(CAPITALS):
        yield f"What is the capital of {country}? Answer with one word.", {"contains_all": capital}, 12


def _opposite(_: random.Random) -> Iterator[Made]:
    for word, other in _pairs(OPPOSITES):
        yield f"What is the opposite of '{word}'? Answer with one word.", {"contains_all": other}, 12


def _arithmetic(chance: random.Random) -> Iterator[Made]:
    while True:
        a, b = chance.randrange(2, 40), chance.randrange(2, 40)
        yield f"What is {a} + {b}? Answer with the number only.", {"number": {"value": a + b, "which": "last"}}, 16


def _copying(_: random.Random) -> Iterator[Made]:
    for sentence in _sentences():
        yield f"Repeat this sentence exactly:\n{sentence}", {"contains_all": sentence.rstrip(".")}, 40


def _next_word(_: random.Random) -> Iterator[Made]:
    for sentence in reversed(_sentences()):
        words = sentence.rstrip(".").split()
        if len(words[-1]) > 3:
            prompt = f"What is the last word of this sentence? Answer with that word only.\n{sentence}"
            yield prompt, {"contains_all": words[-1]}, 12


def _extraction(chance: random.Random) -> Iterator[Made]:
    while True:
        name, year, price = chance.choice(NAMES), chance.randrange(1950, 2000), chance.randrange(10, 99)
        text = f"{name}, born in {year}, bought a {chance.choice(THINGS)} for {price} euros."
        yield f"{text}\nIn which year was {name} born? Answer with the year only.", {"contains_all": str(year)}, 16


def _classification(chance: random.Random) -> Iterator[Made]:
    while True:
        good = chance.random() < 0.5
        review = f"My new {chance.choice(THINGS)}: {chance.choice(LIKED if good else DISLIKED)}."
        right, wrong = ("positive", "negative") if good else ("negative", "positive")
        prompt = f"Is this review positive or negative? Answer with one word.\n\nReview: {review}"
        yield prompt, {"contains_all": right, "contains_none": wrong}, 12


def _counting(chance: random.Random) -> Iterator[Made]:
    while True:
        first = chance.randrange(1, 60)
        shown = ", ".join(str(first + step) for step in range(4))
        yield f"Which number comes next: {shown}? Answer with it only.", {"number": {"value": first + 4}}, 16


KINDS: dict[str, Callable[[random.Random], Iterator[Made]]] = {
    "recall": _recall, "opposite": _opposite, "arithmetic": _arithmetic, "copying": _copying, "last word": _next_word,
    "extraction": _extraction, "classification": _classification, "counting": _counting,
}  # fmt: skip


def write_workload(path: Path, each: int = EACH) -> Path:
    """The workload as JSON lines; the same in every run."""
    lines = []
    for kind, make in KINDS.items():
        for number, (prompt, expect, longest) in zip(range(each), make(random.Random(0)), strict=False):
            name = f"{kind.replace(' ', '-')}-{number + 1}"
            lines.append({"id": name, "prompt": prompt, "tags": [kind], "max_tokens": longest, "expect": expect})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
