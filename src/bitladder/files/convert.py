"""Checkpoint folder -> GGUF, by llama.cpp's own converter in a process of its own.

The converter is the engine's (``files/converter.py``). It brings a top-level module ``gguf`` that would overwrite ours,
so a child process looks in the converter's folders first and takes torch and transformers from our environment. Code
that comes with a checkpoint never runs: the child sees cleaned copies alone (``files/staging.py``), and works behind a
fence (``files/converter_child.py``).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitladder.describe.contradiction import check_config
from bitladder.describe.rope_scaling import PLAIN, rope_kinds
from bitladder.errors import BadInput, BitladderError, OutputError, UnknownArchitecture
from bitladder.files import converter_child
from bitladder.files.atomic import put_in_place
from bitladder.files.beside import FURTHER, counts_layers, is_beside, parts_beside
from bitladder.files.checkpoint import Checkpoint, CheckpointTensor, read_checkpoint
from bitladder.files.converter import Converter, converter_at_hand, find_converter
from bitladder.files.decoded import Decoding, decoded_bytes, decoding_of, write_decoded
from bitladder.files.fence import ended_after, environment, fenced, memory_bound, package_folders
from bitladder.files.folders import cache_folder, cache_key
from bitladder.files.hashing import file_sha256, recall
from bitladder.files.probe import available_cores
from bitladder.files.regular import read_regular
from bitladder.files.staging import data_files, stage_checkpoint
from bitladder.levels.checkpoints.converter_formats import ReadAs
from bitladder.progress import Progress, silent
from bitladder.system import ended_by
from bitladder.units import GiB, human_bytes

STAGING = "5"
"""Changes when other copies are staged of the same files."""
ORIGIN = "checkpoint.txt"
"""Beside a converted file: where its checkpoint lies."""
_OUTTYPE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Keep the checkpoint's own precision; anything else (FP8, packed integers) is the converter's choice."""
_TENSOR_LINE = re.compile(r"^INFO:hf-to-gguf:\S+\.(?:weight|bias)\S*,")
UPDATE = "pip install -U xllamacpp"
GIVE_GGUF = "Give a GGUF file of the model if one exists."
UNREAD = converter_child.UNREAD
_LONGEST_NOTE = 1 << 16
_LEAST_SECONDS = 600
"""What the smallest conversion may take; imports alone take ten on a busy machine."""
_SLOWEST = 5_000_000
"""Bytes of weights per second that the slowest disk is allowed."""


def convert_checkpoint(folder: Path, label: str, progress: Progress = silent) -> Path:
    """The GGUF twin of a checkpoint, made once per content and kept in the user's cache.

    Raises:
        BadFile: config.json contradicts the tensors.
        BadInput: no usable checkpoint, or one that the converter cannot read; its last lines are in the message.
        UnknownArchitecture: the converter does not know the model family.
        FetchError: the converter cannot be fetched.
        OutputError: the cache cannot be written or has not enough space.
    """
    checkpoint = read_checkpoint(folder)
    check_config(label, checkpoint.config, checkpoint.tensors)
    converter = find_converter(progress)
    target = cache_folder("converted", content_hash(checkpoint, converter, progress)[:20])
    done = sorted(target.glob("*.gguf"))
    if done:
        _remember(target, folder)
        return done[0]
    _check_rope(checkpoint, converter)
    return _kept(_Conversion(converter, checkpoint, label, progress), target / f"{label}.gguf")


def convert_projector(folder: Path, label: str, progress: Progress = silent) -> Path:
    """The part of a checkpoint that takes in pictures and sounds as a GGUF file of its own (mmproj), in the types of
    the checkpoint, made once per content and kept in the user's cache.

    Raises:
        BadInput: no usable checkpoint, it has no such part, or the converter cannot read it.
        UnknownArchitecture: the converter does not know this part of the family.
        FetchError, OutputError: as ``convert_checkpoint``.
    """
    checkpoint = read_checkpoint(folder)
    towers = tuple(tensor for tensor in checkpoint.tensors if is_beside(tensor.name))
    if not towers:
        raise BadInput(
            f"{folder} takes in neither pictures nor sounds.", do="Give the checkpoint of a model that does."
        )
    converter = find_converter(progress)
    target = cache_folder("converted", content_hash(checkpoint, converter, progress)[:20], "projector")
    done = sorted(target.glob("*.gguf"))
    if done:
        return done[0]
    return _kept(_Conversion(converter, checkpoint, label, progress, towers), target / f"mmproj-{label}.gguf")


@dataclass(frozen=True)
class _Conversion:
    """What is converted, and by what."""

    converter: Converter
    checkpoint: Checkpoint
    label: str
    progress: Progress
    towers: tuple[CheckpointTensor, ...] = ()
    """Only these, to a projector."""


def _kept(job: _Conversion, path: Path) -> Path:
    """The converted file, whole at ``path`` in the cache."""
    checkpoint, target = job.checkpoint, path.parent
    decoding = decoding_of(checkpoint)
    if job.towers and decoding is not None and decoding.by_converter is not ReadAs.IT_IS:
        checkpoint = replace(checkpoint, tensors=job.towers)  # the decoder need not be decoded for it
    try:
        target.mkdir(parents=True, exist_ok=True)
        _require_space(target, checkpoint, decoding)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=target) as work:
            made = _converted(replace(job, checkpoint=checkpoint), decoding, Path(work))
            note = made.with_name(UNREAD)
            if note.is_file():  # first, so that no file without a tokenizer is taken for one with
                put_in_place(note, target / UNREAD)
            put_in_place(made, path)
            _remember(target, job.checkpoint.folder)
    except OSError as error:
        raise OutputError(
            f"The converted model cannot be kept in {target}: {error.strerror or error}",
            do="Free some space, or choose another folder with BITLADDER_CACHE.",
        ) from error
    return path


def _converted(job: _Conversion, decoding: Decoding | None, work: Path) -> Path:
    """The converter's file, in ``work``: of the checkpoint, or of its twin in floats where it cannot read that."""
    if decoding is None or decoding.by_converter is not ReadAs.FLOATS:
        stage = work / "stage" / job.label
        stage_checkpoint(job.checkpoint, stage)
        try:
            return _run_converter(job, stage, work / "work")
        except BadInput:
            if decoding is None or decoding.by_converter is ReadAs.IT_IS:
                raise
    twin = write_decoded(job.checkpoint, decoding, work / "decoded", job.progress)
    stage = work / "stage-decoded" / job.label
    stage_checkpoint(twin, stage, decoded=True)
    return _run_converter(replace(job, checkpoint=twin), stage, work / "work-decoded")


def converted_already(checkpoint: Checkpoint) -> Path | None:
    """The GGUF twin that an earlier conversion left in the cache. Nothing is hashed, fetched or converted for it."""
    converter = converter_at_hand()
    paths = (*data_files(checkpoint.folder), *checkpoint.shards)
    if converter is None or any(recall(path) is None for path in paths):
        return None
    folder = cache_folder("converted", content_hash(checkpoint, converter)[:20])
    return next(iter(sorted(folder.glob("*.gguf"))), None)


def unread_tokenizer(gguf: Path) -> str:
    """Why the converter read no tokenizer for a file that it made here, in its words; "" where it did."""
    note = gguf.with_name(UNREAD)
    if not note.is_file():
        return ""
    words = " ".join(read_regular(note, _LONGEST_NOTE).decode(errors="replace").split())
    if "BPE pre-tokenizer was not recognized" in words:
        return "its rules of splitting text are none that the converter knows"
    return words[:200].rstrip(".") or "for a reason that it does not name"


def checkpoint_of(gguf: Path) -> Path | None:
    """The checkpoint folder that a converted file was made of, where it was made here and the folder is still there."""
    note = gguf.parent / ORIGIN
    try:
        folder = Path(note.read_text().strip())
        return folder if folder.is_absolute() and (folder / "config.json").is_file() else None
    except (OSError, ValueError):
        return None


def _remember(target: Path, folder: Path) -> None:
    """Where the checkpoint of a converted file lies; of two with equal content either will do."""
    place = str(folder.resolve())
    with suppress(OSError):  # a cache that cannot be written still serves its files
        if not (target / ORIGIN).is_file() or (target / ORIGIN).read_text() != place:
            (target / ORIGIN).write_text(place)


def content_hash(checkpoint: Checkpoint, converter: Converter, progress: Progress = silent) -> str:
    """SHA-256 over all that a conversion depends on: the files' names and hashes, their staging, the converter."""
    files = sorted({*data_files(checkpoint.folder), *checkpoint.shards})
    hashes = (part for path in files for part in (path.name, file_sha256(path, progress)))
    return cache_key(str(STAGING), converter.identity(), *hashes, *unused_head(checkpoint.config, checkpoint.tensors))


def outtype_of(checkpoint: Checkpoint) -> str:
    """The converter's name for what float weights become: what they are."""
    return _OUTTYPE.get(checkpoint.main_dtype, "auto")


def lacks_mtp(checkpoint: Checkpoint) -> bool:
    """No tensor belongs to a head that predicts several tokens (MTP, NextN): fine-tunes are saved without.

    Some releases name such tensors ``mtp.*``, others number them as layers after the model's last.
    """
    named = FURTHER in parts_beside(checkpoint.tensors, checkpoint.config)
    return not named and counts_layers(checkpoint.config)


def unused_head(config: Mapping[str, Any], tensors: Sequence[CheckpointTensor]) -> list[str]:
    """The name of a stored head that config.json says is the embedding: transformers and vLLM pass over it, so a file
    that holds it would be another model, or the embedding twice. None where there is no such head.
    """
    owners = [own for own in (config, config.get("text_config")) if isinstance(own, Mapping)]
    ties = [own.get("tie_word_embeddings") for own in owners]
    names = {tensor.name for tensor in tensors}
    if True not in ties or False in ties or not any(name.endswith("embed_tokens.weight") for name in names):
        return []
    return sorted(name for name in names if name.endswith("lm_head.weight"))


def _check_rope(checkpoint: Checkpoint, converter: Converter) -> None:
    """The converter leaves out a scaling of positions that it does not know, without a word; that is another model."""
    for kind in rope_kinds(checkpoint.config):
        if kind is None:
            raise BadInput(
                f"config.json of {checkpoint.folder} scales its positions by a factor without saying how.",
                means="rope_scaling has a factor but no rope_type.",
                do='Add the model\'s own "rope_type" ("linear", "yarn", ...), or remove an untrained rope_scaling.',
            )
        if kind not in PLAIN and not converter.mentions(kind):
            raise BadInput(
                f"config.json of {checkpoint.folder} scales its positions by '{kind[:40]}', which "
                f"{converter.label} does not know.",
                means="The word is misspelled, or newer than the engine here; left out, the model would be another.",
                do=f"Correct rope_type (known: {', '.join(sorted(PLAIN))}), or update the engine ({UPDATE}).",
            )


def _require_space(target: Path, checkpoint: Checkpoint, decoding: Decoding | None) -> None:
    """Refuse before the work, not after an hour of it. Weights that are decoded here are on the disk twice."""
    need = checkpoint.nbytes
    if decoding is not None:
        need = max(need, decoded_bytes(checkpoint, decoding) * (1 if decoding.by_converter is ReadAs.IT_IS else 2))
    need += 64 << 20
    free = shutil.disk_usage(target).free
    if free < need:
        raise OutputError(
            f"The converted model needs {human_bytes(need)} in {target}; {human_bytes(free)} are free.",
            do="Free some space, or choose another folder with BITLADDER_CACHE.",
        )


def _run_converter(job: _Conversion, stage: Path, work: Path) -> Path:
    """Run the converter and pass its steps on; raise with its last lines when it fails."""
    converter, checkpoint = job.converter, job.checkpoint
    work.mkdir()
    made = work / "out.gguf"
    order: converter_child.ChildJob = {
        "converter": converter.search_path,
        "packages": package_folders(),
        "work": str(work),
        "task": "convert",
        "arguments": [
            str(stage),
            "--outfile",
            str(made),
            "--outtype",
            outtype_of(checkpoint),
            *(["--mmproj"] if job.towers else []),
        ],
        "without_mtp": not job.towers and lacks_mtp(checkpoint),
        "left_out": unused_head(checkpoint.config, checkpoint.tensors),
        **_bounds(checkpoint),
    }
    seconds = _LEAST_SECONDS + checkpoint.nbytes / _SLOWEST
    lines: list[str] = []
    seen, tensors = 0, len(job.towers or checkpoint.tensors)
    with fenced(order, environment(work), work) as child, ended_after(child, seconds) as late:
        for line in child.stdout or ():
            lines = [*lines[-199:], line.rstrip()[:400]]
            if _TENSOR_LINE.match(line):
                seen += 1
                job.progress("converting to GGUF", min(seen, tensors), tensors)
        child.wait()
        in_time = late.is_alive()
    if not in_time:
        lines.append(f"ended after {seconds:.0f} seconds without a result")
    if child.returncode != 0 or not made.is_file():
        raise converter_failure(stage.name, lines, child.returncode, converter)
    return made


def _bounds(checkpoint: Checkpoint) -> converter_child.ChildBounds:
    """What a conversion of this size can need: the largest stacked tensors in f32 and twice, 4-bit weights in 16."""
    memory = memory_bound(4 * GiB + 4 * checkpoint.nbytes)
    cpu = (_LEAST_SECONDS + checkpoint.nbytes // _SLOWEST) * available_cores()
    return {"data_bytes": memory, "file_bytes": 8 * checkpoint.nbytes + GiB, "cpu_seconds": cpu}


def converter_failure(label: str, lines: list[str], code: int, converter: Converter) -> BitladderError:
    """What the converter's last words mean."""
    text = "\n".join(lines)
    last = "\n".join(f"  {line[:200]}" for line in _last_lines(text, 4))
    if "No space left" in text:
        return OutputError(
            f"No space left while converting {label}.\n{last}", do="Free some space, or set BITLADDER_CACHE."
        )
    if match := re.search(r"Model (\S+) is not supported", text):
        return UnknownArchitecture(
            f"{converter.label} does not know the architecture {match[1]}.",
            means="The family is newer than this engine, or llama.cpp does not run it.",
            do=f"Update the engine ({UPDATE}). {GIVE_GGUF}",
        )
    if "BPE pre-tokenizer was not recognized" in text:  # of a converter that does not go on without
        return BadInput(
            f"{converter.label} does not know the tokenizer of {label}.",
            means="The tokenizer was changed, for example by fine-tuning with added splitting rules.",
            do="Give a GGUF file of the model, or put the original tokenizer files into the folder.",
        )
    if match := re.search(r"Quant(?: method is not yet supported:| format) '([\w.-]+)'", text):
        return BadInput(
            f"The weights of {label} are quantized with {match[1]}, which {converter.label} does not read.",
            do=f"Give the checkpoint that it was quantized from. {GIVE_GGUF}",
        )
    return _ended(f"(exit code {code}):\n{last}", label, text, code, converter)


def _ended(how: str, label: str, text: str, code: int, converter: Converter) -> BadInput:
    """The converter ended without words that we know: at the fence, at its bounds, or for reasons of its own."""
    if "Fenced" in text:
        return BadInput(
            f"Converting {label} was ended, since it went where no conversion needs to go {how}",
            means="It has a tokenizer or configuration only as Python code, or is an attack: no such code runs here.",
            do=GIVE_GGUF,
        )
    if "MemoryError" in text or "not enough memory" in text or ended_by(code, "SIGABRT", "SIGKILL", "SIGXCPU"):
        return BadInput(
            f"Converting {label} ended at its bounds of memory or time {how}",
            means="The machine is too small for the largest tensors of this model, or a file asks for absurdly much.",
            do=f"Convert it on a larger machine. {GIVE_GGUF}",
        )
    return BadInput(
        f"{converter.label} failed on {label} {how}",
        means="This build of the converter cannot read this checkpoint: a file is missing, or the family or the way it "
        "was saved is one that it does not know.",
        do=f"Try the files of the model's original release, or a newer engine ({UPDATE}). {GIVE_GGUF}",
    )


def _last_lines(text: str, count: int) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip(" \t^~")][-count:]
