"""Knowing a model behind an address again, when only its name can be read.

Names lie: a local server can be restarted with another file under the same alias, a cloud can move an alias to
another version. So three questions whose answers are a matter of taste are asked greedily, and their first
words kept. Two different models hardly ever give the same ones. One model gives all three again, but for a
tie that falls the other way; so one equal answer in three is enough to know it by.

Some clouds do not repeat themselves even at temperature 0. They are asked each question twice at first, and
one that differs from itself cannot be known again; that is said, not hidden.
"""

from __future__ import annotations

from bitladder.engines.base import Chat, Engine
from bitladder.records.endpoint import Fingerprint

QUESTIONS = (
    "Describe an old lighthouse in one sentence.",
    "Invent a name for a small boat and say why it suits her.",
    "What do people most often get wrong about the moon?",
)
REPLY_TOKENS = 24
REQUESTS = 3 * len(QUESTIONS)
"""Asked at most in one run: twice each at the start, once each at the end."""


def take_fingerprint(engine: Engine) -> Fingerprint:
    """Ask each question twice.

    Raises:
        EngineError: the engine cannot be asked.
    """
    first, model = _replies(engine)
    again, _ = _replies(engine)
    return Fingerprint(first, _alike(first, again), model)


def still_the_same(engine: Engine, known: Fingerprint) -> bool:
    """Whether the engine answers as it did; true where it cannot be told.

    Raises:
        EngineError: the engine cannot be asked.
    """
    return not known.repeats or _alike(known.replies, _replies(engine)[0])


def _replies(engine: Engine) -> tuple[tuple[str, ...], str]:
    said = [engine.chat(Chat.of(one, REPLY_TOKENS)) for one in QUESTIONS]
    return tuple(one.text.strip() for one in said), said[-1].model


def _alike(before: tuple[str, ...], now: tuple[str, ...]) -> bool:
    """An empty answer says nothing: models that think first may use up all tokens on that."""
    return any(one and one == other for one, other in zip(before, now, strict=True))
