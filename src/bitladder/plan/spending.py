"""What asking a paid model will cost at most, told before anything is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.describe.text import CHARACTERS_PER_TOKEN
from bitladder.describe.workload import Input


@dataclass(frozen=True)
class Spending:
    """An upper bound, but for the estimate of prompt tokens. ``money`` is None when the price is unknown."""

    who: str
    requests: int
    prompt_tokens: int
    answer_tokens: int
    """If every answer is as long as it may be."""
    money: float | None = None

    @property
    def sentence(self) -> str:
        """For the person who pays."""
        money = "price unknown" if self.money is None else f"at most {self.money:.2f} by your price table"
        return (
            f"{self.who}: up to {self.requests} requests, about {self.prompt_tokens:,} prompt tokens and at most "
            f"{self.answer_tokens:,} answer tokens; {money}"
        )


def expected_spending(
    who: str, asked: Sequence[Input], *, prices: tuple[float, float] | None = None, extra_requests: int = 0
) -> Spending:
    """The most that asking these inputs can cost.

    Args:
        who: the endpoint's name.
        asked: every input that is not answered yet, once for each sample.
        prices: of a million prompt tokens and of a million answer tokens; None when unknown.
        extra_requests: short ones beside the inputs, counted but too small to price.
    """
    requests = extra_requests + sum(1 + len(one.turns) for one in asked)
    prompt_tokens = sum(map(_prompt_tokens, asked))
    answer_tokens = sum(one.most_tokens * (1 + len(one.turns)) for one in asked)
    money = None
    if prices is not None:
        money = (prompt_tokens * prices[0] + answer_tokens * prices[1]) / 1e6
    return Spending(who, requests, prompt_tokens, answer_tokens, money)


def _prompt_tokens(one: Input) -> int:
    """Of a chat of several turns each request repeats all that was said before."""
    turns = len(one.turns)
    tools = sum(len(str(tool)) for tool in one.tools)
    characters = tools + sum(len(message["content"]) for message in one.everything_asked)
    return (1 + turns) * -(-characters // CHARACTERS_PER_TOKEN) + one.most_tokens * turns * (turns + 1) // 2
