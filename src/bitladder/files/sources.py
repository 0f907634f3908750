"""Where models come from: a file, a checkpoint folder, the hub, a local store, the demo. Whatever it is
becomes a GGUF path.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from bitladder.describe.quantized import checkpoint_note, checkpoint_origin, kept_note, quantized
from bitladder.describe.rope_scaling import rope_warnings
from bitladder.errors import BadInput
from bitladder.files import convert, demo, hub, local_stores
from bitladder.files.checkpoint import read_checkpoint, read_json
from bitladder.progress import Progress, silent

DEMOS = (demo.NAME,)


@dataclass(frozen=True)
class Source:
    """A model as the stages use it."""

    path: Path
    """The GGUF file (the first one of a split model)."""
    label: str
    """How to call it: the file's name without ending, or org/name."""
    warnings: tuple[str, ...] = ()
    """What the user should see before believing any number."""
    checkpoint: Path | None = None
    """The checkpoint folder the GGUF was converted from; None when a GGUF was given."""
    licence: str = ""
    quantized: bool = field(default=False)
    """The source itself is quantized: losses are relative to it, not to the original model."""
    unread_tokenizer: str = ""
    """Why the converter could not read a checkpoint's tokenizer, so that the file has none; "" where it has."""
    origin: str = ""
    """How a checkpoint's weights were quantized before they were converted; "" where they were not."""


def resolve(model: str, progress: Progress = silent) -> Source:
    """Find or fetch a model and make it a GGUF file.

    ``model`` is the path of a GGUF file or of a checkpoint folder (config.json and safetensors),
    ``hf:org/name[@revision]``, ``hf:org/name:Q4_K_M`` of a repository of GGUF files, ``ollama:name``,
    ``lmstudio:publisher/repo``, or ``smollm2-135m``, the small demo model.

    Raises:
        BadInput: nothing usable is there; the message says what was found.
        FetchError: a download failed or arrived with another hash.
        OutputError: the cache cannot be written.
    """
    if model == demo.NAME:
        return Source(demo.fetch_demo(progress), demo.NAME, (demo.WARNING,), licence=demo.LICENCE, quantized=True)
    if model.startswith("hf:"):
        return _from_hub(model, progress)
    if model.startswith("ollama:"):
        return label_quantized(Source(local_stores.find_ollama(model), model.removeprefix("ollama:").replace(":", "-")))
    if model.startswith("lmstudio:"):
        found = local_stores.find_lmstudio(model)
        return label_quantized(Source(found, found.stem))
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, path.resolve().name, "", progress)
    if path.is_file():
        return label_quantized(Source(path, path.stem))
    raise no_such_model(model, path)


def checkpoint_folder(model: str) -> tuple[Path, str] | None:
    """The folder of a model that is a checkpoint on this machine, and what it is called; None of anything else. Nothing
    is fetched or converted."""
    path = Path(model).expanduser()
    if ":" in model.partition("/")[0] or not (path / "config.json").is_file():
        return None
    return path, path.resolve().name


def _from_hub(model: str, progress: Progress) -> Source:
    """Fetch a GGUF file, or a checkpoint to convert, into the hub's cache."""
    from bitladder.files.hub_download import fetch  # brings httpx, which files on the disk need not wait for

    name = hub.parse_name(model)
    progress(f"asking the hub for {name.repo}", 0, 1)
    repo = hub.list_repo(name)
    checkpoint = (
        not name.file and any(file.name == "config.json" for file in repo.files) and repo.ending(".safetensors")
    )
    ggufs = () if checkpoint else hub.choose_gguf(repo)
    if ggufs:
        first = fetch(repo, ggufs, progress)[0]
        found = label_quantized(Source(first, first.stem, licence=repo.licence))
        beside = hub.projectors(repo)
        return replace(found, warnings=(*found.warnings, _not_fetched(beside[0].name, repo))) if beside else found
    files = fetch(repo, hub.checkpoint_files(repo), progress)
    return _from_folder(files[0].parent, name.repo.split("/")[1], repo.licence, progress)


def _not_fetched(projector: str, repo: hub.HubRepo) -> str:
    return (
        f"The repository also holds {projector}, which takes in pictures or sounds and serves every level as it is: it "
        f"is not fetched (hf download {repo.name.repo} {projector}); put beside the levels it is served with them."
    )


def _from_folder(folder: Path, label: str, licence: str, progress: Progress) -> Source:
    """A checkpoint folder, converted to GGUF; a folder with a single GGUF file is that file."""
    single = gguf_in_folder(folder)
    if single is not None:
        return label_quantized(Source(single, single.stem, licence=licence))
    from bitladder.files.beside import left_out, parts_beside
    from bitladder.files.gguf import read_header

    path = convert.convert_checkpoint(folder, label, progress)
    checkpoint = read_checkpoint(folder)
    dtypes = {tensor.dtype for tensor in checkpoint.tensors}
    model = read_header(path)
    beside = left_out(parts_beside(checkpoint.tensors, checkpoint.config), model)
    kept = kept_note(model)
    unread = convert.unread_tokenizer(path)
    warnings = (*_checkpoint_warnings(folder, dtypes), *([kept] if kept else []), *beside)
    warnings += (unread_note(unread),) if unread else ()
    warnings += tuple(unused_note(name) for name in convert.unused_head(checkpoint.config, checkpoint.tensors))
    origin = checkpoint_origin(checkpoint.config, dtypes)
    return Source(
        path, label, warnings, checkpoint=folder, licence=licence, quantized=bool(origin), origin=origin,
        unread_tokenizer=unread,
    )  # fmt: skip


def unused_note(head: str) -> str:
    """The sentence for a stored head that config.json says is the embedding."""
    return (
        f"config.json says that the head is the embedding (tie_word_embeddings), and the weights hold {head}: it is "
        "left out, as transformers and vLLM pass over it. If it was trained, set tie_word_embeddings to false."
    )


def unread_note(reason: str) -> str:
    """The sentence for a checkpoint whose tokenizer the converter cannot read."""
    return (
        f"llama.cpp's converter does not read its tokenizer ({reason}): no GGUF levels can be made of it, and nothing "
        "of it can be run here. `measure`, `imatrix` and checkpoint levels (GPTQ, AWQ, INT8, FP8, ...) read texts by "
        "the checkpoint's own tokenizer."
    )


def gguf_in_folder(folder: Path) -> Path | None:
    """The GGUF file (or first part) of a folder that is no checkpoint and holds a single model."""
    groups = hub.group_shards([path.name for path in folder.glob("*.gguf")])
    if (folder / "config.json").exists() or len(groups) != 1:
        return None
    return folder / next(iter(groups.values()))[0]


def _checkpoint_warnings(folder: Path, dtypes: Iterable[str] = ()) -> tuple[str, ...]:
    """What is lost before any level is made: a checkpoint that is already quantized is dequantized on conversion,
    and some scalings of positions have no counterpart. ``dtypes``: of its tensors.
    """
    config = read_json(folder / "config.json")
    note = checkpoint_note(config, dtypes)
    return (*((note,) if note else ()), *rope_warnings(config))


def label_quantized(source: Source) -> Source:
    """Mark a GGUF source whose weights are quantized. The header is read; the weights are not."""
    from bitladder.files.gguf import read_header

    model = read_header(source.path)
    found = quantized(model)
    if found is None:
        return source
    notes = [note for note in (found.sentence(), kept_note(model)) if note]
    return replace(source, warnings=(*source.warnings, *notes), quantized=True)


def no_such_model(model: str, path: Path, means: str = "") -> BadInput:
    """The error for a name that is nothing, with what may have been meant."""
    means = means or "It is neither a file, nor a folder, nor a known name."
    return BadInput(f"There is no model '{model}'.", means=means, do=_advice(model, path))


def _advice(model: str, path: Path) -> str:
    """What the user may have meant: a demo's name, a neighbouring file, the hub."""
    parent = path.parent if path.parent.is_dir() else Path()
    names = [str(entry) if path.parent != Path() else entry.name for entry in parent.iterdir()]
    close = difflib.get_close_matches(model, [*DEMOS, *names], n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(close) + "?"
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return f"For a model on the Hugging Face hub write hf:{model}"
    return (
        f"Give a GGUF file, a folder with config.json and safetensors, hf:org/name, hf:org/name:Q4_K_M, or {DEMOS[0]}."
    )
