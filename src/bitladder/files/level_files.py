"""What the file (or the files) of a level will be, byte for byte except for the weights: header, provenance,
parts, sizes.

Every key of the source is carried over as it is, except those that would no longer be true: file type,
quantization version and numbering of parts. Keys of our own say what the file was made from and how:

    bitladder.source          name of the source file        bitladder.recipe    level
    bitladder.source_sha256   hash of the source             bitladder.method    how block scales were chosen
    bitladder.version         version of Bitladder

A source that is quantized itself adds ``bitladder.requantized_from``, the levels that the weights went through.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bitladder import __version__
from bitladder.describe.model import Model
from bitladder.describe.quantized import KEY_BEFORE, quantized
from bitladder.errors import BitladderError, OutputError, UsageError
from bitladder.files.gguf_header import read_file_header
from bitladder.files.gguf_writer import GgufWriter, Layout, cannot_write, encoded, layout
from bitladder.files.outputs import check_output
from bitladder.formats import gguf
from bitladder.formats.recipes import FILE_TYPES, assign, level_named
from bitladder.formats.tensors import TensorInfo
from bitladder.units import human_bytes

NO_IMPORTANCE = "0" * 16
"""In place of an importance matrix's hash where there is none: headers then have one length, and plans are exact."""
_PLANNED = f"search good, kernels 0000, importance {NO_IMPORTANCE}"
"""As long as every method's name: a plan does not load the kernels to ask for their revision."""
PLANNED_FIT = f"feedback good, kernels 0000-0, damp 0.01, text {NO_IMPORTANCE}"
"""The same for levels fitted with error feedback."""
_KEY_HASH = gguf.PROVENANCE + "source_sha256"
_NO_HASH_YET = "0" * 64
_SPLIT_KEYS = (gguf.KEY_SPLIT_NO, gguf.KEY_SPLIT_COUNT, gguf.KEY_SPLIT_TENSORS)


@dataclass(frozen=True)
class LevelPart:
    """One file of a level; most levels have a single one. The header of ``plan`` lacks the source's hash."""

    path: Path
    entries: dict[str, bytes]
    plan: Layout
    alignment: int

    def header(self, source_sha256: str) -> bytes:
        """The header with the source's hash, as long as the one in ``plan``."""
        entries = dict(self.entries)
        if _KEY_HASH in entries:
            entries[_KEY_HASH] = encoded(gguf.STRING, source_sha256)
        return layout(entries, self.plan.tensors, self.alignment).header

    def has_its_size(self) -> bool:
        """Whether a file of this very size is there."""
        return self.path.is_file() and self.path.stat().st_size == self.plan.size

    def is_written(self, source_sha256: str) -> bool:
        """Whether the file that is there begins with the header that would be written."""
        with self.path.open("rb") as file:
            return file.read(len(self.plan.header)) == self.header(source_sha256)


@dataclass(frozen=True)
class LevelDraft:
    """A level before it is written."""

    level: str
    parts: tuple[LevelPart, ...]
    label: str
    """What users call it: the level, or that and what was done to the weights before."""

    @property
    def file_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.plan.size for part in self.parts)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor with the type it will have."""
        return tuple(tensor for part in self.parts for tensor in part.plan.tensors)

    def at(self, path: Path) -> LevelDraft:
        """The same level, in one file, under another path."""
        (part,) = self.parts
        return replace(self, parts=(replace(part, path=path),))

    def names(self) -> Iterator[LevelDraft]:
        """The same level under its name, then under names that nothing made in another way has: ``NAME.TAG.gguf``.

        The tag says how it is made, so that the same call finds the same file again.
        """
        yield self
        first = self.parts[0]
        made = [first.entries.get(gguf.PROVENANCE + key) for key in ("source", "recipe", "method", "version")]
        types = [(tensor.name, tensor.qtype) for tensor in self.tensors]
        tag = hashlib.sha256(repr((made, types)).encode()).hexdigest()[:8]
        for number in itertools.count(1):
            suffix = tag if number == 1 else f"{tag}-{number}"
            yield replace(self, parts=tuple(replace(part, path=_with_suffix(part.path, suffix)) for part in self.parts))

    def is_written(self, source_sha256: Callable[[], str]) -> bool:
        """Whether every part exists with the header that would be written. Only complete files ever get their
        name.
        """
        return all(part.has_its_size() for part in self.parts) and all(
            part.is_written(source_sha256()) for part in self.parts
        )

    def is_ours(self, path: Path, source_sha256: Callable[[], str]) -> bool:
        """Whether the file of one of the parts is this level of this source, by whatever method it was made. Only the
        first part says so; the others are told by it, or (a kill left them without it) by being what would be
        written.
        """
        part = next(part for part in self.parts if part.path == path)
        if part is not self.parts[0] and part.has_its_size() and part.is_written(source_sha256()):
            return True
        return made_as(self.parts[0].path, self.label, source_sha256)


def _with_suffix(path: Path, suffix: str) -> Path:
    """``m-Q4_K_M.gguf`` as ``m-Q4_K_M.SUFFIX.gguf``; a part keeps its number at the end."""
    split = gguf.parse_split_name(path.name)
    if split is None:
        return path.with_name(f"{path.name.removesuffix('.gguf')}.{suffix}.gguf")
    return path.with_name(str(gguf.SplitName(f"{split.prefix}.{suffix}", split.number, split.count)))


def _nothing_is_kept(_: Path) -> bool:
    return False


def possible_places(draft: LevelDraft, folders: Sequence[Path] = ()) -> Iterator[LevelDraft]:
    """The draft wherever its file may lie already: under its names in its own folder, under any name in ``folders``."""
    yield from itertools.islice(draft.names(), 2)
    if len(draft.parts) > 1:
        return
    own = draft.parts[0].path.name
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.glob("*.gguf"), key=lambda path: (path.name != own, path.name)):
            yield draft.at(path)


def free_name(draft: LevelDraft, is_kept: Callable[[Path], bool] = _nothing_is_kept) -> LevelDraft:
    """The draft under the first of its names that is free, or whose file may be replaced.

    Args:
        draft: a level that is to be written.
        is_kept: whether the file at a path must stay as it is.
    """
    return next(
        named for named in draft.names() if not any(part.path.is_file() and is_kept(part.path) for part in named.parts)
    )


def _provenance(model: Model, level: str, method: str) -> dict[str, bytes]:
    texts = {
        "source": model.file_name,
        "source_sha256": _NO_HASH_YET,
        "recipe": level,
        "method": method,
        "version": __version__,
    }
    entries = {gguf.PROVENANCE + key: encoded(gguf.STRING, text) for key, text in texts.items()}
    if before := quantized(model):
        entries[KEY_BEFORE] = encoded(gguf.STRING, before.steps)
    return entries


def _carried(model: Model, level: str) -> dict[str, bytes]:
    """The source's keys in their order; the level's own values replace the source's where they stand."""
    kept = {
        key: value
        for key, value in model.raw_metadata.items()
        if key not in _SPLIT_KEYS and not key.startswith(gguf.PROVENANCE)
    }
    kept[gguf.KEY_FILE_TYPE] = encoded(gguf.UINT32, FILE_TYPES[level])
    kept[gguf.KEY_QUANTIZATION_VERSION] = encoded(gguf.UINT32, gguf.QUANTIZATION_VERSION)
    return kept


def _grouped(tensors: Sequence[TensorInfo], split_max_bytes: int | None) -> list[list[TensorInfo]]:
    """Tensors in file order, a new group whenever the next one would pass the limit. None is cut."""
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for tensor in tensors:
        if split_max_bytes is not None and groups[-1] and filled + tensor.nbytes > split_max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def _numbering(number: int, count: int, tensors: int) -> dict[str, bytes]:
    return {
        gguf.KEY_SPLIT_NO: encoded(gguf.UINT16, number),
        gguf.KEY_SPLIT_COUNT: encoded(gguf.UINT16, count),
        gguf.KEY_SPLIT_TENSORS: encoded(gguf.INT32, tensors),
    }


def draft_level(
    model: Model,
    level: str,
    folder: Path = Path(),
    *,
    label: str = "",
    method: str = _PLANNED,
    has_importance: bool = False,
    split_max_bytes: int | None = None,
    qtypes: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
    requantize: bool = False,
) -> LevelDraft:
    """Lay out ``folder/<name>-<LEVEL>.gguf``, or its parts of at most ``split_max_bytes`` of weights each.
    ``label`` takes the level's place in the name where more was done than the level says. ``qtypes`` are a recipe of
    our own, ``level`` then the named one that is nearest to it; ``notes`` go into the header beside the provenance.
    ``requantize``: as ``formats.recipes.assign`` takes it.

    Raises:
        UnknownLevel: no level has this name.
        UsageError: the limit would make more parts than file names can count.
    """
    level = level_named(level)
    if qtypes is None:
        qtypes = assign(level, model.tensors, model.dims, has_importance=has_importance, requantize=requantize)
    tensors = [TensorInfo(tensor.name, tensor.shape, qtypes[tensor.name]) for tensor in model.tensors]
    groups = _grouped(tensors, split_max_bytes)
    if len(groups) > gguf.MAX_SPLITS:
        raise UsageError(f"{split_max_bytes} bytes a part make {len(groups)} parts.", do="Give a larger limit.")
    parts = []
    for number, group in enumerate(groups):
        entries: dict[str, bytes] = {}
        if number == 0:
            entries = {**_carried(model, level), **_provenance(model, label or level, method)}
            entries |= {gguf.PROVENANCE + key: encoded(gguf.STRING, text) for key, text in (notes or {}).items()}
        name = f"{model.name}-{label or level}"
        if len(groups) > 1:
            entries |= _numbering(number, len(groups), len(tensors))
            path = folder / str(gguf.SplitName(name, number + 1, len(groups)))
        else:
            path = folder / f"{name}.gguf"
        parts.append(LevelPart(path, entries, layout(entries, group, model.alignment), model.alignment))
    return LevelDraft(level, tuple(parts), label or level)


def made_as(path: Path, label: str, source_sha256: Callable[[], str]) -> bool:
    """Whether a file says that Bitladder made it as the level ``label`` of a source with this hash."""
    try:
        keys = read_file_header(path).metadata
    except BitladderError:  # whatever it is, it is not ours
        return False
    return keys.get(gguf.PROVENANCE + "recipe") == label and keys.get(_KEY_HASH) == source_sha256()


def refuse_overwriting(
    sources: Sequence[Path],
    drafts: Sequence[LevelDraft],
    source_sha256: Callable[[], str],
    *,
    force: bool | None = None,
) -> None:
    """Raises UsageError where a level would take the place of a file that it is made from, or of anything but the same
    level of the same source (unless ``force``).
    """
    for draft in drafts:
        for part in draft.parts:
            check_output(
                part.path,
                draft.label,
                inputs=sources,
                ours=lambda path, draft=draft: draft.is_ours(path, source_sha256),  # type: ignore[misc]
                force=force,
            )


def check_space(drafts: Sequence[LevelDraft], folder: Path) -> None:
    """Refuse before the first byte what cannot fit; blocks that an earlier run's partial files hold count as free.

    Raises:
        OutputError: too little space, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise cannot_write(folder, error) from error
    needed = sum(draft.file_bytes for draft in drafts)
    for draft in drafts:
        for part in draft.parts:
            partial = GgufWriter.partial_of(part.path)
            if partial.is_file():
                free += partial.stat().st_blocks * 512
    if needed > free:
        levels = ", ".join(draft.level for draft in drafts)
        raise OutputError(
            f"{folder}: {needed} bytes ({human_bytes(needed)}) are needed, {free} ({human_bytes(free)}) are free.",
            means=f"The disk is too full for {levels}. Nothing was written.",
            do="Free space, ask for fewer or smaller levels, or choose another folder with --out.",
        )
