"""What is kept on this machine and what points to it; deleting what nothing points to.

Evidence knows where measured files and runs lie, runs name the files of their levels by hash, and the cache holds what
can be made or fetched again. What a run that stands, or a decision in evidence, names by its hash is never stale: that
is what ``serve`` takes. Nor is a file whose hash is not the one that was measured, since it is somebody's by now.
Files that nothing points to are stale once they were not used for a number of days. Nothing is read of the files
themselves, neither to hash them nor of their headers: that would cost minutes, and count as a use.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.errors import BadInput, OutputError
from bitladder.records.inventory import Inventory, KeptFile, KeptRun, Place
from bitladder.report.reading import RUN_JSON, read_run

if TYPE_CHECKING:
    from bitladder.records.level_file import StoredFile
    from bitladder.records.run import RunRecord
    from bitladder.store.recorded import StoredDecision

CACHES = {
    "converted": "checkpoints converted to GGUF",
    "converter": "llama.cpp's converter",
    "engine-loads": "what engines said of models",
    "hashes": "hashes of files",
    "headers": "headers of planned checkpoints",
    "importance": "importance matrices",
    "measured": "levels built only to be measured",
    "models": "the demo model",
    "sensitivity": "losses for recipes, and curvatures",
    "vectors": "vectors of calibrated levels",
    "walks": "states of stopped walks",
}
"""The cache's folders, in words."""
_PARTIAL = re.compile(r".+\.gguf\.partial(\.journal)?|\.[0-9a-f]{16}\.part")
_PARTIAL_FOLDER = re.compile(r"\..+\.partial")
_SHOWN = 12
"""Digits of a hash in a sentence."""


@dataclass(frozen=True)
class _Known:
    """What evidence and the records of runs say."""

    files: list[StoredFile]
    decisions: dict[str, list[StoredDecision]]
    records: dict[Path, RunRecord]
    """The runs whose records are there, by the record's path."""

    @property
    def sources(self) -> set[str]:
        """Hashes of the models that something was measured against."""
        runs = {record.source.sha256 for record in self.records.values()}
        return {file.source for file in self.files} | set(self.decisions) | runs

    @property
    def names(self) -> dict[str, str]:
        """Hash of a model to its name, where a record has it."""
        return {record.source.sha256: record.source.name for record in self.records.values()}

    def pointing_to(self, sha256: str) -> tuple[str, ...]:
        """What names a file with this hash, in words."""
        runs = [
            f"run of {_minute(record.created)} ({path})"
            for path, record in self.records.items()
            if sha256 in {file.sha256 for file in record.files} | set(record.decision.files.values())
        ]
        decided = [
            f"run of {_minute(one.created)}, whose record is gone"
            for decisions in self.decisions.values()
            for one in decisions
            if one.run not in self.records and sha256 in one.decision.files.values()
        ]
        return (*runs, *decided)


def inventory(*, older_than_days: float) -> Inventory:
    """Runs, level files, partial files, the cache and the hub's own cache, each with what points to it.

    Args:
        older_than_days: for how long a file that nothing points to must not have been read or written to be stale.

    Raises:
        BadInput, OutputError: the evidence store cannot be opened.
    """
    from bitladder.files.folders import cache_folder
    from bitladder.store.connect import shown
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    with Evidence.open() as store:
        recorded, where = Recorded(store), shown(store.url)
        files, decisions = recorded.every_file(), recorded.every_decision()
    folders = _folders(files, decisions)
    known = _Known(files, decisions, _records(folders))
    before = datetime.now(UTC) - timedelta(days=older_than_days)
    kept = [*_levels(known), *_partials(folders), *_cached(known), *_hub()]
    return Inventory(where, str(cache_folder()), _runs(known), tuple(_judged(one, before) for one in kept))


def clean(kept: Iterable[KeptFile], say: Callable[[str], None]) -> tuple[KeptFile, ...]:
    """Delete files and folders, except those that a running program has open; returns those that are deleted.

    Raises:
        OutputError: one could not be deleted; the others are.
    """
    from bitladder.files.in_use import files_in_use

    wanted = list(kept)
    used = files_in_use(Path(one.path) for one in wanted)
    done, problems = [], []
    for one in wanted:
        path = Path(one.path)
        if (user := used.get(path.resolve())) is not None:
            say(f"{path} stays: {user} has it open.")
            continue
        try:
            _delete(path)
            done.append(one)
        except OSError as error:
            problems.append(f"{path} ({error.strerror or error})")
    if problems:
        raise OutputError(
            f"{len(problems)} of {len(wanted)} could not be deleted: {', '.join(problems[:3])}.",
            means=f"{len(done)} others were.",
            do="Check who may write to these folders.",
        )
    return tuple(done)


def _delete(path: Path) -> None:
    """One file, link or folder; a link's target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _judged(one: KeptFile, before: datetime) -> KeptFile:
    if one.place is Place.HUB or one.kept_by:
        return one
    return replace(one, stale=datetime.fromisoformat(one.used) <= before)


def _folders(files: Iterable[StoredFile], decisions: dict[str, list[StoredDecision]]) -> list[Path]:
    """Folders in which measured files and records of runs lay, and which are still there."""
    places = [Path(file.path) for file in files] + [one.run for each in decisions.values() for one in each]
    return [folder for folder in dict.fromkeys(place.parent for place in places) if folder.is_dir()]


def _records(folders: Iterable[Path]) -> dict[Path, RunRecord]:
    found = {}
    for folder in folders:
        try:
            found[folder / RUN_JSON] = read_run(folder / RUN_JSON)
        except BadInput:  # none, or not ours
            continue
    return found


def _runs(known: _Known) -> tuple[KeptRun, ...]:
    """Runs, the newest first."""
    from bitladder.stages.measured_levels import latest_of

    found = (latest_of(stored, source) for source, stored in known.decisions.items())
    latest = {one.path for one in found if one and one.decision.quality}
    runs = [_run(path, record, path in latest) for path, record in known.records.items()]
    for source, stored in known.decisions.items():
        for one in stored:
            if one.run not in known.records:
                decision, name = one.decision, known.names.get(source, source[:_SHOWN])
                levels = tuple(verdict.level for verdict in decision.verdicts)
                runs.append(
                    KeptRun(
                        name, one.created, str(one.run), decision.bar, decision.quality, decision.speed, levels, 0,
                        gone=True, served=one.run in latest,
                    )
                )  # fmt: skip
    return tuple(sorted(runs, key=lambda run: run.created, reverse=True))


def _run(path: Path, record: RunRecord, served: bool) -> KeptRun:
    decision = record.decision
    beside = {path.parent / Path(file.path).name for file in record.files}
    return KeptRun(
        record.source.name, record.created, str(path), decision.bar, decision.quality, decision.speed,
        tuple(file.level for file in record.files), sum(_size(one) for one in beside if one.exists()),
        gone=False, served=served,
    )  # fmt: skip


def _levels(known: _Known) -> Iterator[KeptFile]:
    """Measured files that are still there, each place once."""
    seen: set[Path] = set()
    for stored in known.files:
        path = Path(stored.path)
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        parts, now = _hash_known(path)
        name = known.names.get(stored.source, "") or path.stem.removesuffix(f"-{stored.level}")
        kept_by = known.pointing_to(stored.sha256)
        if now != stored.sha256:
            kept_by = (*kept_by, "nothing is known of it as it is now: it was changed after it was measured")
        elif stored.sha256 in known.sources:
            kept_by = (*kept_by, "measurements are against it")
        elif not stored.method:
            kept_by = (*kept_by, "it was made elsewhere")
        for part in parts:
            yield _kept(Place.LEVEL, f"{stored.level} of {name}", part, kept_by)


def _minute(created: str) -> str:
    return created[:16].replace("T", " ")


def _hash_known(path: Path) -> tuple[list[Path], str]:
    """The files of a model by their names, and its hash where none has changed since it was hashed; else empty.
    Nothing is read of them: that would be a use."""
    from bitladder.files.gguf import joined_sha256
    from bitladder.files.hashing import recall
    from bitladder.formats.gguf import SplitName, parse_split_name

    split = parse_split_name(path.name)
    parts = [path]
    if split is not None:
        names = (str(SplitName(split.prefix, number, split.count)) for number in range(1, split.count + 1))
        parts = [there for name in names if (there := path.with_name(name)).is_file()]
    digests = [digest for part in parts if (digest := recall(part))]
    whole = len(digests) == len(parts) == (split.count if split else 1)
    return parts, joined_sha256(digests) if whole else ""


def _partials(folders: Iterable[Path]) -> Iterator[KeptFile]:
    """What stopped jobs left beside measured files."""
    for folder in folders:
        for path in sorted(folder.iterdir()):
            is_file = path.is_file() and not path.is_symlink() and _PARTIAL.fullmatch(path.name)
            if is_file or (_PARTIAL_FOLDER.fullmatch(path.name) and (path / "log.jsonl").is_file()):
                yield _kept(Place.PARTIAL, path.name, path)


def _cached(known: _Known) -> Iterator[KeptFile]:
    """The cache, entry by entry. A model that something was measured against, the installed engine's converter and
    hashes that still hold are kept."""
    from bitladder.files.engine_package import ENGINE, engine_version
    from bitladder.files.folders import cache_folder

    converter = f"{ENGINE}-{engine_version()}"
    for kind in CACHES:
        folder = cache_folder(kind)
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            why: tuple[str, ...] = ()
            if kind == "hashes" and _still_holds(path):
                why = ("the file is as it was hashed",)
            elif kind == "converter" and path.name == converter:
                why = ("the installed engine's",)
            elif kind in ("converted", "models") and any(
                _hash_known(one)[1] in known.sources for one in ([path] if path.is_file() else path.glob("*.gguf"))
            ):
                why = ("measurements are against it",)
            yield _kept(Place.CACHE, kind, path, why, read=kind != "hashes")  # those are read here


def _still_holds(note: Path) -> bool:
    """Whether a hash that is kept is of a file that has not changed."""
    from bitladder.files.hashing import recall

    try:
        return recall(Path(json.loads(note.read_text())["path"])) is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _hub() -> Iterator[KeptFile]:
    """Models in the hub client's cache, and what of others has arrived."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    cache = Path(constants.HF_HUB_CACHE)
    for part in sorted(cache.glob("models--*/blobs/*.part")):
        yield _kept(Place.DOWNLOAD, part.parts[-3].removeprefix("models--").replace("--", "/", 1), part)
    try:
        repos = scan_cache_dir(cache).repos
    except (CacheNotFound, OSError, ValueError):
        return
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        if repo.repo_type == "model" and repo.size_on_disk:
            used = datetime.fromtimestamp(max(repo.last_accessed, repo.last_modified), UTC)
            yield KeptFile(
                Place.HUB, repo.repo_id, str(repo.repo_path), repo.size_on_disk, used.isoformat(timespec="seconds"),
                ("the hub client's: `hf cache` deletes",),
            )  # fmt: skip


def _kept(place: Place, name: str, path: Path, kept_by: tuple[str, ...] = (), *, read: bool = True) -> KeptFile:
    """``read``: whether reading counts as use."""
    used = max(_used(one, read=read) for one in _tree(path))
    when = datetime.fromtimestamp(used, UTC).isoformat(timespec="seconds")
    return KeptFile(place, name, str(path), _size(path), when, kept_by)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(found.st_size for one in _tree(path) if (found := _state(one)) and stat.S_ISREG(found.st_mode))


def _tree(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        yield from path.rglob("*")


def _used(path: Path, *, read: bool) -> float:
    """When a file was last read, written or replaced; folders are read by whoever looks at them, and count by what
    was put into them."""
    found = _state(path)
    if found is None:
        return 0.0
    return max(found.st_atime, found.st_mtime) if read and not stat.S_ISDIR(found.st_mode) else found.st_mtime


def _state(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:  # it is gone by now
        return None
