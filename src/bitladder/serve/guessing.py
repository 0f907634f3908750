"""Whether a tier's guesses pay on the requests that come, tried while it serves; where they cost they turn off.

llama.cpp guesses for all requests or for none, as it was started. So blocks of answers with guesses and without take
turns (with, without, without, with, and so on, which a steady drift favours in neither way), and the engine is started
anew in between, when nothing is being answered. A pair of blocks gives one ratio of speeds. After each pair from the
third on the mean of their logarithms has Student's interval at 1 - 0.1 / (k (k - 1)), so that all looks together miss
the truth in at most 5 of 100 trials. Guesses stay where they are surely faster and go where they are surely slower;
after twelve pairs without either what was faster so far is kept. A new trial begins a thousand answers later.

Guesses may pay for one kind of work and cost another: copying code, and chat. So each tag's answers make pairs of their
own, and at the end of a trial those tags are told ``apart`` that are surely faster in the way that the tier does not
take (`_tags_apart`); a second engine then answers them (``serve.aside``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from bitladder.stats.multiplicity import holm
from bitladder.stats.paired import ratio_above_one, ratio_interval

BLOCK = 16
"""Answers timed in one way before it is the other's turn."""
_FIRST_LOOK, _MOST_PAIRS = 3, 12
REST = 1000
"""Answers until guesses are tried anew."""
LEAST_TOKENS = 8
"""Answers of fewer tokens have no speed worth comparing."""
SLOWEST_LOAD_S = 5.0
"""An engine that takes longer to start is not started anew for this: a request might wait for it."""
_MOST_TAGS = 64
_RECENT = 512
_MOST_TAG_PAIRS = 24
FALSE_APART = 0.05
"""Chance that any tag is ever told apart which is no faster in the other way."""
_ORDER = (True, False, False, True)


class GuessVerdict(StrEnum):
    """What the last trial found."""

    NONE = ""
    """None has ended yet."""
    PAYS = "pays"
    COSTS = "costs"
    UNDECIDED = "not told apart"


class Told(NamedTuple):
    """What an engine says of one answer: tokens guessed ahead, and those of them that were right."""

    guessed: int = 0
    accepted: int = 0


@dataclass
class Speeds:
    """Logarithms of seconds per token of the last answers, with guesses and without."""

    with_guesses: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    without: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    guessed: int = 0
    """Tokens guessed ahead in all answers whose engine told it, and those of them that were right."""
    accepted: int = 0

    def add(self, seconds: float, told: Told, *, guessing: bool) -> None:
        """An answer that came in one way."""
        (self.with_guesses if guessing else self.without).append(seconds)
        self.guessed, self.accepted = self.guessed + told.guessed, self.accepted + told.accepted

    @property
    def acceptance(self) -> float | None:
        """Share of guesses that were right; None without any."""
        return self.accepted / self.guessed if self.guessed else None

    @property
    def times_as_fast(self) -> float | None:
        """Geometric mean without over that with guesses; None until both are known."""
        if not self.with_guesses or not self.without:
            return None
        return math.exp(float(np.mean(self.without)) - float(np.mean(self.with_guesses)))


_NOTHING = Told()


class GuessTrial:
    """One tier's. Told what runs (`runs`) and how fast each answer came (`saw`); `wanted` is what should run."""

    def __init__(self) -> None:
        self.wanted = True
        """Whether the engine should guess."""
        self.running = True
        """Whether it does."""
        self.allowed = True
        """Whether the engine may be started anew for a trial."""
        self.verdict = GuessVerdict.NONE
        self.interval: tuple[float, float, float] | None = None
        """Speed with guesses over speed without by the pairs so far, with its interval at the last look."""
        self.all = Speeds()
        self.by_tag: dict[str, Speeds] = {}
        self.usual = True
        """Whether it guesses between trials."""
        self._apart: frozenset[str] = frozenset()
        self._trials = 0
        self._tag_pairs: dict[str, deque[tuple[float, float]]] = {}
        self._begin()

    def _begin(self) -> None:
        self._blocks: list[float] = []
        self._tag_blocks: list[dict[str, float]] = []
        self._clear_block()
        self._rest = 0

    def _clear_block(self) -> None:
        self._block: list[float] = []
        self._block_tags: dict[str, list[float]] = {}

    def runs(self, *, guessing: bool, load_seconds: float) -> None:
        """The engine was started, guessing or not, and took so long to load."""
        self.running = guessing
        self.allowed = not load_seconds > SLOWEST_LOAD_S
        self._clear_block()

    @property
    def in_trial(self) -> bool:
        """Whether ways are being compared, and not only one of them used."""
        return self.allowed and self._rest == 0

    @property
    def apart(self) -> frozenset[str]:
        """Tags of work that is answered in the other way than the tier's usual one; none while a trial is on."""
        return frozenset() if self.in_trial or not self.allowed else self._apart

    def goes_aside(self, tags: Sequence[str]) -> bool:
        """Whether work with these tags, all of them, is told apart."""
        return bool(tags) and self.apart.issuperset(tags)

    def saw(
        self,
        tokens: int,
        tokens_per_s: float | None,
        tags: Sequence[str] = (),
        *,
        guessing: bool | None = None,
        told: Told = _NOTHING,
    ) -> None:
        """An answer came whole.

        Args:
            tokens: of the answer.
            tokens_per_s: as its client saw it.
            tags: kinds of work that it was.
            guessing: whether the engine that gave it guesses; None: as the tier's does.
            told: what that engine says of its guesses.
        """
        if tokens < LEAST_TOKENS or not tokens_per_s or not 0 < tokens_per_s < math.inf:
            return
        seconds = -math.log(tokens_per_s)
        way = self.running if guessing is None else guessing
        self.all.add(seconds, told, guessing=way)
        known = [tag for tag in dict.fromkeys(tags) if tag in self.by_tag or len(self.by_tag) < _MOST_TAGS]
        for tag in known:
            self.by_tag.setdefault(tag, Speeds()).add(seconds, told, guessing=way)
        if not self.allowed:
            return
        if self._rest:
            self._rest -= 1
            if self._rest == 0:
                self._begin()
                self.wanted = _ORDER[0]
        elif way is self.running is self.wanted:
            self._block.append(seconds)
            for tag in known:
                self._block_tags.setdefault(tag, []).append(seconds)
            if len(self._block) == BLOCK:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(float(np.mean(self._block)))
        self._tag_blocks.append({tag: float(np.mean(own)) for tag, own in self._block_tags.items()})
        self._clear_block()
        if len(self._blocks) % 2 == 0:
            first, second = self._tag_blocks[-2:]
            guessed, plain = (first, second) if _ORDER[(len(self._blocks) - 2) % len(_ORDER)] else (second, first)
            for tag in guessed.keys() & plain.keys():
                pairs = self._tag_pairs.setdefault(tag, deque(maxlen=_MOST_TAG_PAIRS))
                pairs.append((math.exp(guessed[tag]), math.exp(plain[tag])))
        self._look()

    def _look(self) -> None:
        """After each block: what runs next, or what was found."""
        self.wanted = _ORDER[len(self._blocks) % len(_ORDER)]
        pairs, odd = divmod(len(self._blocks), 2)
        if odd or pairs < _FIRST_LOOK:
            return
        ways = np.exp(np.asarray(self._blocks).reshape(pairs, 2))
        first = np.asarray(_ORDER * pairs)[: 2 * pairs].reshape(pairs, 2)[:, 0]
        guessed = np.where(first, ways[:, 0], ways[:, 1])
        plain = np.where(first, ways[:, 1], ways[:, 0])
        self.interval = ratio_interval(plain, guessed, confidence=1 - 0.1 / (pairs * (pairs - 1)))
        ratio, low, high = self.interval
        if low > 1:
            self._end(GuessVerdict.PAYS, guessing=True)
        elif high < 1:
            self._end(GuessVerdict.COSTS, guessing=False)
        elif pairs >= _MOST_PAIRS:
            self._end(GuessVerdict.UNDECIDED, guessing=ratio > 1)

    def _end(self, verdict: GuessVerdict, *, guessing: bool) -> None:
        self.verdict, self.wanted, self.usual, self._rest = verdict, guessing, guessing, REST
        self._trials += 1
        self._apart = self._tags_apart()

    def _tags_apart(self) -> frozenset[str]:
        """Tags that are surely faster in the other way, by Student's test on the pairs of blocks of this trial and of
        those before, as many as are kept. Holm's method corrects for the tags; the trials together spend `FALSE_APART`.
        """
        pairs = {tag: list(zip(*own, strict=True)) for tag, own in self._tag_pairs.items() if len(own) >= _FIRST_LOOK}
        p_values = [
            ratio_above_one(guessed, plain) if self.usual else ratio_above_one(plain, guessed)
            for guessed, plain in pairs.values()
        ]
        level = FALSE_APART / (self._trials * (self._trials + 1))
        return frozenset(tag for tag, p in zip(pairs, holm(p_values), strict=True) if p <= level)

    @property
    def because(self) -> str:
        """Why it guesses or does not, in a phrase."""
        if not self.allowed:
            return f"never tried: the engine takes more than {SLOWEST_LOAD_S:g} s to start"
        if self.interval is None or self.verdict is GuessVerdict.NONE:
            return "being tried on the requests that come"
        ratio, low, high = self.interval
        found = f"{ratio:.3g} times as fast ({low:.3g} to {high:.3g}) on these requests"
        again = "; being tried anew" if self.in_trial else ""
        return f"{self.verdict}: {found}{again}"
