"""Finding ready-made levels on the hub, and fetching them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitladder.progress import Progress

if TYPE_CHECKING:
    from bitladder.describe.machine import Machine
    from bitladder.files.hub import HubFile, HubRepo
    from bitladder.files.hub_search import FoundRepo
    from bitladder.files.remote import Offer

ROOM = 1.1
"""A running level takes about so many times its file's size, cache and buffers included, and ``ROOM_BYTES`` more."""
ROOM_BYTES = 256 << 20


@dataclass(frozen=True)
class HubLevel:
    """One level of one repository."""

    name: str
    """As every verb takes it: ``hf:org/name:Q4_K_M``."""
    repo: str
    level: str
    nbytes: int
    """To download; 0 where the hub does not list the files."""
    fits: str
    """``GPU``, ``RAM``, ``GPU + RAM``, ``no``; by size alone."""
    downloads: int
    licence: str
    gated: bool


@dataclass(frozen=True)
class HubAnswer:
    """What a search found, for one machine."""

    machine: str
    usable_bytes: int
    levels: tuple[HubLevel, ...]


@dataclass(frozen=True)
class Pulled:
    """A model that is here now."""

    name: str
    path: str
    """The file, the first part of several, or the checkpoint's folder."""
    nbytes: int
    licence: str


def search_models(
    text: str,
    *,
    level: str = "Q4_K_M",
    machine: str | None = None,
    reserve: int | None = None,
    limit: int = 10,
    progress: Progress,
) -> HubAnswer:
    """Repositories of GGUF files whose names match, a row each with the level that is wanted; of ``hf:org/name`` all of
    its levels.

    Where a repository lacks the level the largest that fits stands for it, else the smallest.

    Raises:
        UsageError: no words, no such machine. BadInput: no such repository. FetchError: the hub does not answer.
    """
    from bitladder.files.hub import list_repo, parse_name
    from bitladder.files.hub_search import FoundRepo, search_hub
    from bitladder.files.remote import offers
    from bitladder.plan.placement import usable_ram, usable_vram
    from bitladder.stages.recommend import roomy_machine

    here, words = roomy_machine(machine, reserve)
    if text.startswith("hf:"):
        name = parse_name(text)
        repo = list_repo(name)
        rows = [_row(FoundRepo(name.repo, 0, repo.licence, False, ()), offer, here) for offer in offers(repo)]
    else:
        found = search_hub(text, limit=limit, progress=progress)
        rows = [_row(one, _offer_of(one.offers, level, here), here) for one in found]
    return HubAnswer(words, usable_ram(here) + usable_vram(here), tuple(rows))


def _offer_of(ready: Sequence[Offer], level: str, machine: Machine) -> Offer | None:
    """The level that is wanted, else the largest that fits, else the smallest."""
    wanted = [offer for offer in ready if offer.level == level.upper()]
    fitting = [offer for offer in ready if _fits(offer.nbytes, machine) != "no"]
    return next(iter([*wanted, *fitting, *ready[-1:]]), None)


def _fits(nbytes: int, machine: Machine) -> str:
    from bitladder.plan.placement import usable_ram, usable_vram

    need, ram, vram = ROOM * nbytes + ROOM_BYTES, usable_ram(machine), usable_vram(machine)
    if need <= vram:
        return "GPU"
    if need <= ram:
        return "RAM"
    return "GPU + RAM" if need <= ram + vram else "no"


def _row(repo: FoundRepo, offer: Offer | None, machine: Machine) -> HubLevel:
    level, nbytes = (offer.level, offer.nbytes) if offer else ("", 0)
    fits = _fits(nbytes, machine) if offer else ""
    name = f"hf:{repo.repo}:{level}" if level else f"hf:{repo.repo}"
    return HubLevel(name, repo.repo, level, nbytes, fits, repo.downloads, repo.licence, repo.gated)


def pull(names: Sequence[str], progress: Progress) -> list[Pulled]:
    """Fetch models into the hub's cache, where every verb finds them by the same name; what is there in part goes on.

    Raises:
        UsageError: no ``hf:`` name. BadInput: no such model or level. NothingFits: too little disk.
        FetchError: the connection broke; what has arrived is kept.
    """
    from bitladder.files.hub import checkpoint_files, choose_gguf, list_repo, parse_name
    from bitladder.files.hub_download import fetch

    chosen: list[tuple[str, HubRepo, tuple[HubFile, ...]]] = []
    for text in names:
        repo = list_repo(parse_name(text))
        ggufs = choose_gguf(repo)
        chosen.append((text, repo, ggufs or checkpoint_files(repo)))
    _require_disk(chosen)
    found = []
    for text, repo, files in chosen:
        paths = fetch(repo, files, progress)
        first = paths[0] if paths[0].suffix == ".gguf" else paths[0].parent
        found.append(Pulled(text, str(first), sum(file.size for file in files), repo.licence))
    return found


def _require_disk(chosen: Sequence[tuple[str, HubRepo, tuple[HubFile, ...]]]) -> None:
    """Refuse before gigabytes are spent on what cannot be kept."""
    import shutil
    from pathlib import Path

    from huggingface_hub import constants, try_to_load_from_cache

    from bitladder.errors import NothingFits
    from bitladder.units import human_bytes

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    need = sum(
        file.size
        for _, repo, files in chosen
        for file in files
        if not isinstance(try_to_load_from_cache(repo.name.repo, file.name, revision=repo.commit, cache_dir=cache), str)
    )
    free = shutil.disk_usage(there).free
    if need > free:
        raise NothingFits(
            f"The download takes {human_bytes(need)}, and {there} has {human_bytes(free)} left.",
            do="Free some space, or put the hub's cache elsewhere: HF_HUB_CACHE=/path.",
        )
