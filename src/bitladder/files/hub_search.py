"""Searching the hub for repositories of ready-made GGUF levels, through its own client (``HF_ENDPOINT`` honoured)."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bitladder.errors import BadInput, UsageError
from bitladder.files import hub
from bitladder.files.remote import Offer, offers
from bitladder.progress import Progress, silent

MOST = 50
"""Repositories that one search looks into at most: each is a request."""
_AT_ONCE = 4


@dataclass(frozen=True)
class FoundRepo:
    """A repository that a search found."""

    repo: str
    downloads: int
    """Of the last 30 days, as the hub counts; 0 where it does not say."""
    licence: str
    gated: bool
    """Its conditions have to be accepted on the hub first."""
    offers: tuple[Offer, ...]
    """The levels it has ready, largest first; empty where the hub does not list its files for us."""


def search_hub(text: str, *, limit: int = 10, progress: Progress = silent) -> list[FoundRepo]:
    """Repositories with GGUF files whose names match, the most downloaded first, each with its levels and their sizes.

    Args:
        text: words of the name; ``gguf`` among them is understood.
        limit: repositories, 1 to ``MOST``.

    Raises:
        UsageError: no words. FetchError: the hub does not answer.
    """
    from huggingface_hub import HfApi

    words = " ".join(word for word in text.split() if word.lower() != "gguf")
    if not words:
        raise UsageError("The search has no words.", do='Name a model, like: bitladder search "mistral large gguf".')
    progress(f"asking the hub for '{words}'", 0, 1)
    with hub.hub_errors(hub.HubName(f"the search for '{words}'")):
        api = HfApi(endpoint=hub.endpoint())
        told = list(
            api.list_models(
                search=words,
                filter="gguf",
                sort="downloads",
                limit=min(limit, MOST),
                expand=["downloads", "gated", "cardData", "tags"],
            )
        )
    known = [info for info in told if re.fullmatch(r"[\w.-]+/[\w.-]+", str(info.id))]
    done = 0

    def looked_into(info: Any) -> FoundRepo:
        nonlocal done
        found = _looked_into(info)
        done += 1
        progress(f"listing {info.id}", done, len(known))
        return found

    return _each(looked_into, known)


def _each(look: Callable[[Any], FoundRepo], infos: list[Any]) -> list[FoundRepo]:
    """Several requests at a time, in the order given; the first error ends all."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(look, infos))


def _looked_into(info: Any) -> FoundRepo:
    """A search result with its files; one that is gated or gone has none."""
    try:
        listed = offers(hub.list_repo(hub.HubName(str(info.id))))
    except BadInput:
        listed = ()
    return FoundRepo(str(info.id), int(info.downloads or 0), _licence(info), bool(info.gated), listed)


def _licence(info: Any) -> str:
    card = info.card_data
    named = str(card.get("license") or "") if card is not None else ""
    tags = (str(tag) for tag in info.tags or ())
    return named or next((tag.partition(":")[2] for tag in tags if tag.startswith("license:")), "")
