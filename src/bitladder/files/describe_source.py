"""Describe a model wherever it is without downloading or converting it: what planning needs, nothing more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bitladder.describe.contradiction import check_config
from bitladder.describe.model import Model
from bitladder.describe.quantized import checkpoint_note, checkpoint_origin, decoded_from, kept_note, quantized
from bitladder.describe.rope_scaling import rope_warnings
from bitladder.errors import BadInput
from bitladder.files import catalogue, convert, demo, hub, local_stores, remote
from bitladder.files.beside import projector_beside, projector_note
from bitladder.files.checkpoint import WEIGHTS, has_weights, read_checkpoint, read_json
from bitladder.files.describe_checkpoint import Described, SizeBasis, class_name, of_checkpoint, with_beside
from bitladder.files.engine_package import engine_knows
from bitladder.files.gguf import read_header
from bitladder.files.sources import gguf_in_folder, no_such_model
from bitladder.formats.families import FAMILIES
from bitladder.progress import Progress, silent
from bitladder.units import human_bytes

_NO_WEIGHTS = "There are no weights beside config.json: this is a plan, and there is nothing to quantize."


def describe(model: str, progress: Progress = silent) -> Described:
    """Read headers only.

    ``model``: a GGUF file, a checkpoint folder, ``hf:org/name[@revision][:level]``, ``ollama:name[:tag]``,
    ``lmstudio:publisher/repo[:level]``, the demo's name, or a name of the catalogue.

    Raises:
        BadInput, BadFile, UnknownArchitecture: nothing usable is there.
        FetchError: the network went away.
    """
    found = _described(model, progress)
    architecture = found.model.dims.architecture
    if architecture not in FAMILIES and engine_knows(architecture) is None:
        note = f"No engine is installed here that could say whether it runs '{architecture}'; sizes are the header's."
        return replace(found, notes=(*found.notes, note))
    return found


def _described(model: str, progress: Progress) -> Described:
    """The description without what the engine has to say."""
    if model == demo.NAME:
        return Described(read_header(demo.fetch_demo(progress)), model, demo.LICENCE, notes=(demo.WARNING,))
    if model.startswith("hf:"):
        return _on_hub(hub.parse_name(model), progress)
    if model.startswith("ollama:"):
        found = read_header(local_stores.find_ollama(model))
        return _of_header(replace(found, name=model.removeprefix("ollama:")), model)
    if model.startswith("lmstudio:"):
        return _of_header(read_header(local_stores.find_lmstudio(model)), model)
    path = Path(model).expanduser()
    if path.exists():
        return _on_disk(path, progress)
    try:
        row = catalogue.model_named(model)
    except BadInput as unknown:
        raise no_such_model(model, path, unknown.means) from unknown
    basis = SizeBasis.ROW if row.shape is not None else SizeBasis.SHAPES
    return Described(row.whole(), row.hub, row.licence, basis=basis)


def _on_disk(path: Path, progress: Progress) -> Described:
    """A GGUF file, a folder that holds one, or a checkpoint folder."""
    single = gguf_in_folder(path) if path.is_dir() else path
    if single is not None:
        return _with_projector(_of_header(read_header(single), single.stem), single)
    label = path.resolve().name
    if not has_weights(path):
        config = read_json(path / "config.json")
        return _noted(of_checkpoint(label, config, (), None, progress), _NO_WEIGHTS)
    checkpoint = read_checkpoint(path)
    check_config(label, checkpoint.config, checkpoint.tensors)
    twin = convert.converted_already(checkpoint)
    if twin is not None:
        model = replace(read_header(twin), name=label)
        gap = convert.unread_tokenizer(twin)
        notes = (f"The converter does not read its tokenizer ({gap}).",) if gap else ()
        named = class_name(checkpoint.config) or "none"
        found = Described(model, label, notes=notes, model_class=named, converts=True, tokenizer_gap=gap)
        found = with_beside(found, checkpoint.tensors, checkpoint.config)
    else:
        found = of_checkpoint(label, checkpoint.config, checkpoint.tensors, path, progress)
    dtypes = {tensor.dtype for tensor in checkpoint.tensors}
    found = replace(found, model=decoded_from(found.model, checkpoint_origin(checkpoint.config, dtypes)))
    found = replace(found, notes=(*found.notes, *rope_warnings(checkpoint.config)))
    return _noted(_noted(found, kept_note(found.model)), checkpoint_note(checkpoint.config, dtypes))


def _with_projector(found: Described, path: Path) -> Described:
    """A file with what lies beside it."""
    projector = projector_beside(path)
    if projector is None:
        return found
    noted = replace(found, notes=(*found.notes, projector_note(projector)))
    return replace(noted, beside_bytes=projector.stat().st_size)


def _with_remote_projector(found: Described, repo: hub.HubRepo) -> Described:
    """A file of the hub with what its repository holds for pictures and sounds; of several the smallest of 16 bits."""
    files = hub.projectors(repo)
    if not files:
        return found
    note = f"The repository also holds what takes in pictures or sounds ({files[0].name}, {human_bytes(files[0].size)})"
    return replace(found, notes=(*found.notes, f"{note}: counted in memory."), beside_bytes=files[0].size)


def _of_header(model: Model, label: str) -> Described:
    """A GGUF file; that it is quantized already is noted."""
    found = quantized(model)
    return _noted(_noted(Described(model, label), kept_note(model)), found.sentence() if found else "")


def _noted(found: Described, note: str) -> Described:
    return replace(found, notes=(note, *found.notes)) if note else found


def _on_hub(name: hub.HubName, progress: Progress) -> Described:
    progress(f"asking the hub for {name.repo}", 0, 1)
    repo = hub.list_repo(name)
    ready = remote.offers(repo)
    weights = any(file.name.endswith(WEIGHTS) for file in repo.files)
    has_config = any(file.name == "config.json" for file in repo.files)
    has_checkpoint = has_config and (repo.ending(".safetensors") or not weights)
    with remote.RemoteFiles(repo) as files:
        if name.file or not has_checkpoint:
            ggufs = hub.choose_gguf(repo) if name.file or len(ready) == 1 else _least_lossy(repo)
            if ggufs:
                header = remote.remote_gguf(files, ggufs, progress)
                described = replace(_of_header(header, name.repo), licence=repo.licence, offers=ready)
                return _with_remote_projector(described, repo)
            hub.checkpoint_files(repo)  # says what is missing
        config = remote.remote_config(files)
        label = name.repo.split("/")[1]
        tensors = remote.remote_safetensors(files, progress) if repo.ending(".safetensors") else []
    check_config(label, config, tensors)
    found = of_checkpoint(label, config, tensors, None, progress)
    found = replace(found, model=decoded_from(found.model, checkpoint_origin(config)))
    notes = (*found.notes, *rope_warnings(config))
    found = replace(found, label=name.repo, licence=repo.licence, offers=ready, notes=notes)
    found = _noted(_noted(found, kept_note(found.model)), checkpoint_note(config))
    return _noted(found, "" if tensors else _NO_WEIGHTS)


def _least_lossy(repo: hub.HubRepo) -> tuple[hub.HubFile, ...]:
    """The largest GGUF of a repository of levels: all have the same shapes."""
    models = hub.gguf_models(repo)
    return max(models.values(), key=lambda files: sum(file.size for file in files), default=())
